"""One arm on one seed: its config, matched with RLP's run of that seed, and its run."""

import json
from dataclasses import dataclass
from pathlib import Path

from arms import ARMS, REFERENCE
from lines import AMOUNTS, figures_of
from worlds import CURVE, Reader, panel_of, quickstart, world_folder

from rlp import Trainer
from rlp.compare.arms import write_arm
from rlp.compare.mixed_sft import MixedSft, iterate
from rlp.compare.splice import Splicing, splice
from rlp.config import Config, load_config
from rlp.process.exit_codes import DONE
from rlp.process.json_files import read_json
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder, open_run_folder

COMMON = (
    "checkpoint.every_n_steps=0",
    "logging.every_n_steps=20",
    "logging.thoughts=8",
    "evaluation.cold_temperature=null",
)
AT_ANSWERS = (
    "objective.lm_weight=0",
    "position.per_document=1",
    "position.selector=marker",
    "position.marker=faces",
)
"""RLP's run: no LM loss, and every arm that thinks is told where an answer is."""
ROUNDS = 3
"""Of mixed SFT."""


class RunFailed(Exception):
    """A run did not come to its end; the message says where it tells why."""


def arm_folder(out: Path, arm: str, seed: int) -> Path:
    """What belongs to an arm on a seed."""
    return out / arm / f"seed_{seed}"


def exported(out: Path, arm: str, seed: int) -> Path:
    """The model that an arm ends pretraining with; the base where it trains nothing."""
    if not ARMS[arm].is_trained:
        return world_folder(seed) / "base"
    return _last_run(arm, arm_folder(out, arm, seed)) / "export"


def _last_run(arm: str, folder: Path) -> Path:
    return folder / "rounds" / f"round_{ROUNDS}" / "run" if arm == "mixed_sft" else folder / "run"


