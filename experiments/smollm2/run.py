"""The experiment with a real pretrained model on real text, stage by stage.

    make smollm2                                    # all of it, on this machine
    python experiments/smollm2/run.py gate arms     # some stages
    make smollm2 SCALE=gpu                          # larger numbers

    prepare    SmolLM2 from its package, with one token for each marker     model/
    documents  lines of GSM8K's solutions                                   data/
    warm       LM loss on lines with thoughts, and without                  warm/
    calibrate  LM loss on lines with thoughts, of which half are wrong      calibrated/
    gate       does a thought gain? on held-out lines, before and after     results.jsonl
    arms       each from the calibrated model, over seeds                   arms/, results.jsonl
    panels     the arms on other positions and other text                   results.jsonl
    report     the tables of README.md, and the claim                       here

Each stage goes on where it was interrupted and does nothing that is done; no run and no line is
written over. Where the gate says that thoughts gain nothing, the arms are not run (`--anyway`).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlp import Trainer, load_config  # rlp before torch: see rlp/process/machine.py
from rlp.config import Config, ConfigError

# isort: split
from documents import write_documents
from layout import ARMS, CALIBRATED, COLD, LAYOUT, REFERENCE, SCALES, TRAINED, WARM, Scale
from panels import (
    PANELS,
    Reading,
    figures,
    gate_in_words,
    no_think_of,
    panel_config,
    read_model,
)
from prepare import prepare
from report import write_report
from transformers import AutoTokenizer

from rlp.compare.arms import write_arm
from rlp.compare.mixed_sft import MixedSft, iterate
from rlp.compare.splice import Splicing, splice
from rlp.data.errors import DataError
from rlp.measure.results_file import Results, add_result, read_results
from rlp.process.environment import environment
from rlp.process.exit_codes import BAD_CONFIG, BAD_DATA, DONE
from rlp.process.files import append, make_folder
from rlp.process.json_files import DamagedFileError, read_json, write_json
from rlp.process.ranks import Ranks, start_ranks
from rlp.process.run_folder import open_run_folder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "configs"
MARKERS = ("<think>", "</think>")
ROUNDS = 3
"""Of mixed SFT."""
LM_STEPS = ("optim.batch_size=1",)
"""Of arms without thoughts: a step small enough to end within 1 % of RLP's FLOPs."""
POINT = "results.torn_line"
UNTRAINED = dict.fromkeys(("flops", "seconds", "steps"), 0.0)


class UnfinishedError(Exception):
    """A stage was stopped, or one before it is lacking."""


@dataclass(frozen=True)
class Experiment:
    """Where everything is, and how large."""

    out: Path
    scale: Scale
    gsm8k: str
    source: Path | None
    """A GGUF file in place of the package's."""
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    anyway: bool
    """Whether arms are run where the gate fails."""
    overrides: tuple[str, ...]
    """Of the configs of all runs and readings."""
    machine: str
    ranks: Ranks

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def start(self) -> Path:
        """What the arms start from."""
        return self.out / "calibrated" / "export"

    def run_of(self, arm: str, seed: int) -> Path:
        """The run whose export is the arm's model."""
        last = f"rounds/round_{ROUNDS}" if arm == "mixed_sft" else "."
        return self.out / "arms" / arm / f"seed_{seed}" / last / "run"

    def read_results(self) -> Results:
        return read_results(self.results, LAYOUT)

    def overrides_of(self, run: Path, *more: str) -> list[str]:
        return [*more, *self.overrides, f"run.dir={run}", "run.resume=auto"]

    def data(self, *names: str) -> str:
        """Files of documents, as `data.train`."""
        return (
            f"data.train=[{','.join(str(self.out / 'data' / f'{name}.jsonl') for name in names)}]"
        )

    @contextmanager
    def cost(self, stage: str, **what: object) -> Iterator[None]:
        """Write what a stage costs to costs.jsonl when it ends, also where it is interrupted."""
        began, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            line = {
                "stage": stage,
                **what,
                "machine": self.machine,
                "wall_s": round(time.perf_counter() - began, 1),
                "cpu_s": round(time.process_time() - cpu, 1),
            }
            append(self.out / "costs.jsonl", (json.dumps(line) + "\n").encode(), point=POINT)


