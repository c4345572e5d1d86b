"""A token by inverse CDF in two levels: held to exact arithmetic, at the ends, and row by row."""

import math
import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlp_kernels import draw, draw_tokens
from sampling_phase.blocks import plain_draw

TEMPERATURE = 0.7
LAST_UNIFORM = 1 - 2.0**-53
SMALL, LARGE = 100, 5000
"""Vocabularies of one tile, and of four and a part."""


def make_logits(num_rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Of deviation 3: probabilities of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, vocabulary, generator=generator)


def make_uniforms(num_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, generator=generator, dtype=torch.float64)


def least_distance(logits: torch.Tensor) -> float:
    """From a boundary between two tokens, beyond which the token is that of exact arithmetic."""
    return (2 * float(logits.abs().max()) / TEMPERATURE + 34) * 2.0**-24


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_on_either_side_of_a_boundary_the_token_is_that_of_exact_arithmetic(vocabulary: int):
    """As near as the rounding that the docstring admits, at boundaries within and between tiles."""
    logits = make_logits(300, vocabulary) / 3  # so that most tokens have room
    exact = (logits.double() / TEMPERATURE).softmax(dim=1)
    boundary, distance = exact.cumsum(dim=1), least_distance(logits)

    wide = (exact > 4 * distance)[:, :-1] & (exact > 4 * distance)[:, 1:]
    wide &= (torch.arange(vocabulary - 1) % draw.TILE == draw.TILE - 1) | (
        torch.rand(wide.shape, generator=torch.Generator().manual_seed(1)) < 2 / vocabulary
    )
    row, word = wide.nonzero().T
    assert len(row) > 200
    assert vocabulary == SMALL or ((word + 1) % draw.TILE == 0).sum() > 200

    for side, expected in ((-distance, word), (distance, word + 1)):
        token, *_ = draw_tokens(logits[row], boundary[row, word] + side, TEMPERATURE)
        assert torch.equal(token, expected)


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probability_and_entropy_are_those_of_the_tempered_softmax(vocabulary, dtype):
    """They are of the order of max |z|, whose rounding is one of those that the bound counts."""
    logits, uniform = make_logits(50, vocabulary), make_uniforms(50)
    token, *ours = draw_tokens(logits.to(dtype), uniform, TEMPERATURE)
    exact = (logits.double() / TEMPERATURE).log_softmax(dim=1)
    truth = (exact.gather(1, token[:, None])[:, 0], -(exact.exp() * exact).sum(dim=1))
    allowed = least_distance(logits) if dtype == torch.float32 else 1e-12
    for found, expected in zip(ours, truth, strict=True):
        assert found.dtype == dtype
        assert_close(found.double(), expected, rtol=0, atol=allowed)


def test_a_small_vocabulary_has_the_bits_of_the_plain_loop_and_fewer_operators():
    logits, uniform = make_logits(50, SMALL), make_uniforms(50)
    logits[3, 5:] = -math.inf
    for ours, plain in zip(
        draw_tokens(logits, uniform, TEMPERATURE),
        plain_draw(logits, uniform, TEMPERATURE),
        strict=True,
    ):
        assert torch.equal(ours, plain)
    ours, plain = (operators(function, logits, uniform) for function in (draw_tokens, plain_draw))
    assert len(ours) < len(plain)


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
def test_no_value_is_read_back_from_the_device(vocabulary: int):
    """What a CUDA graph can not hold."""
    found = operators(draw_tokens, make_logits(4, vocabulary), make_uniforms(4))
    assert not {"aten._local_scalar_dense", "aten.nonzero", "aten.index"} & set(found)


def operators(function, logits: torch.Tensor, uniform: torch.Tensor) -> list[str]:
    """Those that a draw runs; views are none."""
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                found.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        function(logits, uniform, TEMPERATURE)
    return found


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, LAST_UNIFORM])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, dtype, vocabulary: int):
    """-inf at both ends of the vocabulary, and a whole tile of it; and a row with one word left."""
    logits = make_logits(40, vocabulary).to(dtype)
    logits[:, : vocabulary // 3] = logits[:, -vocabulary // 3 :] = -math.inf
    logits[0], logits[0, vocabulary // 2] = -math.inf, -200.0
    token, *rest = draw_tokens(logits, torch.full((40,), uniform, dtype=torch.float64), TEMPERATURE)
    assert logits.gather(1, token[:, None]).isfinite().all()
    assert all(part.isfinite().all() for part in rest)
    assert token[0] == vocabulary // 2


def test_a_number_on_the_boundary_of_tiles_draws_a_word_with_a_weight():
    """Masses of very different sizes, whose float64 sums are rounded: what is left in a tile may
    come out below 0 or above its mass. Half of each tile weighs nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(400, 40, 8)
    weights[:, :, 2:6] = (-40 * torch.rand(400, 40, 4, generator=generator)).exp()
    cumulative = weights.sum(dim=2).double().cumsum(dim=1)
    boundary = (cumulative / cumulative[:, -1:])[:, :-1]
    weights = weights.flatten(1)
    for uniform in (*boundary.T, *boundary.nextafter(torch.zeros_like(boundary)).T):
        token, _ = draw._search(weights, uniform.contiguous(), 8)
        assert (weights.gather(1, token) > 0).all()


@pytest.mark.parametrize("vocabulary", [SMALL, LARGE])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_broken_touches_itself_alone(vocabulary: int, value: float):
    """NaN or +inf among its logits, or nothing but -inf."""
    logits, uniform = make_logits(5, vocabulary), make_uniforms(5)
    before = draw_tokens(logits, uniform, TEMPERATURE)
    logits[2, slice(None) if value == -math.inf else vocabulary // 2] = value
    after = draw_tokens(logits, uniform, TEMPERATURE)
    others = torch.arange(5) != 2
    assert all(torch.equal(a[others], b[others]) for a, b in zip(after, before, strict=True))
    assert 0 <= after[0][2] < vocabulary and after[1][2].isnan() and after[2][2].isnan()


def test_a_row_is_the_same_in_any_batch():
    logits, uniform = make_logits(40, LARGE), make_uniforms(40)
    together = draw_tokens(logits, uniform, TEMPERATURE)
    alone = draw_tokens(logits[17:20], uniform[17:20], TEMPERATURE)
    assert all(torch.equal(a, b[17:20]) for a, b in zip(alone, together, strict=True))


def refused(match: str, **changes):
    given = {"logits": make_logits(3, 9), "uniform": make_uniforms(3), "temperature": TEMPERATURE}
    with pytest.raises(ValueError, match=match):
        draw_tokens(**given | changes)


def test_what_can_not_be_drawn_from_is_refused_by_name():
    refused(r"logits must be \[R, V\], got \[3, 0\]", logits=torch.zeros(3, 0))
    refused("float32 or float64, got torch.bfloat16", logits=torch.zeros(3, 9).bfloat16())
    refused(r"uniform must be \[3\] float64", uniform=torch.zeros(3))
    refused("temperature must be positive, got 0", temperature=0)
    refused("form must be one of auto, plain, triton, got 'fused'", form="fused")


def test_the_form_of_triton_without_triton_says_what_to_write(monkeypatch):
    monkeypatch.delitem(sys.modules, "rlp_kernels.triton_draw", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton, or write form='plain'"):
        draw_tokens(make_logits(3, 9), make_uniforms(3), TEMPERATURE, form="triton")
