"""What stages take that TRL does, or the sampler: from FLOPs, bytes and operators."""

from math import inf

import pytest

from rlp.measure.machines import Speed
from rlp.measure.plan_time import BESIDE_LAYERS, OPERATORS, OPTIMIZER_PASSES
from rlp.model.shapes import forward_flops, model_shapes, row_work
from rlp.post.pipeline_config import GenerateStage, RlvrStage, SftStage
from rlp.post.pipeline_time import work_of
from rlp.world.folder import make_model_config

SHAPES = model_shapes(make_model_config())
DATA = {"data": ["rows.jsonl"], "learning_rate": 1e-4}
SFT = SftStage("sft", steps=3, batch_size=4, max_tokens=20, **DATA)
RLVR = RlvrStage("rlvr", steps=3, batch_size=2, generations=4, max_completion_tokens=5, **DATA)
GENERATE = GenerateStage("generate", documents=300, prompts="panel.jsonl", tokens=7)


def machine(**fast: float) -> Speed:
    """One on which only what is named takes time."""
    told = {"flops": inf, "bytes_per_s": inf, "launch_s": 0.0} | fast
    none = dict.fromkeys(("graphed_s", "link_bytes_per_s", "disk_bytes_per_s"))
    return Speed(name="made", runs_ahead=False, rests_on=(), **none, **told)


@pytest.mark.parametrize("stage, tokens", [(SFT, 20), (RLVR, 9), (GENERATE, 9)])
def test_arithmetic_takes_its_flops(stage, tokens):
    work = work_of(stage, SHAPES, tokens, 3)
    assert work.seconds(SHAPES, machine(flops=1e6)) == pytest.approx(work.flops / 1e6)


def test_flops_are_those_of_the_longest_rows():
    """Three passes over 12 rows of 20 tokens; 300 documents of 3 prompts, each read once."""
    rows = 3 * 12 * forward_flops(SHAPES, row_work(20, head_rows=20))
    assert work_of(SFT, SHAPES, 20).flops == pytest.approx(rows)
    read = forward_flops(SHAPES, row_work(9, head_rows=1))
    drawn = forward_flops(SHAPES, row_work(7, head_rows=7, before=9))
    assert work_of(GENERATE, SHAPES, 9, 3).flops == pytest.approx(300 * (read + drawn))


def test_memory_is_read_for_each_token_in_turn_and_for_the_optimizer():
    """RLVR: 3 steps of 5 tokens and a prompt. Documents: two batches of 7 tokens and a prompt."""
    optimizer = 3 * OPTIMIZER_PASSES * 4 * SHAPES.parameters
    weights = 4 * SHAPES.matmul_parameters
    seconds = work_of(RLVR, SHAPES, 9).seconds(SHAPES, machine(bytes_per_s=1e6))
    assert seconds == pytest.approx((optimizer + 3 * 6 * weights) / 1e6)
    seconds = work_of(GENERATE, SHAPES, 9, 3).seconds(SHAPES, machine(bytes_per_s=1e6))
    assert seconds == pytest.approx(2 * 8 * weights / 1e6)


def test_operators_are_called_one_by_one():
    calls = SHAPES.layers * (OPERATORS["train"] + OPERATORS["optimizer"]) + BESIDE_LAYERS
    assert work_of(SFT, SHAPES, 20).seconds(SHAPES, machine(launch_s=1.0)) == 3 * calls