# The stages


def stage_prepare(this: Experiment) -> None:
    with this.cost("prepare"):
        prepare(this.out / "model", this.source)


def stage_documents(this: Experiment) -> None:
    if not (this.out / "model").is_dir():
        raise UnfinishedError(f"documents are cut as {this.out / 'model'} does: run all stages.")
    with this.cost("documents"):
        encode = AutoTokenizer.from_pretrained(this.out / "model").encode
        counts = write_documents(this.gsm8k, this.out / "data", MARKERS, encode)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))


def stage_warm(this: Experiment) -> None:
    config = load_config(
        CONFIGS / "smollm2_warm.yaml",
        this.overrides_of(
            this.out / "warm",
            f"model.path={this.out / 'model'}",
            this.data("warm_thoughts", "warm_plain"),
            *this.scale.warm,
        ),
    )
    train(this, config, "warm", needs=this.out / "model")


def stage_calibrate(this: Experiment) -> None:
    config = load_config(
        CONFIGS / "smollm2_calibrate.yaml",
        this.overrides_of(
            this.out / "calibrated",
            f"model.path={this.out / 'warm' / 'export'}",
            this.data("calibrate"),
            *this.scale.calibrate,
        ),
    )
    train(this, config, "calibrate", needs=this.out / "warm" / "export")


def train(this: Experiment, config: Config, stage: str, *, needs: Path, **what: object) -> None:
    """A run, made or gone on with; nothing where it is whole.

    Raises:
        UnfinishedError: it was asked to stop, or the stage before it is lacking.
    """
    run = Path(config.run.dir)
    if (run / "summary.json").is_file():
        return
    if not needs.is_dir():
        raise UnfinishedError(f"{stage} starts from {needs}, which is not there: run all stages.")
    with this.cost(stage, **what):
        code = Trainer(config, ranks=this.ranks).fit().code
    if code != DONE:
        raise UnfinishedError(f"{run} ended with {code}. The same command goes on with it.")


def stage_gate(this: Experiment) -> None:
    """Read the model as it comes, after the warm start, and after calibration."""
    scale = this.scale
    early, whole = (scale.early_positions, 2), (scale.gate_positions, scale.gate_thoughts)
    for stage, model, size, temperatures in (
        (COLD, this.out / "model", early, (1.0,)),
        (WARM, this.out / "warm" / "export", early, (1.0,)),
        (CALIBRATED, this.start, whole, scale.gate_temperatures[:1]),
        (CALIBRATED, this.start, early, scale.gate_temperatures[1:]),
    ):
        readings = [("results", size, temperature) for temperature in temperatures]
        read(this, model, ("base", 0, stage), readings, UNTRAINED)
    print(gate_of(this)[1])


def gate_of(this: Experiment) -> tuple[bool, str]:
    """Whether the gate passes, and why."""
    found = this.read_results().where(stage=CALIBRATED, panel="results", temperature=1.0).lines
    return gate_in_words(found[0]) if found else (False, "There is no gate yet: run all stages.")


def stage_arms(this: Experiment) -> None:
    """Train each arm on each seed, and read it where thoughts stand in training."""
    passes, said = gate_of(this)
    if not passes and not this.anyway:
        raise UnfinishedError(f"{said} So no arm is run; --anyway runs them all the same.")
    size = (this.scale.arm_positions, 2)
    readings = [("results", size, temperature) for temperature in this.scale.temperatures]
    read_arm(this, "base", 0, readings)
    for seed in this.seeds:
        for arm in this.arms:
            train_arm(this, arm, seed)
            read_arm(this, arm, seed, readings)


def stage_panels(this: Experiment) -> None:
    """Read the model as it comes, and the arms that there are, on other positions and text."""
    names = [name for name in PANELS if name != "results"]
    readings = [(name, (this.scale.text_positions, 1), 1.0) for name in names]
    read(this, this.out / "model", ("base", 0, COLD), readings, UNTRAINED)
    trained = this.read_results().where(stage=TRAINED, panel="results").lines
    for arm, seed in dict.fromkeys((line["arm"], line["seed"]) for line in trained):
        read_arm(this, arm, seed, readings)


