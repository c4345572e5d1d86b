"""What a run is made of once it is open, and how far it has come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from safetensors import SafetensorError

from rlp.config import Config
from rlp.learn.checkpoint import newest_name
from rlp.measure.journal import Journal
from rlp.measure.metrics_log import MetricsLog
from rlp.measure.monitor import Watch
from rlp.process.console import say_line
from rlp.process.files import NotWrittenError
from rlp.process.json_files import DamagedFileError
from rlp.process.lock import RunLock
from rlp.process.preemption import Preemption
from rlp.process.progress import Pace, Progress, WallTime
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder
from rlp.process.watchdog import Watchdog
from rlp.run.checks import Opened
from rlp.step.judge import Judge
from rlp.step.parts import StepParts

T = TypeVar("T")


@dataclass(slots=True)
class Progression:
    """How far a run has come. A step in the making is the next one, and changes nothing here."""

    data: dict
    """The state of the stream of documents after the last step that was made."""
    step: int = 0
    """Optimizer steps made: the one step counter."""
    seconds: float = 0.0
    """That they took, in all lives of the run."""
    is_saved: bool = False
    """Whether a checkpoint of this life holds all of them."""
    disposable: bool = True
    """Whether nothing was made in this life that somebody would miss."""
    changes: list[dict] = field(default_factory=list)
    """Settings that the run was continued with otherwise."""


@dataclass(frozen=True, slots=True)
class Host:
    """The process that a run lives in: its ranks, who stops and who watches it, and its lock."""

    ranks: Ranks
    preemption: Preemption
    watchdog: Watchdog
    lock: RunLock

    @classmethod
    def unwatched(cls, config: Config, ranks: Ranks, watchdog: Watchdog | None = None) -> "Host":
        """A process that nobody stops or watches: for who makes the steps of a run by hand."""
        watchdog = watchdog or Watchdog(ranks, config.run)
        return cls(ranks, Preemption(ranks), watchdog, RunLock(ranks))

    def say(self, text: str) -> None:
        """A line from the first rank, also before there is a log."""
        if self.ranks.is_first:
            say_line(text)

    def progress(self, what: str, total: int | None, unit: str) -> Progress:
        """A `Progress` that the first rank tells."""
        return Progress(
            what,
            total,
            unit,
            shown=self.ranks.is_first,
            say=self.say,
            on_advance=self.watchdog.mark,
        )

    def on_first_rank(self, folder: RunFolder, act: Callable[[], T], words: str) -> T:
        """What the first rank reads or changes in the run folder, on every rank. A collective.

        Raises:
            NotWrittenError, DamagedFileError: on every rank, where the first one could not.
        """
        answer, failure = None, None
        if self.ranks.is_first:
            try:
                answer = act()
            except DamagedFileError as error:
                failure = error
            except (OSError, SafetensorError) as error:
                failure = NotWrittenError(
                    f"{folder.path}: {words}: {error}. Make room there, and continue with"
                    " run.resume=auto."
                )
        answer, failure = self.ranks.broadcast((answer, failure))
        if failure is not None:
            raise failure
        return answer

    def where_to_go_on(self, folder: RunFolder) -> str:
        """The newest checkpoint, in words. A collective."""
        newest = newest_name(folder.checkpoints) if self.ranks.is_first else None
        newest = self.ranks.broadcast(newest)
        if newest:
            return f"The newest sound checkpoint is {newest}."
        return f"There is no checkpoint in {folder.checkpoints} yet."


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that is open: every part of it is there, and whole."""

    config: Config
    host: Host
    opened: Opened
    folder: RunFolder
    dtype: torch.dtype
    parts: StepParts
    judge: Judge
    log: MetricsLog
    journal: Journal
    state: Progression
    checksums: dict[str, str]
    """Of all that the config names and numbers depend on."""
    start_logprob: list[float] = field(default_factory=list)
    """No-think log-probabilities of the starting checkpoint on the panel; empty until measured."""
    watch: Watch = field(default_factory=Watch)
    """Looks for what goes wrong over several steps."""
    wall: WallTime = field(default_factory=WallTime)
    pace: Pace = field(default_factory=Pace)

    @property
    def ranks(self) -> Ranks:
        """Those of its process."""
        return self.host.ranks
