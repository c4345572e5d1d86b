"""Arms compared with a reference arm over the same seeds: an exact test, Holm over the arms, and
the relation in words.

Under the null hypothesis that the reference and an arm could change places within a seed, the
difference d_s of seed s is as likely as -d_s. The sign-flip test draws on that alone:

    p = #{signs in {-1, +1}^S : |sum_s signs_s d_s| >= |sum_s d_s|} / 2^S

It knows neither a normal distribution nor a resample, so its error is at most what it says for any
number of seeds, and no p is below 2 / 2^S. Holm's step-down keeps the chance of one wrong claim in
the whole family of m arms at `LEVEL`: of the sorted p, the k-th is multiplied by m - k + 1. Both
together can claim something only where 2 / 2^S * m <= LEVEL; where they can not, there is no
verdict, which is not the verdict that nothing differs.

The t interval stands beside it to say how large a difference is. It is of one arm, not of the
family, and takes means of differences to be normal.

Dimensions
    S  seeds;  m  arms of the family
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

LEVEL = 0.05
"""Chance of a wrong claim in a family where no arm differs."""

MOST_SEEDS = 20
"""2^20 flips of 20 differences are 170 MB."""

TIE = 1e-9
"""Sums that differ by this part of sum |d| are equal: what lies between is rounding."""

Relation = Literal["above", "below", "not told apart from"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The reference minus one arm, paired by seed."""

    arm: str
    seeds: tuple[int, ...]
    """That both have."""
    differences: tuple[float, ...]
    mean: float
    """NaN where there is no pair."""
    low: float
    high: float
    """95 % t interval of the mean; NaN below two pairs."""
    p: float
    """Of the sign-flip test."""
    adjusted: float = math.nan
    """p after Holm's step-down over the family; NaN where there is no verdict."""
    refusal: str = ""
    """Why there is no verdict on this arm; empty where there is one."""

    @property
    def relation(self) -> Relation | None:
        """How the reference stands to the arm; None where there is no verdict."""
        if self.refusal:
            return None
        if self.adjusted > LEVEL:
            return "not told apart from"
        return "above" if self.mean > 0 else "below"


def compare(
    reference: dict[int, float],
    arms: dict[str, dict[int, float]],
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Difference, ...]:
    """The reference against a family of arms, in their order.

    An arm that gets no verdict counts in the family all the same, as one that differs least.

    Args:
        reference: one number by seed.
        arms: the same of every arm that the claim is about; m is their number.
        refused: arms that are not comparable for another reason than their seeds, and why.

    Raises:
        ValueError: a number is not finite, or there are more than `MOST_SEEDS` seeds.
    """
    found = [
        _difference(arm, reference, values, refused.get(arm, ""), len(arms))
        for arm, values in arms.items()
    ]
    adjusted = holm([1.0 if one.refusal else one.p for one in found])
    return tuple(
        one if one.refusal else replace(one, adjusted=p) for one, p in zip(found, adjusted)
    )