def read_arm(this: Experiment, arm: str, seed: int, readings: list[Reading]) -> None:
    """Read an arm; `base` is the start."""
    run = this.run_of(arm, seed)
    model, spent = this.start, UNTRAINED
    if arm != "base":
        model, ledger = run / "export", read_json(run / "ledger.json")
        spent = {name: ledger[name] for name in spent}
    read(this, model, (arm, seed, TRAINED), readings, spent)


def train_arm(this: Experiment, arm: str, seed: int) -> None:
    """Train an arm, or go on with it."""
    overrides = [
        *this.overrides_of(this.run_of(arm, seed)),
        *(f"run.seed={seed}", f"run.arm={arm}"),
    ]
    if arm == "mixed_sft":
        train_rounds(this, seed)
        return
    if arm == REFERENCE:
        starts_from = (f"model.path={this.start}", this.data("train"), *this.scale.rlp)
        config = load_config(CONFIGS / "smollm2_rlp.yaml", [*starts_from, *overrides])
    else:
        config = matched(this, arm, seed, overrides)
    train(this, config, "arms", needs=this.start, arm=arm, seed=seed)


def reference_of(this: Experiment, arm: str, seed: int) -> Path:
    """RLP's finished run of a seed.

    Raises:
        UnfinishedError: it is not finished.
    """
    run = this.run_of(REFERENCE, seed)
    if not (run / "summary.json").is_file():
        raise UnfinishedError(
            f"{arm} spends what {REFERENCE} has spent, and {run} is not finished: run"
            f" {REFERENCE} of seed {seed} first."
        )
    return run


def matched(this: Experiment, arm: str, seed: int, overrides: list[str]) -> Config:
    """The config of an arm that spends what RLP of its seed has spent."""
    reference, folder = reference_of(this, arm, seed), this.run_of(arm, seed).parent
    make_folder(folder, exist_ok=True)
    data = None
    if arm == "cpt_replay":
        data, own = folder / "spliced", load_config(reference / "config.yaml")
        how = Splicing(keep="random", plain_share=0.5)
        if not data.exists():
            with this.cost("splice", arm=arm, seed=seed):
                splice(own, own.budget.steps * own.optim.batch_size, data, this.ranks, how)
    written = folder / "match.yaml"
    written.unlink(missing_ok=True)
    by = ARMS[arm]
    finer = LM_STEPS if by == "flops" else ()
    run = open_run_folder(reference)
    return write_arm(run, arm, by, written, data, [*finer, *overrides])


