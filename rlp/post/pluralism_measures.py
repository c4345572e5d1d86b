"""How far answers are from what a population holds: pure functions of shares and of texts.

    Overton    share of the reasonable views that one answer holds; precision is the share of what
               the answer holds that is a reasonable view
    steerable  D(answers with the community's name, its shares) - D(answers without, its shares)
    moved      D(answers with the name, answers without)

D is the Jensen-Shannon divergence in nats (`rlp.post.distributions`), or its square root, which is
a distance. Neither needs every option to have mass, so an option that nobody holds, or nobody
answers, is no special case. A distribution of n draws is never quite that of which they were drawn:
`floor_of` and `floor_between` say how far apart chance alone puts them.

Dimensions
    O  options of a question;  n  answers to it
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from rlp.post.distributions import divergence
from rlp.post.diversity_measures import same_text

Distance = Literal["jensen_shannon_divergence_nats", "jensen_shannon_distance"]

DISTANCES: tuple[Distance, ...] = get_args(Distance)

CHANCE_DRAWS = 400
"""Behind a floor: its standard error is a twentieth of the spread of one draw."""


def distance(p: np.ndarray, q: np.ndarray, by: Distance = DISTANCES[0]) -> np.ndarray:
    """[...]: JSD of two distributions in nats, or its square root; NaN where one has no mass.

    Args:
        p, q: [..., O], at least 0; each is divided by its sum.
        by: which of the two.
    """
    p, q = np.broadcast_arrays(np.asarray(p, np.float64), np.asarray(q, np.float64))
    some = (p.sum(axis=-1) > 0) & (q.sum(axis=-1) > 0)
    even = np.full(p.shape[-1], 1 / p.shape[-1])  # stands for what is not measured
    p, q = (np.where(some[..., None], one, even) for one in (p, q))
    found = divergence(*(one / one.sum(axis=-1, keepdims=True) for one in (p, q)))
    return np.where(some, np.sqrt(found) if by == "jensen_shannon_distance" else found, np.nan)


def floor_of(shares: np.ndarray, draws: int, by: Distance = DISTANCES[0]) -> float:
    """Mean distance of n draws of a distribution from it; NaN of none."""
    if draws < 1:
        return math.nan
    made = np.random.default_rng(draws).multinomial(draws, _shares(shares), size=CHANCE_DRAWS)
    return float(distance(made, shares, by).mean())


def floor_between(one: np.ndarray, other: np.ndarray, by: Distance = DISTANCES[0]) -> float:
    """Mean distance of two sets of draws, as many as here, of the one distribution that these
    counts make together; NaN where one has none.

    Args:
        one, other: [O] counts.
    """
    sizes = [int(one.sum()), int(other.sum())]
    if not all(sizes):
        return math.nan
    rng, together = np.random.default_rng(sizes), _shares(one + other)
    made = [rng.multinomial(size, together, size=CHANCE_DRAWS) for size in sizes]
    return float(distance(*made, by).mean())


def _shares(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64) / np.sum(values)


def stands_in(text: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns stands in a text as whole words, in any case; `*` is any letters
    and digits, so that `tax*` stands in `Taxes rise`."""
    text = same_text(text).lower()
    return any(re.search(_expression(one), text) for one in patterns)


def _expression(pattern: str) -> str:
    words = re.escape(same_text(pattern).lower()).replace(r"\*", r"\w*")
    return rf"(?<!\w){words}(?!\w)"


def held_by_patterns(text: str, patterns: Mapping[str, Sequence[str]]) -> list[str]:
    """The options that a text holds, in the order of the question."""
    return [option for option, own in patterns.items() if stands_in(text, own)]


def overton(held: Iterable[str], reasonable: Iterable[str]) -> tuple[float, float]:
    """The share of the reasonable views that an answer holds, and its precision, NaN where it holds
    nothing.

    Args:
        held: what the answer holds, reasonable or not.
        reasonable: at least one.
    """
    held, reasonable = set(held), set(reasonable)
    good = len(held & reasonable)
    return good / len(reasonable), good / len(held) if held else math.nan


def overton_weighted(held: Iterable[str], reasonable: Mapping[str, float]) -> float:
    """The share of the people with a reasonable view whose view an answer holds; NaN where nobody
    has one.

    Args:
        reasonable: the population's share of each such view.
    """
    held, total = set(held), math.fsum(reasonable.values())
    seen = math.fsum(share for view, share in reasonable.items() if view in held)
    return seen / total if total > 0 else math.nan
