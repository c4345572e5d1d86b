"""The YAML of a pipeline: stages, arms, seeds, and what every model is read by.

    dir: runs/pipeline
    seeds: [0, 1]
    model: worlds/{seed}/base
    stages:
      rlp: {kind: rlp, config: "worlds/{seed}/quickstart.yaml"}
      sft: {kind: sft, data: ["data/{seed}/sft.jsonl"], steps: 64, learning_rate: 3e-5}
    arms:
      rlp: [rlp, sft]
      base: [sft]
    evaluation: {temperatures: [1.0, 0.3], panel: {config: "worlds/{seed}/quickstart.yaml"}}

Read strictly, as the config of a run is. `{seed}` stands for the seed in every text; `{NAME}`, NAME
a stage that stands before in the arm, for the folder of that stage.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rlp.compare.arms import ARMS, KEPT
from rlp.compare.budget import AMOUNTS
from rlp.config import (
    ConfigError,
    first_line,
    read_yaml,
    refuse_mappings_for_lists,
    require,
    require_one_of,
    require_part,
)
from rlp.post.spectrum_rows import RowFormat

_NAME = r"[A-Za-z][A-Za-z0-9_-]*"

_PLACE = re.compile(rf"\{{({_NAME})\}}")
"""What is filled in."""


@dataclass
class Match:
    """Another stage whose cost a stage spends: the one of that name that begins with the same
    model, on the same seed."""

    stage: str = "???"
    by: str = "flops"
    """In `rlp.compare.budget.AMOUNTS`."""
    arm: str = ""
    """In `rlp.compare.arms.ARMS`; by default the kind of the stage."""

    def __post_init__(self) -> None:
        require_one_of("match.by", self.by, tuple(AMOUNTS))
        require_one_of("match.arm", self.arm or "cpt", tuple(ARMS))


@dataclass
class StageConfig:
    """What all stages have."""

    kind: str = "???"
    keep_steps: list[int] = field(default_factory=list)
    """Steps at which the model is kept and read, beside its last."""
    hand_on: int | None = None
    """The step, one of `keep_steps`, whose model the next stage begins with; None: the last."""

    def __post_init__(self) -> None:
        steps = self.keep_steps
        require(
            all(step >= 1 for step in steps) and steps == sorted(set(steps)),
            "keep_steps",
            steps,
            "must be steps from 1 on, ascending",
        )
        require(
            self.hand_on is None or self.hand_on in self.steps_named(),
            "hand_on",
            self.hand_on,
            f"must be one of keep_steps, {self.steps_named()}",
        )

    def steps_named(self) -> list[int]:
        """Steps that are known to be kept."""
        return self.keep_steps

    def sources(self) -> list[str]:
        """Files, and globs, whose content is among its inputs."""
        return []


@dataclass
class PretrainingStage(StageConfig):
    """`rlp` and `cpt`: a run of `rlp train`."""

    config: str | None = None
    """The YAML of the run; None with `match`, which writes it."""
    overrides: list[str] = field(default_factory=list)
    """`section.key=value`."""
    match: Match | None = None
    ranks: int = 1
    """Above 1 it runs under the deepspeed launcher."""
    documents: int = 0
    """Of the arm cpt_replay: documents that thoughts are spliced into."""
    plain_share: float = 0.5
    """Of it: the part of its documents that holds none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.config is None) != (self.match is None),
            "config",
            self.config,
            "or match has to be there, and not both",
        )
        require(self.ranks >= 1, "ranks", self.ranks, "must be at least 1")
        needs = self.match is not None and self.arm in KEPT
        require(
            needs == (self.documents > 0),
            "documents",
            self.documents,
            f"must be above 0 for the arm {' or '.join(KEPT)} of a match, and is for no other",
        )

    @property
    def arm(self) -> str:
        """Of the match."""
        return self.match.arm or self.kind


@dataclass
class MixedSftStage(StageConfig):
    """`mixed_sft`: rounds of splicing and training (`rlp mixed-sft`)."""

    match: Match = field(default_factory=Match)
    documents: int = 0
    """That each round thinks about."""
    rounds: int = 3
    learning_rate: float = 0.0
    loss: str = "thought_and_target"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.keep_steps, "keep_steps", self.keep_steps, "must be left out: its rounds")
        require(self.documents >= 1, "documents", self.documents, "must be at least 1")
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")


