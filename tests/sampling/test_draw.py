"""One draw: a token by a uniform number, its log-probability and its entropy."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.sampling.draw import draw
from tests.tiny_models import WORDS

TEMPERATURE = 0.7


def spread(logits: list[float], num: int) -> tuple[Tensor, Tensor]:
    """Each token's share of `num` evenly spread uniforms, and its probability at the sampling
    temperature."""
    table = torch.tensor([logits] * num)
    token, *_ = draw(table, (torch.arange(num, dtype=torch.float64) + 0.5) / num, TEMPERATURE)
    return token.bincount(minlength=len(logits)) / num, (
        torch.tensor(logits) / TEMPERATURE
    ).softmax(dim=0)


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 1.0, -1.0, 2.0],
        [0.0] * 7,
        [-3.0, 5.0],
        [float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")],
        np.linspace(-4, 4, len(WORDS)).tolist(),
    ],
)
def test_a_draw_has_the_probabilities_of_the_softmax(logits: list[float]):
    """A token of probability p has an interval of length p, which holds p * n of n even points,
    give or take one; float32 probabilities move the interval's ends by less than another."""
    num = 20000
    share, probability = spread(logits, num)
    assert (share - probability).abs().max() < 2 / num


# 0, the smallest and the largest number that the generator gives, and the ends of the middle
# token's interval.
@pytest.mark.parametrize(
    "uniform", [0.0, 2.0**-53, 0.5 - 2.0**-53, 0.5, 0.5 + 2.0**-53, 1 - 2.0**-53]
)
@pytest.mark.parametrize(
    "logits",
    [
        [float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")],
        [-1e4, 0.0, -1e4, 0.0, -1e4],  # float32 probability 0
        [float("-inf"), float("-inf"), 3.0, float("-inf"), float("-inf")],
        [-1e30, -1e30, -200.0, -1e30, -1e30],
    ],
)
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, logits: list[float]):
    """Neither first nor last nor between, at either end of the uniform numbers."""
    token, logprob, entropy = draw(
        torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), TEMPERATURE
    )
    assert (torch.tensor(logits) / TEMPERATURE).softmax(dim=0)[token] > 0
    assert logprob.isfinite().all() and entropy.isfinite().all()


def test_the_largest_uniform_stays_inside_a_large_vocabulary():
    """Over 150,000 words the float32 probabilities do not sum to 1; the uniform is scaled by their
    sum."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 151936, generator=generator)
    logits[0, -3:] = float("-inf")
    token, logprob, _ = draw(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64), TEMPERATURE)
    assert token.item() == 151936 - 4 and logprob.isfinite().all()


def test_log_probability_and_entropy_are_those_of_the_tempered_softmax():
    """At temperature 0.7: log softmax(logits / 0.7), not of the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 30, generator=generator)
    token, logprob, entropy = draw(
        logits, torch.rand(50, dtype=torch.float64, generator=generator), 0.7
    )
    expected = (logits.double() / 0.7).log_softmax(dim=1)
    # Three roundings (division, log-sum-exp, difference) of numbers that are below 32.
    allowed = 3 * 32 * torch.finfo(torch.float32).eps
    assert_close(logprob.double(), expected.gather(1, token[:, None])[:, 0], rtol=0, atol=allowed)
    assert_close(entropy.double(), -(expected.exp() * expected).sum(dim=1), rtol=0, atol=allowed)
    assert (logprob - logits.log_softmax(dim=1).gather(1, token[:, None])[:, 0]).abs().max() > 0.1


def test_entropy_at_its_limits():
    """ln V where all words are alike, 0 where one is certain, ln 2 between two with the rest
    impossible."""
    logits = torch.tensor([[1.0] * 8, [0.0] + [-1e5] * 7, [float("-inf")] * 6 + [2.0, 2.0]])
    *_, entropy = draw(logits, torch.zeros(3, dtype=torch.float64), TEMPERATURE)
    assert_close(entropy, torch.tensor([np.log(8), 0.0, np.log(2)], dtype=torch.float32))
