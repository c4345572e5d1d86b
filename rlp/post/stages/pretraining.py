"""`rlp`, `cpt` and `mixed_sft`: runs of this framework, which resume themselves.

work/run         the run folder; its export is the model of the last step
work/spliced     of the arm cpt_replay: its documents
work/rounds      of mixed_sft: a folder of rounds (`rlp.compare.mixed_sft`)
work/models      exports of checkpoints at `keep_steps`
"""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rlp.compare.arms import KEPT, write_arm
from rlp.compare.mixed_sft import MixedSft, iterate
from rlp.compare.splice import Splicing, splice
from rlp.config import Config, load_config, to_yaml
from rlp.learn.checkpoint import open_checkpoint
from rlp.learn.export import export_checkpoint
from rlp.post.pipeline_config import MixedSftStage, PretrainingStage
from rlp.post.stages.costs import spent_of
from rlp.post.stages.interface import Kept, Made, Spent, StageError, StageStopped, Work
from rlp.process.exit_codes import DONE, NOT_MATCHED, PREEMPTED
from rlp.process.files import make_folder, remove, write_atomically
from rlp.process.json_files import read_json
from rlp.process.run_folder import RunFolder, open_run_folder, saved_steps
from rlp.process.run_logs import read_json_lines
from rlp.process.schemas import WHOLE_LEDGER
from rlp.trainer import Trainer


def pretrain(work: Work) -> Made:
    """Run `rlp` or `cpt` to its end, or go on with the run that is there."""
    settings: PretrainingStage = work.settings
    config = run_config(work)
    run = RunFolder(work.folder / "run")
    if not run.summary_json.exists():
        if settings.ranks > 1:
            _launch(config, settings.ranks, work)
        else:
            _ended(Trainer(config, ranks=work.ranks).fit().code, work)
    spent = spent_of(read_json(run.ledger_json, WHOLE_LEDGER))
    earlier = _earlier_models(work, run, spent.optimizer_steps)
    return Made((*earlier, Kept(spent.optimizer_steps, run.export, spent)), spent)


def run_config(work: Work) -> Config:
    """Of the run; with a match `rlp match` writes it."""
    settings: PretrainingStage = work.settings
    if settings.match is None:
        return _keeping(load_config(settings.config, own_overrides(work)), settings)

    out = work.folder / "match.yaml"
    remove(out)  # of an interrupted attempt, which was asked the same
    config = write_arm(
        open_run_folder(work.matched),
        settings.arm,
        settings.match.by,
        out,
        _spliced(work) if settings.arm in KEPT else None,
        [*_of_run(work), *settings.overrides],
    )
    return _keeping(config, settings)


def own_overrides(work: Work) -> list[str]:
    """Of a run that has a config of its own."""
    later = [] if work.is_first else ["model.tokenizer=null", "model.init=pretrained"]
    return [
        *_of_run(work),
        f"model.path={json.dumps(work.model)}",
        *later,
        *work.settings.overrides,
    ]


def _of_run(work: Work) -> list[str]:
    return [
        f"run.dir={json.dumps(str(work.folder / 'run'))}",
        f"run.seed={work.seed}",
        "run.resume=auto",
    ]


def _keeping(config: Config, settings: PretrainingStage) -> Config:
    """A config that leaves the checkpoints that models are made of."""
    if not settings.keep_steps:
        return config
    every = math.gcd(config.checkpoint.every_n_steps, *settings.keep_steps)
    keep = max(config.checkpoint.keep, settings.keep_steps[-1] // every + 1)
    return replace(config, checkpoint=replace(config.checkpoint, every_n_steps=every, keep=keep))


def _earlier_models(work: Work, run: RunFolder, last: int) -> tuple[Kept, ...]:
    """Exports of the checkpoints at `keep_steps` before the last step."""
    made, saved = [], saved_steps(run.checkpoints)
    lines = {line["step"]: line for line in read_json_lines(run.metrics_jsonl)}
    for step in (step for step in work.settings.keep_steps if step < last):
        if step not in saved:
            raise StageError(
                f"{run.path} has no checkpoint of step {step}, which keep_steps asks for. Write"
                " other keep_steps, or remove the folder of the stage to have it made again."
            )
        place = work.models / f"step_{step}"
        if not place.exists():
            make_folder(place.parent, exist_ok=True)
            export_checkpoint(open_checkpoint(saved[step]), place)
        spent = Spent(
            optimizer_steps=step,
            input_tokens=lines[step]["budget/tokens"],
            flops=lines[step]["budget/flops"],
        )
        made.append(Kept(step, place, spent))
    return tuple(made)


def _spliced(work: Work) -> Path:
    """Documents of which some hold a thought, whatever that is worth."""
    data = work.folder / "spliced"
    if not data.exists():
        own = load_config(work.matched / "config.yaml")
        how = Splicing(keep="random", plain_share=work.settings.plain_share)
        splice(own, work.settings.documents, data, work.ranks, how)
    return data


def _ended(code: int, work: Work) -> int:
    """
    Raises:
        StageStopped, StageError: it did not come to its end.
    """
    if code == PREEMPTED:
        raise StageStopped(f"{work.folder / 'run'} was asked to stop, and has saved.")
    if code == NOT_MATCHED:
        raise StageError(
            "the run did not spend what it is matched with, to 1 %. Write smaller steps"
            " (optim.batch_size)"
        )
    if code != DONE:
        raise StageError(f"the run ended with exit code {code}")
    return code


# Ranks


def _launch(config: Config, ranks: int, work: Work) -> None:
    """Run the config as so many ranks of this machine, by the launcher of DeepSpeed."""
    path = work.folder / "run.yaml"
    write_atomically(path, to_yaml(config).encode(), point="pipeline.torn_config")
    apart = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)),
        *("--master_port", str(_free_port()), "--module", "rlp.train", str(path)),
    ]
    sys.stdout.flush()
    launcher = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stdout,
        stderr=sys.stderr,
        preexec_fn=end_with_parent,
    )
    _ended(launcher.wait(), work)


def _free_port() -> int:
    """Where the ranks meet: stages side by side meet at different ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the system to send this process a signal when the one that started it ends, however that
    ends; called by the child."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))


# Mixed SFT


def mix(work: Work) -> Made:
    """Rounds of mixed SFT, a model after each."""
    settings: MixedSftStage = work.settings
    asked = MixedSft(
        run=str(work.matched),
        documents=settings.documents,
        learning_rate=settings.learning_rate,
        rounds=settings.rounds,
        loss=settings.loss,
        by=settings.match.by,
        overrides=tuple(settings.overrides),
    )
    rounds = work.folder / "rounds"
    code, _ = iterate(
        asked, rounds, work.ranks, lambda config: Trainer(config, ranks=work.ranks).fit().code
    )
    _ended(code, work)

    kept, steps = [], 0
    for number in range(1, settings.rounds + 1):
        run = RunFolder(rounds / f"round_{number}" / "run")
        # A ledger carries the cost of the rounds before, and counts its own steps.
        spent = spent_of(read_json(run.ledger_json, WHOLE_LEDGER))
        steps += spent.optimizer_steps
        kept.append(Kept(steps, run.export, replace(spent, optimizer_steps=steps)))
    return Made(tuple(kept), kept[-1].spent)


def last_run(settings: PretrainingStage | MixedSftStage, folder: Path) -> Path:
    """The run folder of a finished stage, whose ledger counts all of it."""
    if isinstance(settings, MixedSftStage):
        return folder / "rounds" / f"round_{settings.rounds}" / "run"
    return folder / "run"
