"""What stages that are no run of this program do and take: `sft`, `spectrum`, `redi`, `rlvr`,
`generate`, every row at its longest, on a machine whose speed is known (`rlp.measure.machines`).

    update      flops / rate, the operators that Python calls, and the optimizer's own reading
    sampling    tokens in turn x (reading the weights, or their FLOPs, and the operators)

Trainers of TRL call more operators than are counted, and load what they need first: seconds are
from below, where FLOPs are from above.
"""

from dataclasses import dataclass

from rlp.measure.machines import Speed
from rlp.measure.plan_time import BESIDE_LAYERS, OPERATORS, OPTIMIZER_PASSES
from rlp.model.shapes import ModelShapes, forward_flops, row_work
from rlp.post.pipeline_config import (
    GenerateStage,
    RediStage,
    RlvrStage,
    RowsStage,
    TrlStage,
)
from rlp.post.stages.generation import ROWS, parts

FLOAT32 = 4
"""Bytes of a number: these stages compute in float32."""


@dataclass(frozen=True, slots=True)
class StageWork:
    """Of a whole stage."""

    flops: float
    """Of all that follows."""
    update_flops: float = 0.0
    updates: int = 0
    """Optimizer steps."""
    sampling_flops: float = 0.0
    turns: int = 0
    """Forwards of sampling: tokens that are drawn in turn, and one for the prompts of each
    batch."""

    def seconds(self, shapes: ModelShapes, speed: Speed) -> float:
        """On one device."""
        moved = OPTIMIZER_PASSES * FLOAT32 * shapes.parameters / speed.bytes_per_s
        called = OPERATORS["optimizer"] * shapes.layers * speed.launch_s
        update = _passes(self.update_flops, self.updates, "train", shapes, speed)
        read = self.turns * FLOAT32 * shapes.matmul_parameters / speed.bytes_per_s
        sampling = _passes(self.sampling_flops, self.turns, "decode", shapes, speed)
        return update + self.updates * (moved + called) + max(sampling, read)


def _passes(flops: float, number: int, kind: str, shapes: ModelShapes, speed: Speed) -> float:
    """Seconds of so many passes of the model with so many FLOPs in all."""
    calls = number * (shapes.layers * OPERATORS[kind] + BESIDE_LAYERS) * speed.launch_s
    computing = flops / speed.flops
    return max(calls, computing) if speed.runs_ahead else calls + computing


def work_of(
    settings: TrlStage | GenerateStage, shapes: ModelShapes, tokens: int, prompts: int = 1
) -> StageWork | None:
    """What a stage does at most; None for a kind that is not known here.

    Args:
        tokens: of the longest row (`sft`, `spectrum`; of `redi` with either trace), or the longest
            prompt.
        prompts: of `generate`, how many there are.
    """
    if isinstance(settings, RowsStage):
        rows, passes = settings.steps * settings.batch_size, 3
        if isinstance(settings, RediStage):
            rows *= 2
            passes += settings.loss == "dpo"  # a reference, forward only
        update = rows * passes * forward_flops(shapes, row_work(tokens, head_rows=tokens))
        return StageWork(flops=update, update_flops=update, updates=settings.steps)
    if isinstance(settings, RlvrStage):
        sampled, rows = settings.max_completion_tokens, settings.batch_size * settings.generations
        drawn = settings.steps * rows * _drawn(shapes, tokens, sampled)
        forward = forward_flops(shapes, row_work(tokens + sampled, head_rows=sampled))
        update = settings.steps * rows * 3 * forward
        return StageWork(
            flops=drawn + update,
            update_flops=update,
            updates=settings.steps,
            sampling_flops=drawn,
            turns=settings.steps * (1 + sampled),
        )
    if not isinstance(settings, GenerateStage):
        return None
    documents = parts(settings, prompts) * prompts * settings.draws
    drawn = documents * _drawn(shapes, tokens, settings.tokens)
    turns = -(-documents // ROWS) * (1 + settings.tokens)
    return StageWork(flops=drawn, sampling_flops=drawn, turns=turns)


def _drawn(shapes: ModelShapes, prompt: int, sampled: int) -> float:
    """FLOPs of a prompt and what is drawn behind it."""
    read = forward_flops(shapes, row_work(prompt, head_rows=1))
    return read + forward_flops(shapes, row_work(sampled, head_rows=sampled, before=prompt))