@dataclass
class TrlStage(StageConfig):
    """What the stages of TRL's trainers have in common: AdamW at a constant rate, in float32 on a
    CPU."""

    data: list[str] = field(default_factory=list)
    """Files of rows: .jsonl, .parquet or .csv, or a glob."""
    steps: int = 0
    batch_size: int = 8
    """Rows, or prompts, a step."""
    learning_rate: float = 0.0
    checkpoint_every: int = 50
    """Steps; what is lost at most when it is killed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.data), "data", self.data, "must name the files of the rows")
        for name in ("steps", "batch_size", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be above 0")
        last = max(self.keep_steps, default=0)
        require(last <= self.steps, "keep_steps", self.keep_steps, f"ends at {self.steps} steps")

    def steps_named(self) -> list[int]:
        return sorted({*self.keep_steps, self.steps})

    def sources(self) -> list[str]:
        return self.data


@dataclass
class RowsStage(TrlStage):
    """What those of them have in common that sample nothing, but read whole rows."""

    max_tokens: int = 1024
    """Of a row, or of a prompt with its trace: it is cut behind so many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_tokens >= 2, "max_tokens", self.max_tokens, "must be at least 2")


@dataclass
class SftStage(RowsStage):
    """`sft`: supervised fine-tuning by TRL, on rows {"text"} or {"prompt", "completion"}."""


