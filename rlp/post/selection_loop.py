"""The Prismatic loop (arXiv 2505.20161): a pool of examples grows by what a generator proposes, a
solver agrees with itself about, and no cluster of the pool has many of.

    shots from the pool -> proposals -> near-duplicates out -> vote -> sparse by gradient -> pool

Gates stand in the order of what they cost for each proposal: runs of words, then answers of the
solver, then a backward. A vote asks for no more answers than it takes: more than half of n that are
equal decide it, so n // 2 + 1 come first, and the rest only where they do not agree.

Generator, solver and features are callables of the user's own, and of a proposal that is dropped
nothing is kept but the count.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rlp.config import ConfigError, require
from rlp.post.diversity_measures import same_text
from rlp.post.selection import default_clusters, sparse_clusters
from rlp.post.selection_overlap import new_texts, run_checksums


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, and what comes after it."""

    prompt: str
    completion: str


Propose = Callable[[Sequence[Example], int], Sequence[str]]
"""(shots, count) -> at most `count` prompts in their manner."""
Solve = Callable[[str, int], Sequence[str]]
"""(prompt, count) -> so many completions, drawn independently."""
Features = Callable[[Sequence[Example]], np.ndarray]
"""Examples -> [n, d], rows of length 1 or of NaN (`rlp.post.selection.gradient_features`)."""

EMPTY, DUPLICATE, UNDECIDED = "empty", "near-duplicate", "no majority"
NO_FEATURE, DENSE = "no gradient", "dense"


