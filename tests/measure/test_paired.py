"""Arms against a reference arm over the same seeds: worked examples, published ones, and how often
the whole procedure is wrong."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from rlp.measure.paired import (
    LEVEL,
    claim_in_words,
    compare,
    holm,
    least_p,
    seeds_needed,
    sign_flip_p,
    t_interval,
)

DARWIN = (49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48)
"""Fifteen pairs of crossed and self-fertilized maize, in eighths of an inch; Fisher, The Design of
Experiments (1935), section 21."""


@pytest.mark.parametrize(
    "differences, p",
    [
        ([1, 2, 3], Fraction(2, 8)),  # no other |sum| is 6
        ([3, -1, 1], Fraction(6, 8)),  # |5| twice and |3| four times
        ([1, 2, -3], Fraction(8, 8)),  # the sum is 0
        ([0, 0, 0], Fraction(1)),
        ([2, 0, 2], Fraction(4, 8)),  # the seed without a difference says nothing
        ([5], Fraction(1)),
    ],
)
def test_the_flips_of_a_few_differences_are_counted_by_hand(differences, p):
    assert sign_flip_p(differences) == p
    assert sign_flip_p([-0.1 * difference for difference in differences]) == p


def test_fishers_maize():
    """He counts 863 of 32,768 sums as large as the one observed, of one sign."""
    assert sign_flip_p(DARWIN) == 2 * 863 / 2**15
    low, high = t_interval(DARWIN)
    mean, error = 314 / 15, math.sqrt(np.var(DARWIN, ddof=1) / 15)
    assert (low, high) == pytest.approx(
        (mean - 2.144787 * error, mean + 2.144787 * error), abs=1e-4
    )


def test_equal_sums_are_equal_in_floating_point():
    """Tenths have no exact sums: every flip whose sum is as large counts, whatever its rounding."""
    random = np.random.default_rng(0)
    for _ in range(200):
        whole = random.integers(-3, 4, size=random.integers(2, 8))
        sums = [sum(s * int(d) for s, d in zip(signs, whole)) for signs in _signs(len(whole))]
        exact = Fraction(sum(abs(one) >= abs(int(whole.sum())) for one in sums), len(sums))
        assert sign_flip_p(0.7 + whole / 10 - 0.7) == exact


def _signs(count):
    return list(product((1, -1), repeat=count))


def test_it_is_scipys_test():
    from scipy.stats import permutation_test

    for seed in range(5):
        values = np.random.default_rng(seed).exponential(size=7) - 0.5
        theirs = permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=math.inf
        )
        assert sign_flip_p(values) == theirs.pvalue


def test_holm_steps_down():
    """The textbook example; adjusted p keep the order of p and stay at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize("num_arms, seeds", [(1, 6), (2, 7), (8, 9), (11, 9), (12, 9), (13, 10)])
def test_seeds_that_a_family_needs(num_arms, seeds):
    """With them the least p, times the arms, is within the level, and with one less it is not."""
    assert seeds_needed(num_arms) == seeds
    assert least_p(seeds) * num_arms <= LEVEL < least_p(seeds - 1) * num_arms


def by_seed(values):
    return dict(enumerate(values))


REFERENCE = by_seed([0.9, 0.8, 0.9, 0.7, 0.9, 0.8, 0.9])


def test_relations_and_the_sentence():
    """Seven seeds allow two arms: always 0.1 below, always 0.2 above, in a claim each way."""
    arms = {
        "low": {seed: value - 0.1 for seed, value in REFERENCE.items()},
        "high": {seed: value + 0.2 for seed, value in REFERENCE.items()},
    }
    low, high = compare(REFERENCE, arms)
    assert (low.relation, high.relation) == ("above", "below")
    assert (low.p, low.adjusted) == (2 / 2**7, 4 / 2**7)
    assert (low.mean, low.low, low.high) == pytest.approx((0.1, 0.1, 0.1))
    assert claim_in_words("RLP", (low, high), {"high": "the oracle"}) == (
        "RLP is above low; below the oracle (exact paired test, 7 seeds, Holm over 2 arms)."
    )