@dataclass
class SpectrumStage(RowsStage):
    """`spectrum`: Spectrum tuning (arXiv 2510.06084), on rows {"description", "pairs"}; no row is
    read twice, and of pairs that do not fit into `max_tokens`, whole ones are left out."""

    drop: float = 0.2
    """The probability that a row is without its description, and without a loss on its first
    output. With 0 and rows of one pair it is SFT on one draw at a time."""
    format: RowFormat = field(default_factory=RowFormat)
    """Texts around description, inputs and outputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.drop < 1, "drop", self.drop, "must be from 0 on, below 1")


@dataclass
class RediStage(RowsStage):
    """`redi`: training on pairs, rows {"prompt", "chosen", "rejected"} of a right and a wrong
    trace."""

    loss: str = "redi"
    """`redi` (`rlp.post.redi.redi_loss`), or by TRL `dpo` or `simpo`."""
    alpha: float = 0.8
    """Weight of the wrong traces in `redi`: 0 is SFT on the right ones, 1 symmetric."""
    negative: str = "all"
    """Which tokens of a wrong trace `redi` pushes down: `all`, the `first_wrong` alone (that which
    the row's `first_wrong` names, or where it departs from the right trace), or those behind it,
    `after_wrong`."""
    beta: float = 0.1
    """Of `dpo` and `simpo`; SimPO's paper has 2."""
    margin: float = 0.5
    """Of `simpo`: gamma / beta, in nats a token."""
    drop: float = 0.1
    """Nats a token that the right traces may lose in `redi` before it is a collapse."""
    stop_on_collapse: bool = True
    """Whether a collapse ends the stage, as failed; else the log tells of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of("loss", self.loss, ("redi", "dpo", "simpo"))
        require_one_of("negative", self.negative, ("all", "first_wrong", "after_wrong"))
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "is a weight from 0 to 1")
        for name in ("beta", "drop"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(self.margin >= 0, "margin", self.margin, "must be at least 0")


@dataclass
class RlvrStage(TrlStage):
    """`rlvr`: RL from verifiable rewards by TRL's GRPO, on rows {"prompt", ...}."""

    generations: int = 8
    """Completions of a prompt."""
    max_completion_tokens: int = 256
    temperature: float = 1.0
    reward: str = "exact_match"
    """`exact_match`, or `package.module:function` (`rlp.post.stages.rlvr`)."""
    answer_field: str = "answer"
    """Of a row, what `exact_match` compares with."""
    after: str = "</think>"
    """Text behind which `exact_match` looks; where a completion has none of it, it is wrong. Empty:
    all of the completion."""
    pattern: str = r"\s*(\S+)"
    """What is there; its first group is compared. By default the first word."""
    keep_rollouts: bool = False
    """Whether work/rollouts.jsonl has every completion with its reward, as `rlp traces` reads them;
    right is what has a reward above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.generations >= 2, "generations", self.generations, "must be at least 2")
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(
            self.max_completion_tokens >= 1,
            "max_completion_tokens",
            self.max_completion_tokens,
            "must be at least 1",
        )
        require_part("reward", self.reward, ("exact_match",))
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ConfigError(
                f"pattern: {self.pattern!r} is no regular expression: {error}."
            ) from (error)
        require(groups >= 1, "pattern", self.pattern, "must hold a group")


@dataclass
class GenerateStage(StageConfig):
    """`generate`: documents of the model that the stage begins with, real ones, or both, as
    work/documents.jsonl for the stages behind it. It makes no model."""

    documents: int = 0
    """That it makes at most: a filter may leave fewer."""
    real_share: float = 0.0
    """Part of them that is taken from `data`, from its first row on."""
    data: list[str] = field(default_factory=list)
    """Files of real documents, rows {"text"}."""
    prompts: str = ""
    """A panel (`rlp.post.diversity_samples`) whose prompts own documents begin with, as many with
    each."""
    separator: str = ""
    """Between a prompt and what is drawn behind it."""
    tokens: int = 64
    """That are drawn of a document at most, where its prompt names none."""
    temperature: float = 1.0
    top_p: float = 1.0
    draws: int = 1
    """Own documents that are drawn for each that is wanted, for a filter to choose among."""
    filter: str = ""
    """`package.module:function` (`rlp.post.stages.generation.Filter`); empty: all are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep_steps", "hand_on"):
            value = getattr(self, name)
            require(not value, name, value, "must be left out: it makes no model")
        for name in ("documents", "tokens", "draws"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        share = self.real_share
        require(0 <= share <= 1, "real_share", share, "is a fraction from 0 to 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        for name, given, needed in (
            ("data", bool(self.data), self.num_real > 0),
            ("prompts", bool(self.prompts), self.num_own > 0),
        ):
            why = f"must be {'there' if needed else 'left out'} with real_share {share:g}"
            require(given == needed, name, getattr(self, name), why)
        require(self.draws == 1 or self.filter, "draws", self.draws, "above 1 is for a filter")
        name = self.filter
        require(not name or ":" in name, "filter", name, "must be a package.module:function")

    @property
    def num_real(self) -> int:
        return round(self.real_share * self.documents)

    @property
    def num_own(self) -> int:
        return self.documents - self.num_real

    def sources(self) -> list[str]:
        return [*self.data, *filter(None, [self.prompts])]


@dataclass
class OwnStage(StageConfig):
    """`package.module:function`, a stage of one's own (`rlp.post.stages.interface`)."""

    data: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Whatever it reads."""

    def sources(self) -> list[str]:
        return self.data


KINDS: dict[str, type[StageConfig]] = {
    "cpt": PretrainingStage,
    "rlp": PretrainingStage,
    "mixed_sft": MixedSftStage,
    "sft": SftStage,
    "spectrum": SpectrumStage,
    "redi": RediStage,
    "rlvr": RlvrStage,
    "generate": GenerateStage,
}


@dataclass
class PanelConfig:
    """The held-out panel that every model is read on."""

    config: str = "???"
    """The YAML of a run, for its data, positions and thoughts."""
    overrides: list[str] = field(default_factory=list)
    curve_thoughts: int | None = None
    """Thoughts at a position of models that are not the last of their stage; None: as many."""


@dataclass
class EvaluationConfig:
    """What every model is read by, after every stage and at its `keep_steps`."""

    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.3])
    """Of thoughts and answers."""
    panel: PanelConfig | None = None
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Other evaluations by their names (`rlp.post.evaluations.EVALUATIONS`) or as
    `package.module:function`, and the settings of each."""

    def __post_init__(self) -> None:
        temperatures = self.temperatures
        require(
            bool(temperatures)
            and all(value > 0 for value in temperatures)
            and len(set(temperatures)) == len(temperatures),
            "evaluation.temperatures",
            temperatures,
            "must be one or several different numbers above 0",
        )

    @property
    def is_asked_for(self) -> bool:
        return self.panel is not None or bool(self.others)


@dataclass
class Pipeline:
    """All of it."""

    dir: str = "???"
    seeds: list[int] = field(default_factory=list)
    model: str = "???"
    """What every arm begins with."""
    stages: dict[str, Any] = field(default_factory=dict)
    """By their names; `StageConfig` once they are read."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """By their names, the stages of each, in order."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        seeds = self.seeds
        require(
            bool(seeds) and all(seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds),
            "seeds",
            seeds,
            "must be one or several different whole numbers from 0 on",
        )
        require(bool(self.arms), "arms", self.arms, "must name at least one arm")


def load_pipeline(path: Path) -> Pipeline:
    """Read the YAML of a pipeline.

    Raises:
        ConfigError: an unknown key, a wrong value, a stage that does not exist.
    """
    tree = read_yaml(Path(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold the keys of a pipeline, got {type(tree).__name__}.")
    pipeline = _filled(Pipeline, tree, str(path))
    pipeline.stages = {
        name: _stage(name, content, str(path)) for name, content in pipeline.stages.items()
    }
    for kind, names in (("stages", pipeline.stages), ("arms", pipeline.arms)):
        for name in names:
            _refuse_name(f"{path}: {kind}", name)
    for arm, stages in pipeline.arms.items():
        _refuse_arm(str(path), arm, stages, pipeline.stages)
    return pipeline


def _stage(name: str, content: object, where: str) -> StageConfig:
    place = f"{where}: stages.{name}"
    if not isinstance(content, dict) or "kind" not in content:
        raise ConfigError(
            f"{place} must be a mapping with `kind` and what that needs, got {content!r}. Kinds:"
            f" {', '.join(KINDS)}, or one of yours as package.module:function."
        )
    kind = str(content["kind"])
    try:
        require_part("kind", kind, tuple(KINDS))
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from error
    return _filled(KINDS.get(kind, OwnStage), content, place)


def _filled(section: type, content: dict, where: str) -> Any:
    """A section with the values of a mapping, each of its type."""
    known = [item.name for item in dataclasses.fields(section)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key {name}. {meant}")
    refuse_mappings_for_lists(section, content, f"{where}: ")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(section), content)
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}: {error.full_key} has no value. Write it.") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{where}: {error.__cause__}") from error
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}: {key}{first_line(error)}.") from error


def _refuse_name(where: str, name: str) -> None:
    if not re.fullmatch(_NAME, str(name)) or name in ("seed", "start"):
        raise ConfigError(
            f"{where}: {name!r} can not be a name: it is part of paths. Write letters, digits, _"
            " and -, a letter first, and neither seed nor start."
        )


def _refuse_arm(where: str, arm: str, names: list[str], stages: Mapping[str, StageConfig]) -> None:
    """Refuse an arm of stages that do not exist, or that ask for what is not there yet."""
    place = f"{where}: arms.{arm}"
    for index, name in enumerate(names):
        if name not in stages:
            near = difflib.get_close_matches(name, stages, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{place}: there is no stage {name!r}. {meant}Stages: {', '.join(stages)}."
            )
        if name in names[:index]:
            raise ConfigError(
                f"{place}: {name} stands there twice, and a stage has one folder in an arm. Write"
                " the second one under another name in `stages`."
            )
        for asked in places(stages[name]) - {"seed"}:
            if asked in names[:index]:
                continue
            if asked in names:
                said = f"which comes {'later' if asked != name else 'to be made by it'}"
            elif asked in stages:
                said = "which is no stage of this arm"
            else:
                said = f"and there is no such stage. Stages: {', '.join(stages)}"
            raise ConfigError(
                f"{place}: the stage {name} asks for {{{asked}}}, {said}. It can ask for {{seed}}"
                f" and for the folders of {', '.join(names[:index]) or 'no stage, as the first'}."
            )


def places(value: object) -> set[str]:
    """What is to be filled in a value, at any depth."""
    return {match for text in _texts(value) for match in _PLACE.findall(text)}


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _texts(getattr(value, item.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def fill(value: Any, known: Mapping[str, object]) -> Any:
    """A value with `{NAME}` filled in, at any depth, where NAME is known."""
    if isinstance(value, str):
        return _PLACE.sub(lambda found: str(known.get(found[1], found[0])), value)
    if dataclasses.is_dataclass(value):
        parts = {
            item.name: fill(getattr(value, item.name), known) for item in dataclasses.fields(value)
        }
        return type(value)(**parts)
    if isinstance(value, Mapping):
        return {key: fill(inner, known) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, known) for inner in value]
    return value