@dataclass(frozen=True, slots=True)
class LoopRule:
    """How a round goes."""

    proposals: int
    """That are asked for in a round."""
    at_once: int = 8
    """Of one call of the generator, each with shots of its own."""
    shots: int = 4
    answers: int = 8
    """n of a vote."""
    keep: str | float | Fraction = 0.5
    """Share of the pool's clusters that a proposal may fall into, the smallest first."""
    take: int | None = None
    """So many of a round are kept, the smallest clusters first, whatever `keep` is; None: all that
    fall into sparse clusters."""
    clusters: int | None = None
    """Of the pool; None: as `default_clusters`."""
    same_share: float = 0.5
    """Of the runs of ten words of a prompt, from which it is one that was there before."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("proposals", "at_once", "answers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.shots >= 0, "shots", self.shots, "must be at least 0")
        require(
            0 < self.same_share <= 1, "same_share", self.same_share, "must be above 0, at most 1"
        )


@dataclass(frozen=True, slots=True)
class Round:
    """What became of the proposals of a round."""

    number: int
    proposed: int
    answers: int
    """That the solver was asked for."""
    kept: tuple[Example, ...]
    """Which are in the pool since."""
    dropped: dict[str, int]
    """By reason: `empty`, `near-duplicate`, `no majority`, `no gradient`, `dense`."""


def grow(
    pool: list[Example],
    propose: Propose,
    solve: Solve,
    features: Features | None,
    rule: LoopRule,
    *,
    rounds: int,
    answer_of: Callable[[str], str] = same_text,
) -> Iterator[Round]:
    """Add to a pool, round by round.

    Args:
        pool: what there is; it grows in place.
        features: None keeps at random (`rule.take` of a round), as a control does.
        answer_of: what of a completion is voted on.

    Raises:
        ConfigError: the pool is empty, or a callable gives what it should not.
    """
    require(len(pool) > 0, "pool", len(pool), "needs an example to begin with")
    seen = {run for example in pool for run in run_checksums(example.prompt).tolist()}
    held = None if features is None else _features(features, pool)
    for number in range(rounds):
        rng, dropped = random.Random(f"prismatic {rule.seed} {number}"), Counter()
        prompts = _proposals(pool, propose, rule, rng)
        candidates, asked = [], 0
        for prompt in _new(prompts, seen, rule, dropped):
            example, answers = voted(prompt, solve, rule.answers, answer_of)
            asked += answers
            dropped[UNDECIDED] += example is None
            candidates += [example] if example is not None else []
        chosen, rows = _chosen(candidates, held, features, rule, rng, dropped)
        pool += chosen
        held = None if held is None else np.concatenate([held, rows])
        counts = {reason: count for reason, count in dropped.items() if count}
        yield Round(number, len(prompts), asked, tuple(chosen), counts)


def voted(
    prompt: str, solve: Solve, count: int, answer_of: Callable[[str], str] = same_text
) -> tuple[Example | None, int]:
    """The first completion with the answer that more than half of `count` have, and how many were
    asked for; None where no answer has that many.

    Raises:
        ConfigError: the solver gives fewer than it is asked for, or no texts.
    """
    first = count // 2 + 1
    said = _texts(solve(prompt, first), "solver")
    if len(set(map(answer_of, said))) > 1 and count > first:
        said += _texts(solve(prompt, count - first), "solver")
        first = count
    if len(said) != first:
        raise ConfigError(f"the solver gave {len(said)} completions; expected {first}.")
    answers = list(map(answer_of, said))
    best, votes = Counter(answers).most_common(1)[0]
    if 2 * votes <= count:
        return None, first
    return Example(prompt, said[answers.index(best)]), first


def _texts(given: Sequence[str], who: str) -> list[str]:
    found = list(given)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise ConfigError(f"the {who} gave {wrong[0]!r:.60}; expected texts.")
    return found


def _proposals(
    pool: list[Example], propose: Propose, rule: LoopRule, rng: random.Random
) -> list[str]:
    prompts: list[str] = []
    while len(prompts) < rule.proposals:
        count = min(rule.at_once, rule.proposals - len(prompts))
        shots = rng.sample(pool, min(rule.shots, len(pool)))
        found = _texts(propose(shots, count), "generator")
        if not 1 <= len(found) <= count:
            raise ConfigError(f"the generator gave {len(found)} prompts; expected 1 to {count}.")
        prompts += found
    return prompts


def _new(prompts: list[str], seen: set[int], rule: LoopRule, dropped: Counter) -> Iterator[str]:
    """Prompts that are not nearly in the pool, nor among those before."""
    for prompt, is_new in new_texts(prompts, seen, rule.same_share):
        if is_new:
            yield prompt
        else:
            dropped[DUPLICATE if prompt.strip() else EMPTY] += 1


def _features(features: Features, examples: list[Example]) -> np.ndarray:
    rows = np.asarray(features(examples), dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(examples):
        raise ConfigError(
            f"the features have shape {rows.shape} for {len(examples)} examples; expected"
            f" [{len(examples)}, d]."
        )
    return rows


def _chosen(
    candidates: list[Example],
    held: np.ndarray | None,
    features: Features | None,
    rule: LoopRule,
    rng: random.Random,
    dropped: Counter,
) -> tuple[list[Example], np.ndarray | None]:
    """Candidates that join the pool, and their features."""
    if features is None or not candidates:
        take = len(candidates) if rule.take is None else min(rule.take, len(candidates))
        dropped[DENSE] += len(candidates) - take
        return rng.sample(candidates, take), None if held is None else held[:0]
    rows = _features(features, candidates)
    there = np.isfinite(rows).all(axis=1)
    dropped[NO_FEATURE] += int((~there).sum())
    candidates, rows = [c for c, ok in zip(candidates, there) if ok], rows[there]
    order = _sparse_first(rows, held[np.isfinite(held).all(axis=1)], rule)
    dropped[DENSE] += len(candidates) - len(order)
    return [candidates[place] for place in order], rows[order]


def _sparse_first(rows: np.ndarray, pool: np.ndarray, rule: LoopRule) -> np.ndarray:
    """[kept] int64, the smallest clusters of the pool first."""
    if not len(pool):
        raise ConfigError("no example of the pool has a gradient, so none can be near to it.")
    clusters = rule.clusters or default_clusters(len(pool))
    found = sparse_clusters(pool, min(clusters, len(pool)), keep=rule.keep, seed=rule.seed)
    label, similarity = found.nearest(rows)
    order = np.lexsort((similarity, found.size[label]))
    if rule.take is not None:
        return order[: rule.take]
    return order[found.sparse[label[order]]]
