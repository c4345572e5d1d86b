"""What a pipeline will cost, before it runs: steps, FLOPs, seconds and disk of every stage, as far
as they are known.

Of `rlp` and `cpt` the plan of the run says it (`rlp.measure.plan`), an upper bound; what is matched
spends what it is matched with; of `sft`, `spectrum`, `redi`, `rlvr` and `generate` it is that of
the longest rows, at the speed of this machine (`rlp.post.pipeline_time`). Where such a stage is
finished on one seed, what it took stands for the others. What is not known is `unknown`, and a sum
with it says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError, ModelConfig
from rlp.model.loading import read_model_config
from rlp.model.shapes import ModelShapes, model_shapes
from rlp.post.diversity_samples import read_prompts
from rlp.post.pipeline_checks import planned_config
from rlp.post.pipeline_config import (
    GenerateStage,
    MixedSftStage,
    Pipeline,
    PretrainingStage,
    RowsStage,
    TrlStage,
    fill,
    places,
)
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_tasks import Task, matched
from rlp.post.pipeline_time import StageWork, work_of
from rlp.post.stages.rows import read_rows
from rlp.process.console import format_bytes, format_duration
from rlp.process.files import folder_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlp.measure.machines import Speed
    from rlp.process.ranks import Ranks

BYTES_OF_A_MODEL, BYTES_OF_A_CHECKPOINT = 4, 12
"""For each parameter: float32 weights; and with both moments of AdamW."""
CHECKPOINTS = 3
"""Two that are kept, and the one being written."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a stage. None: unknown."""

    steps: int | None = None
    flops: float | None = None
    seconds: float | None = None
    """Without the readings of its models, unless it was measured."""
    disk_bytes: int | None = None
    is_measured: bool = False
    """Taken from such a stage that is finished."""