def test_a_difference_of_both_signs_is_not_told_apart():
    arms = {"same": by_seed([0.8, 0.9, 0.8, 0.8, 0.8, 0.9, 0.8])}
    (found,) = compare(REFERENCE, arms)
    assert found.adjusted > LEVEL and found.relation == "not told apart from"
    assert claim_in_words("RLP", (found,)) == (
        "RLP is not told apart from same (exact paired test, 7 seeds, Holm over 1 arm)."
    )


def test_too_few_seeds_get_no_verdict_however_large_the_difference():
    """Five seeds can not go below 0.0625, seven not below 0.0156 times eleven arms."""
    few = dict(list(REFERENCE.items())[:5])
    (found,) = compare(few, {"low": {seed: value - 0.5 for seed, value in few.items()}})
    assert found.relation is None and math.isnan(found.adjusted) and found.p == 2 / 2**5
    assert found.refusal == (
        "5 seeds can not tell one of 1 arms apart at 0.05 (the least p is 0.062, times 1): it takes"
        " 6"
    )
    many = {f"arm{i}": {s: v - 0.5 for s, v in REFERENCE.items()} for i in range(11)}
    said = claim_in_words("RLP", compare(REFERENCE, many))
    assert said.startswith("No verdict on arm0, arm1") and said.endswith("it takes 9.")


def test_seeds_that_do_not_pair_get_no_verdict_and_are_named():
    """A lost seed may be the bad one. What is left still counts the arm into the family."""
    below = {seed: value - 0.1 for seed, value in REFERENCE.items()}
    shorter = {seed: value for seed, value in below.items() if seed != 3} | {9: 0.5}
    found = compare(REFERENCE, {"whole": below, "shorter": shorter})
    assert [one.relation for one in found] == ["above", None]
    assert found[0].adjusted == 2 * found[0].p
    assert found[1].refusal == (
        "the seeds do not pair: the reference alone has seed 3 and the arm alone has seed 9"
    )
    assert claim_in_words("RLP", found) == (
        "RLP is above whole (exact paired test, 7 seeds, Holm over 2 arms). No verdict on shorter:"
        " the seeds do not pair: the reference alone has seed 3 and the arm alone has seed 9."
    )
    other, whole = compare(REFERENCE, {"other": below, "whole": below}, {"other": "another panel"})
    assert other.refusal == "another panel" and whole.adjusted == 2 * whole.p
    (nothing,) = compare(REFERENCE, {"empty": {}})
    assert "the reference alone has seeds 0, 1" in nothing.refusal


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match="finite"):
        compare({0: math.nan}, {"arm": {0: 1.0}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "draw",
    [
        lambda random, shape: random.normal(size=shape),
        lambda random, shape: random.lognormal(sigma=1.5, size=shape),
        lambda random, shape: np.round(random.beta(30, 0.5, size=shape), 2),  # ties, near 1
    ],
    ids=["normal", "skewed", "accuracies"],
)
@pytest.mark.parametrize("differing", [0, 5])
def test_a_family_is_wrong_in_at_most_one_of_twenty(draw, differing):
    """Nine seeds, eleven arms, one reference in common: how often any arm that does not differ is
    told apart, where none differs and where five do; and those five are found."""
    random, wrong, right, times = np.random.default_rng(1), 0, 0, 1500
    for _ in range(times):
        values = draw(random, (12, 9))
        values[1 : 1 + differing] -= 1e6
        found = compare(
            by_seed(values[0]), {str(arm): by_seed(values[arm]) for arm in range(1, 12)}
        )
        apart = [one.relation != "not told apart from" for one in found]
        wrong, right = wrong + any(apart[differing:]), right + all(apart[:differing])
    assert wrong / times <= LEVEL
    assert differing == 0 or right == times
