"""What a stage of a pipeline is given, and what it gives back.

A stage of one's own is a function `stage(work: Work) -> Made`, named in the YAML as
`package.module:name`. It writes into `work.folder` only. Killed and started again it is called
again with the same folder, and goes on with what it finds there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.post.pipeline_config import StageConfig

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks


class StageError(Exception):
    """A stage could not come to its end. The message says what to do."""


class StageStopped(Exception):
    """Somebody has asked a stage to stop; it has saved, and goes on when it is started again."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage is to do."""

    settings: StageConfig
    """As the YAML has them, with `{seed}` and the folders of other stages filled in."""
    seed: int
    model: str
    """Folder, or Hub name, of the model that it begins with."""
    folder: Path
    """Where it writes, and finds what an interrupted attempt has left."""
    ranks: "Ranks"
    is_first: bool = True
    """Whether no stage stands before it: its model is the one that the YAML names."""
    matched: Path | None = None
    """The run folder of the stage whose cost this one spends (`match`)."""
    tell: Callable[[str], None] = print
    """Adds a line to the log of the stage."""

    @property
    def models(self) -> Path:
        """The folder of the models that are kept, `step_N`."""
        return self.folder / "models"


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stage has cost up to a step of it. None: not known."""

    optimizer_steps: int = 0
    input_tokens: int | None = None
    """Tokens of documents, or of prompts and given answers, that were read."""
    generated_tokens: int | None = None
    scored_tokens: int | None = None
    """Tokens of forwards that only score: targets after thoughts, and baselines."""
    rewarded_tokens: int | None = None
    """Sampled tokens that a reward has moved."""
    flops: float | None = None
    """As the ledger counts them."""
    paper_flops: float | None = None
    """The paper's T_flop, in tokens: input, and every generation at its budget."""
    seconds: float | None = None
    counted_without: tuple[str, ...] = ()
    """What the FLOPs leave out (`ModelShapes.uncounted`)."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A model that a stage has kept."""

    step: int
    """Optimizer steps of the stage; 0 where none is made."""
    path: Path
    """In the stage's folder."""
    spent: Spent
    """By the stage so far."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a stage has made."""

    kept: tuple[Kept, ...] = ()
    """In the order of their steps; the last is the stage's own. None at all: the stage makes data,
    and its model is the one that it was given."""
    spent: Spent = field(default_factory=Spent)
    """By the whole stage."""


Stage = Callable[[Work], Made]