@dataclass(frozen=True, slots=True)
class Pretraining:
    """An arm to be run."""

    arm: str
    seed: int
    settings: dict
    """That tuning chose."""
    folder: Path
    """Of its run."""
    reference: Path
    """RLP's run, whose cost it spends."""
    ranks: Ranks
    draws: bool = True
    """Whether its curve is wanted: evaluations on the way."""

    def train(self, reader: Reader) -> tuple[Path, dict, list[dict]]:
        """Run the arm to its end, or take the run that is there: its model, what it spent, and its
        curve."""
        if self.arm == "mixed_sft":
            self._train_in_rounds()
            *before, (spent, model) = self._rounds()
            figures = [(one, reader.figures(at, 1.0, CURVE[1])) for one, at in before]
            return model, spent, [one | told for one, told in figures]
        self._train_at_once()
        last = _last_run(self.arm, self.folder)
        ledger = read_json(last / "ledger.json")
        spent = {"stage_step": ledger["steps"], **{name: ledger[name] for name in AMOUNTS}}
        return last / "export", spent, curve(last, ledger["steps"])

    def config(self) -> Config:
        """For all but RLP itself `rlp match` writes it."""
        if self.arm == REFERENCE:
            return load_config(quickstart(self.seed), [*AT_ANSWERS, *self._overrides()])
        (self.folder / "match.yaml").unlink(missing_ok=True)
        made = ARMS[self.arm]
        data = self._replay() if self.arm == "cpt_replay" else None
        return write_arm(
            open_run_folder(self.reference),
            made.kind,
            made.by,
            self.folder / "match.yaml",
            data,
            [*self._overrides(), *self._chosen(), *made.overrides],
        )

    def _overrides(self) -> list[str]:
        return [
            f"run.dir={self.folder / 'run'}",
            f"run.arm={self.arm}",
            f"run.seed={self.seed}",
            f"evaluation.every_n_steps={ARMS[self.arm].evaluates_every if self.draws else 0}",
            *COMMON,
            *panel_of(CURVE),
            *(self._chosen() if self.arm == REFERENCE else ()),
        ]

    def _chosen(self) -> list[str]:
        """The settings that are overrides of a config."""
        return [f"{key}={value}" for key, value in self.settings.items() if "." in key]

    def _train_at_once(self) -> None:
        config = self.config()
        set_aside_another(self.folder / "run", config)
        if not (self.folder / "run" / "export").is_dir():
            self._run(config)

    def _run(self, config: Config) -> int:
        code = Trainer(config, ranks=self.ranks).fit().code
        if code != DONE:
            raise RunFailed(f"it ended with {code}; {self.folder / 'log.txt'} says why")
        return code

    def _replay(self) -> Path:
        """Documents of which some hold a thought of the base, whatever that is worth."""
        data = self.folder / "spliced"
        if not data.exists():
            how = Splicing(keep="random", plain_share=self.settings["plain_share"])
            own = load_config(str(self.reference / "config.yaml"))
            splice(own, self.settings["documents"], data, self.ranks, how)
        return data

    def _train_in_rounds(self) -> None:
        """Mixed SFT: each round's data is made by the model of the round before."""
        asked = MixedSft(
            run=str(self.reference),
            documents=self.settings["documents"],
            learning_rate=self.settings["learning_rate"],
            rounds=ROUNDS,
            loss=self.settings["loss"],
            overrides=(*COMMON, *ARMS[self.arm].overrides),
        )
        rounds = self.folder / "rounds"
        told = rounds / "mixed_sft.json"
        if told.exists() and json.loads(told.read_text())["run"] != asked.run:
            _keep_aside(rounds, "was made beside another run")
        iterate(asked, rounds, self.ranks, self._run)

    def _rounds(self) -> list[tuple[dict, Path]]:
        """What was spent by the end of each round, and its model. A ledger carries the cost of the
        rounds before, but counts its own steps."""
        ends, steps = [], 0
        for number in range(1, ROUNDS + 1):
            run = RunFolder(self.folder / "rounds" / f"round_{number}" / "run")
            ledger = read_json(run.ledger_json)
            steps += ledger["steps"]
            spent = {"stage_step": steps, **{name: ledger[name] for name in AMOUNTS}}
            ends.append((spent, run.export))
        return ends


def set_aside_another(run: Path, config: Config) -> None:
    """Give a run folder that can not be gone on with another name: an unfinished one, which has no
    checkpoint, and one of another config, such as another machine's."""
    if not run.exists():
        return
    if not (run / "export").is_dir():
        _keep_aside(run, "is not finished and has no checkpoint to go on from")
    elif load_config(str(run / "config.yaml")) != config:
        _keep_aside(run, "was made by another config")


def _keep_aside(folder: Path, why: str) -> None:
    names = (folder.with_name(f"{folder.name}_aside_{n}") for n in range(1, 1000))
    free = next(path for path in names if not path.exists())
    print(f"{folder} {why}: it is kept as {free.name}, and the arm begins anew")
    folder.rename(free)


def curve(run: Path, steps: int) -> list[dict]:
    """The evaluations of a run before its last one, with what it had spent by then."""
    lines = {
        name: [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "timing", "evaluation")
    }
    carried = run.parent / "spliced" / "ledger.json"
    first = json.loads(carried.read_text()) if carried.exists() else dict.fromkeys(AMOUNTS, 0)
    spent, seconds = {0: {name: first[name] for name in AMOUNTS}}, first["seconds"]
    for line, clock in zip(lines["metrics"], lines["timing"]):
        seconds += clock["perf/step_s"]
        spent[line["step"]] = {
            "input_tokens": line["budget/tokens"],
            "flops": line["budget/flops"],
            "paper_flops": None,
            "seconds": round(seconds, 2),
        }
    return [
        {"stage_step": line["step"], **spent[line["step"]], **figures_of(line, 1.0, CURVE[1])}
        for line in lines["evaluation"]
        if line["step"] < steps
    ]