class Costs:
    """The costs of the tasks of a pipeline."""

    def __init__(self, tasks: list[Task], pipeline: Pipeline, ranks: "Ranks") -> None:
        self._tasks, self._pipeline, self._ranks = tasks, pipeline, ranks
        self._planned: dict[tuple[str, ...], Cost] = {}

    def of(self, task: Task) -> Cost:
        """What a task costs; planned once for all seeds."""
        if task.chain not in self._planned:
            self._planned[task.chain] = self._measured(task) or self._plan(task)
        return self._planned[task.chain]

    def _measured(self, task: Task) -> Cost | None:
        for other in self._tasks:
            folder = TaskFolder(other.folder(self._pipeline))
            if other.chain == task.chain and folder.is_finished:
                spent = folder.ledger()
                size = folder_bytes(folder.path)
                return Cost(spent.optimizer_steps, spent.flops, folder.wall_s(), size, True)
        return None

    def _plan(self, task: Task) -> Cost:
        if not task.chain:
            return Cost(0, 0.0, None, 0)
        settings = task.settings(self._pipeline)
        match = matched(settings)
        if match is not None:
            like = self.of(task.reference(self._pipeline))
            rounds = settings.rounds if isinstance(settings, MixedSftStage) else 1
            return Cost(
                flops=like.flops if match.by == "flops" else None,
                seconds=like.seconds if match.by == "seconds" else None,
                disk_bytes=None if like.disk_bytes is None else rounds * like.disk_bytes,
            )
        if isinstance(settings, PretrainingStage):
            return self._plan_run(task, settings)
        if isinstance(settings, TrlStage):
            return self._plan_trl(fill(settings, {"seed": task.seed}))
        if isinstance(settings, GenerateStage):
            return self._plan_generation(fill(settings, {"seed": task.seed}))
        return Cost()

    def _plan_run(self, task: Task, settings: PretrainingStage) -> Cost:
        from rlp.run.checks import Opened, plan_here, run_dtype, speed_here

        config = planned_config(task, self._pipeline)
        if places(config.data.train):
            return Cost(steps=config.budget.steps)  # a stage before it makes the data
        ranks = replace(self._ranks, world_size=settings.ranks)
        opened = Opened(config, settings.ranks, 0, warn=lambda text: None)
        shapes = opened.setup.shapes
        dtype = run_dtype(config, shapes.width, self._ranks)
        speed = speed_here(config, shapes, self._ranks, dtype[0])
        plan = plan_here(config, opened, ranks, dtype, speed)
        known = plan.steps is not None
        timed = known and plan.time is not None and plan.evaluations is not None
        kept = len(settings.keep_steps) * (plan.checkpoint_bytes + plan.export_bytes)
        return Cost(
            steps=plan.steps,
            flops=plan.steps * plan.step_flops if known and not plan.counted_without else None,
            seconds=plan.time.run_seconds(plan.steps, plan.evaluations) if timed else plan.seconds,
            disk_bytes=plan.disk_bytes + kept,
        )

    def _plan_trl(self, settings: TrlStage) -> Cost:
        models = len(settings.steps_named()) * BYTES_OF_A_MODEL
        size = self._shapes.parameters * (models + CHECKPOINTS * BYTES_OF_A_CHECKPOINT)
        cost = Cost(steps=settings.steps, disk_bytes=size)
        tokens = self._row_tokens(settings)
        return (
            cost if tokens is None else self._worked(cost, work_of(settings, self._shapes, tokens))
        )

    def _plan_generation(self, settings: GenerateStage) -> Cost:
        if not settings.num_own:
            return Cost(steps=0, flops=0.0, seconds=0.0)
        prompts = read_prompts(Path(settings.prompts))
        tokens = max(self._tokens_of(prompt.text) for prompt in prompts)
        return self._worked(Cost(steps=0), work_of(settings, self._shapes, tokens, len(prompts)))

    def _worked(self, cost: Cost, work: StageWork | None) -> Cost:
        """With FLOPs and seconds, where the work is known, and the FLOPs of all layers are."""
        if work is None or self._shapes.uncounted:
            return cost
        return replace(cost, flops=work.flops, seconds=work.seconds(self._shapes, self._speed))

    def _row_tokens(self, settings: TrlStage) -> int | None:
        """Tokens of the longest row, or prompt; None where the rows are not there yet."""
        if isinstance(settings, RowsStage):
            return settings.max_tokens
        try:
            rows = read_rows(settings)
        except (ConfigError, ValueError):
            return None  # another stage makes them
        return max(self._tokens_of(row["prompt"]) for row in rows)

    def _tokens_of(self, text: str) -> int:
        return len(self._tokenizer(text).input_ids)

    # Of the first seed's start: those of the others have the same architecture

    @cached_property
    def _model(self) -> str:
        return fill(self._pipeline.model, {"seed": self._pipeline.seeds[0]})

    @cached_property
    def _shapes(self) -> ModelShapes:
        return model_shapes(read_model_config(ModelConfig(path=self._model)))

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._model)

    @cached_property
    def _speed(self) -> "Speed":
        """Of this process's device."""
        import torch

        from rlp.measure.speed_here import measure_speed

        folder = Path(self._pipeline.dir)
        return measure_speed(self._shapes, torch.float32, self._ranks.device, folder)


def render(tasks: list[Task], done: set[Task], pipeline: Pipeline, costs: Costs) -> str:
    """All stages, what each costs on a seed, and what is left in all."""
    rows = [("stage", "seeds left", "steps", "FLOPs", "time", "disk", "")]
    for chain in dict.fromkeys(task.chain for task in tasks):
        here = [task for task in tasks if task.chain == chain]
        cost, left = costs.of(here[0]), sum(task not in done for task in here)
        rows.append(
            (
                "+".join(chain) or "start (read only)",
                f"{left} of {len(here)}",
                _shown(cost.steps, "{:,}".format),
                _shown(cost.flops, "{:.3e}".format),
                _shown(cost.seconds, format_duration),
                _shown(cost.disk_bytes, format_bytes),
                "measured" if cost.is_measured else "",
            )
        )
    left = [costs.of(task) for task in tasks if task not in done]
    rows.append(
        (
            "left, all seeds",
            str(len(left)),
            "",
            _sum([cost.flops for cost in left], "{:.3e}".format),
            _sum([cost.seconds for cost in left], format_duration),
            _sum([cost.disk_bytes for cost in left], format_bytes),
            "",
        )
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    evaluation = pipeline.evaluation
    if evaluation.is_asked_for:
        lines.append(
            f"Models are read at T {', '.join(f'{value:g}' for value in evaluation.temperatures)};"
            " the time of that is in what was measured, and nowhere else."
        )
    return "\n".join(lines)


def _shown(value: float | None, words: Callable[[float], str]) -> str:
    return "unknown" if value is None else words(value)


def _sum(values: list[float | None], words: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "unknown" if values else words(0)
    unknown = len(values) - len(known)
    return words(sum(known)) + (f" + {unknown} unknown" if unknown else "")
