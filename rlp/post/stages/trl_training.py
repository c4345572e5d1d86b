"""What `sft`, `spectrum`, `redi` and `rlvr` have in common: a trainer of TRL that can be killed
at any moment.

    work/checkpoints/checkpoint-N    TRL's own, whole once `ledger.json` is in it
    work/models/step_N               models that are kept, with their `ledger.json`

The ledger is the one of a run (`rlp.measure.ledger`): closed steps, and what they cost. Started
again, training goes on from the newest whole checkpoint, and gives the same weights as one that
was never interrupted: weights, moments, the order of the rows and the state of the random numbers
are in the checkpoint.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError
from rlp.measure.ledger import Ledger
from rlp.model.loading import read_model_config
from rlp.model.shapes import model_shapes
from rlp.post.pipeline_config import TrlStage
from rlp.post.stages.costs import spent_of
from rlp.post.stages.interface import Kept, Made, StageStopped, Work
from rlp.process.faults import fault
from rlp.process.files import make_folder, new_folder, read_bytes, remove, sync, write_new
from rlp.process.json_files import read_json, write_json
from rlp.process.preemption import Preemption
from rlp.process.schemas import PLAIN, Fields, Table

if TYPE_CHECKING:
    from transformers import Trainer

_LEDGER = Fields({"state": Table(PLAIN)})

QUIET = {
    "report_to": [],
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1000,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
}


def require_trl() -> None:
    """
    Raises:
        ConfigError: it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise ConfigError(
            "the stages sft, spectrum, redi and rlvr are TRL's trainers, and trl is not installed."
            " Write pip install 'rlp-pretraining[post]' -c constraints.txt."
        )


def trl_arguments(work: Work, settings: TrlStage) -> dict:
    """What all trainers are given."""
    return {
        "output_dir": str(work.folder / "checkpoints"),
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "seed": work.seed,
        "use_cpu": work.ranks.device.type == "cpu",
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 2,
        **QUIET,
    }


class Account:
    """The ledger of a stage, and the models that it keeps."""

    def __init__(self, work: Work, log: str = "") -> None:
        """
        Args:
            log: a file that the trainer writes into the folder behind its last step; what has been
                done is not complete without it.
        """
        settings: TrlStage = work.settings
        self._log = log
        self.resumed = 0
        """The step from which training goes on."""
        self.work, self.steps = work, settings.steps_named()
        config = _model_config(work.model)
        self.ledger = Ledger(model_shapes(config))
        self._timing = None

    # What a trainer tells

    def begin_step(self) -> None:
        """An optimizer step begins; its seconds belong to the update, but for what is timed in
        it."""
        self._timing = self.ledger.time("train")
        self._timing.__enter__()

    def end_step(self, step: int, save: Callable[[Path], None]) -> None:
        """It is made; the model is kept where that is asked for."""
        self._timing.__exit__(None, None, None)
        self.ledger.close_step(self.work.ranks)
        if step in self.steps:
            place = self.work.models / f"step_{step}"
            make_folder(place.parent, exist_ok=True)
            with new_folder(place, point="stage.before_model") as new:
                save(new)
                self._say_how_it_thinks(new)
                self.write(new)
        fault("stage.after_step")

    def _say_how_it_thinks(self, folder: Path) -> None:
        """Markers, temperature and budget of thoughts stay those of the model that the stage began
        with."""
        told = Path(self.work.model) / "thought_format.json"
        if told.is_file():
            write_new(folder / told.name, read_bytes(told), point="stage.torn_format")

    def write(self, folder: Path) -> None:
        """Add the ledger to a folder, whose files are on disk before it."""
        for path in sorted(folder.rglob("*")):
            sync(path)
        told = {"state": self.ledger.state()}
        write_json(folder / "ledger.json", told, point="stage.torn_checkpoint")

    # Going on

    def newest_checkpoint(self) -> Path | None:
        """The newest whole one, whose ledger is taken over; torn ones, and models of later steps,
        are removed."""
        checkpoints = _by_step(self.work.folder / "checkpoints", "checkpoint-")
        for step, path in reversed(checkpoints.items()):
            if not (path / "ledger.json").is_file():
                remove(path)
                continue
            self.ledger.load_state(_state(path))
            self._forget_models(behind=step)
            self.resumed = step
            return path
        self._forget_models(behind=0)
        return None

    def _forget_models(self, behind: int) -> None:
        for step, path in _by_step(self.work.models, "step_").items():
            if step > behind:
                remove(path)

    def is_complete(self) -> bool:
        """Whether all models are there, and the log."""
        has_log = not self._log or (self.work.folder / self._log).is_file()
        return has_log and list(_by_step(self.work.models, "step_")) == self.steps

    def made(self) -> Made:
        """The models that are there, and what they have cost."""
        kept = []
        for step, path in _by_step(self.work.models, "step_").items():
            ledger = Ledger(self.ledger.shapes)
            ledger.load_state(_state(path))
            kept.append(Kept(step, path, spent_of(ledger.to_json())))
        return Made(tuple(kept), kept[-1].spent)


def train(account: Account, make: Callable[[], "Trainer"]) -> Made:
    """Train to the end of the budget, from where an interrupted attempt has left off.

    Raises:
        StageStopped: somebody has asked it to stop; there is a checkpoint of the step it was in.
    """
    if not account.is_complete():
        checkpoint = account.newest_checkpoint()
        trainer = make()
        with Preemption(account.work.ranks) as preemption:
            trainer.add_callback(_callback(account, trainer, preemption))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not account.is_complete():
            raise StageStopped(
                f"{account.work.folder} was asked to stop ({preemption.reason}), and has saved step"
                f" {trainer.state.global_step}."
            )
    remove(account.work.folder / "checkpoints")
    return account.made()


def _callback(account: Account, trainer: "Trainer", preemption: Preemption) -> object:
    """Tells the account of every step, makes checkpoints whole, and ends at a step where somebody
    has asked for that."""
    from transformers import TrainerCallback

    def save(place: Path) -> None:
        trainer.model.save_pretrained(place)
        trainer.processing_class.save_pretrained(place)

    class Tell(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
            account.begin_step()

        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            account.end_step(state.global_step, save)
            if preemption.requested:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: object, state: object, control: object, **_: object) -> None:
            account.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Tell()


def _state(folder: Path) -> dict:
    return read_json(folder / "ledger.json", _LEDGER)["state"]


def _by_step(folder: Path, prefix: str) -> dict[int, Path]:
    """Folders PREFIX-N by N, ascending."""
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [int(found[1]) for name in names if (found := re.fullmatch(rf"{prefix}(\d+)", name))]
    return {step: folder / f"{prefix}{step}" for step in sorted(steps)}


def _model_config(model: str) -> object:
    from rlp.config import ModelConfig

    return read_model_config(ModelConfig(path=model))