def train_rounds(this: Experiment, seed: int) -> None:
    """Mixed SFT: thoughts are chosen and learned in turn, for what RLP of the seed has spent."""
    run = this.run_of("mixed_sft", seed)
    if (run / "summary.json").is_file():
        return
    reference = reference_of(this, "mixed_sft", seed)
    own = load_config(reference / "config.yaml")
    asked = MixedSft(
        run=str(reference),
        documents=max(1, own.budget.steps * own.optim.batch_size // (2 * ROUNDS)),
        learning_rate=own.optim.learning_rate,
        rounds=ROUNDS,
        by=ARMS["mixed_sft"],
        overrides=LM_STEPS,
    )
    with this.cost("arms", arm="mixed_sft", seed=seed):
        folder = this.run_of("mixed_sft", seed).parents[1]
        code, last = iterate(
            asked, folder, this.ranks, lambda config: Trainer(config, ranks=this.ranks).fit().code
        )
    if code != DONE:
        raise UnfinishedError(f"{last.path} ended with {code}. The same command goes on with it.")


# Readings


def read(
    this: Experiment,
    model: Path,
    whose: tuple[str, int, str],
    readings: list[Reading],
    spent: dict[str, float],
) -> None:
    """Read a model on what results.jsonl has no line of, and add the lines.

    Args:
        whose: arm, seed and stage.
        spent: by the training of the model since the start.
    """
    arm, seed, stage = whose
    identity = {"arm": arm, "seed": seed, "stage": stage}
    there = this.read_results()
    left = [
        reading
        for reading in readings
        if not there.has(**identity, panel=reading[0], temperature=reading[2])
    ]
    if not left:
        return
    if not model.is_dir():
        raise UnfinishedError(f"{model} is to be read and is not there: run all stages.")
    arms_config = CONFIGS / "smollm2_rlp.yaml"
    configs = [
        panel_config(arms_config, model, this.out / "data", reading, this.overrides)
        for reading in left
    ]
    is_arm = stage == TRAINED and arm != "base"
    starts = [start_of(this, reading) if is_arm else None for reading in left]
    with this.cost("read" if stage == TRAINED else "gate", arm=arm, seed=seed, model=stage):
        found = read_model(configs, this.ranks, starts)
    for (panel, size, temperature), (said, seconds) in zip(left, found):
        if stage == TRAINED and arm == "base":
            write_json(start_file(this, panel, size), no_think_of(said), point=POINT)
        line = {
            **identity,
            "panel": panel,
            "temperature": temperature,
            **figures(said),
            **spent,
            "read_s": round(seconds, 1),
            "machine": this.machine,
        }
        add_result(this.results, LAYOUT, line)
        print(
            f"{stage} {arm} {seed}, {panel} at T {temperature:g}: gain {line['gain']:+.3f},"
            f" accuracy {line['accuracy']:.3f} ({line['accuracy_without']:.3f} without a thought)",
            flush=True,
        )


def start_file(this: Experiment, panel: str, size: tuple[int, int]) -> Path:
    return this.out / f"start_{panel}_{size[0]}.json"


def start_of(this: Experiment, reading: Reading) -> list[float]:
    """What the arms' start predicts on a panel without a thought."""
    return read_json(start_file(this, reading[0], reading[1]))


# The command

STAGES: dict[str, Callable[[Experiment], None]] = {
    "prepare": stage_prepare,
    "documents": stage_documents,
    "warm": stage_warm,
    "calibrate": stage_calibrate,
    "gate": stage_gate,
    "arms": stage_arms,
    "panels": stage_panels,
    "report": lambda this: write_report(this.results, this.out / "costs.jsonl"),
}


def tell_machine(out: Path) -> str:
    """This machine in words; what another one has begun in the folder is said, and goes on."""
    here = environment(["here"])
    name = f"{here['cpu']}, {here['cores']} cores, torch {here['packages']['torch']}"
    path = out / "machines.json"
    known = read_json(path) if path.exists() else []
    if known and name not in known:
        print(
            f"{out} was begun on another machine ({'; '.join(known)}) and goes on here"
            f" ({name}): what is there stays, and every line says where it was made. Seconds of"
            " the two are not to be compared."
        )
    if name not in known:
        write_json(path, [*known, name], point=POINT)
    return name


def run_stages(this: Experiment, stages: list[str]) -> None:
    for name in stages:
        print(f"== {name}", flush=True)
        STAGES[name](this)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = options.out.resolve()
    os.chdir(ROOT)
    try:
        make_folder(out, exist_ok=True)
        this = Experiment(
            out=out,
            scale=SCALES[options.scale],
            gsm8k=options.gsm8k,
            source=options.source,
            seeds=tuple(range(options.seeds or SCALES[options.scale].seeds)),
            arms=tuple(options.arms or SCALES[options.scale].arms),
            anyway=options.anyway,
            overrides=tuple(options.override),
            machine=tell_machine(out),
            ranks=start_ranks(),
        )
        run_stages(this, options.stages or list(STAGES))
    except (ConfigError, UnfinishedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIG
    except (DataError, DamagedFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_DATA
    return DONE


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="by default all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "smollm2", metavar="FOLDER")
    parser.add_argument(
        "--gsm8k",
        default="hub:openai/gsm8k@main",
        help="a folder with train.jsonl and test.jsonl, or the data set on the Hub (default)",
    )
    parser.add_argument("--source", type=Path, metavar="FILE", help="another GGUF file of a Llama")
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--seeds", type=int, help="how many, from 0 on")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--anyway", action="store_true", help="run arms where the gate fails")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="for all runs and readings",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