def sign_flip_p(differences: tuple[float, ...] | np.ndarray) -> float:
    """Two-sided p of the mean difference, over all 2^S flips of sign.

    Args:
        differences: [S], at least one.

    Raises:
        ValueError: none, too many, or one is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not 1 <= len(values) <= MOST_SEEDS or not np.isfinite(values).all():
        raise ValueError(
            f"sign_flip_p expects 1 to {MOST_SEEDS} finite differences, got {len(values)}:"
            f" {values.tolist()}."
        )
    # Flipping every sign changes no |sum|, so the first one stays.
    sums = values[:1]
    for value in values[1:]:
        sums = np.concatenate([sums + value, sums - value])
    tolerance = TIE * np.abs(values).sum()
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - tolerance))


def t_interval(differences: tuple[float, ...]) -> tuple[float, float]:
    """95 % interval of the mean: mean +- t(0.975, S - 1) * std / sqrt(S); NaN below two."""
    from scipy.stats import t

    num_seeds = len(differences)
    if num_seeds < 2:
        return math.nan, math.nan
    half = t.ppf(1 - LEVEL / 2, num_seeds - 1) * np.std(differences, ddof=1) / num_seeds**0.5
    mean = float(np.mean(differences))
    return mean - float(half), mean + float(half)


def holm(p: list[float]) -> list[float]:
    """Adjusted p of a family, in its order (Holm 1979): reject where it is at most the level."""
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    stepped = np.maximum.accumulate(np.minimum(1, factors * np.asarray(p, dtype=float)[order]))
    adjusted = np.empty(len(p))
    adjusted[order] = stepped
    return adjusted.tolist()


def least_p(num_seeds: int) -> float:
    """No smaller two-sided p comes out of so many seeds: 2 / 2^S."""
    return 2.0 ** (1 - num_seeds)


def seeds_needed(num_arms: int) -> int:
    """The least seeds with which one arm of the family can be told apart: 2 / 2^S * m <= LEVEL."""
    return math.ceil(math.log2(2 * num_arms / LEVEL))


def _difference(
    arm: str, reference: dict[int, float], values: dict[int, float], refused: str, num_arms: int
) -> Difference:
    seeds = tuple(sorted(reference.keys() & values.keys()))
    differences = tuple(float(reference[seed] - values[seed]) for seed in seeds)
    return Difference(
        arm=arm,
        seeds=seeds,
        differences=differences,
        mean=float(np.mean(differences)) if seeds else math.nan,
        **dict(zip(("low", "high"), t_interval(differences))),
        p=sign_flip_p(differences) if seeds else 1.0,
        refusal=refused or _refusal(reference.keys(), values.keys(), num_arms),
    )


def _refusal(of_reference: set[int], of_arm: set[int], num_arms: int) -> str:
    """Why these seeds allow no verdict; empty where they do."""
    apart = [
        f"{whose} alone has {_seeds(own)}"
        for whose, own in (
            ("the reference", of_reference - of_arm),
            ("the arm", of_arm - of_reference),
        )
        if own
    ]
    if apart:
        return f"the seeds do not pair: {' and '.join(apart)}"
    needed = seeds_needed(num_arms)
    if len(of_arm) < needed:
        return (
            f"{len(of_arm)} seed{'s' * (len(of_arm) != 1)} can not tell one of {num_arms} arms"
            f" apart at {LEVEL:g} (the least p is {least_p(len(of_arm)):.2g}, times {num_arms}): it"
            f" takes {needed}"
        )
    return ""


def _seeds(seeds: set[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def claim_in_words(
    reference: str, found: tuple[Difference, ...], names: dict[str, str] | None = None
) -> str:
    """What the test allows to be said of a family, as one sentence.

    For example: "RLP is above A, B; below C; not told apart from D (exact paired test, 9 seeds,
    Holm over 4 arms)."

    Args:
        reference: as the sentence calls it.
        names: how it calls the arms; those that are not in it by their own names.
    """
    called = {one.arm: (names or {}).get(one.arm, one.arm) for one in found}
    related = []
    for relation in Relation.__args__:
        if arms := [called[one.arm] for one in found if one.relation == relation]:
            related.append(f"{relation} {', '.join(arms)}")
    refused: dict[str, list[str]] = {}
    for one in found:
        if one.refusal:
            refused.setdefault(one.refusal, []).append(called[one.arm])
    unsaid = [f"No verdict on {', '.join(arms)}: {why}." for why, arms in refused.items()]
    if not related:
        return " ".join(unsaid)

    seeds = next(len(one.seeds) for one in found if one.relation)
    arms = "arm" if len(found) == 1 else "arms"
    test = f"exact paired test, {seeds} seeds, Holm over {len(found)} {arms}"
    return " ".join([f"{reference} is {'; '.join(related)} ({test}).", *unsaid])
