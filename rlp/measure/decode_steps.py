"""How many tokens are decoded one after another while thoughts of different lengths take turns in
slots, and what ranks wait for each other.

How long thoughts get is not known before a run. The worst case is that each is cut by the budget;
with a mean given, lengths are taken as exponential and cut there, which is what thoughts that may
end at any token with the same probability are.
"""

import heapq
from dataclasses import dataclass

import numpy as np

MOST_THOUGHTS = 4096
"""Of a rank, followed one by one; more are the same again."""

MOST_RANKS = 64


@dataclass(frozen=True, slots=True)
class Decoding:
    """Of one step."""

    lengths: np.ndarray
    """[thoughts of a rank] tokens, of a rank that stands for all."""
    steps: float
    """Tokens decoded one after another by the slowest rank."""
    steps_of_a_rank: float
    """By the mean rank."""

    @property
    def straggling(self) -> float:
        """How much longer the slowest rank samples than the mean one."""
        return self.steps / self.steps_of_a_rank


def decoding(
    thoughts: int,
    slots: int,
    budget: int,
    mean_tokens: float | None,
    *,
    world_size: int,
    look_every: int,
) -> Decoding:
    """Follow the thoughts of each rank through its slots.

    Args:
        thoughts: of a rank.
        look_every: tokens between two looks of the host, which then fills the slots that are free.
        mean_tokens: of thoughts, at most the budget; None for the worst case.
    """
    if mean_tokens is None:
        looked = -(-budget // look_every) * look_every
        steps = float(-(-thoughts // slots) * looked)
        return Decoding(np.full(thoughts, budget), steps, steps)
    followed, ranks = min(thoughts, MOST_THOUGHTS), min(world_size, MOST_RANKS)
    lengths = exponential_lengths(followed * ranks, mean_tokens, budget)
    of_ranks = np.random.default_rng(0).permutation(lengths).reshape(ranks, followed)
    repeated = (thoughts - followed) * lengths.mean() / slots
    steps = [steps_with_refill(own, slots, look_every) + repeated for own in of_ranks]
    whole = np.resize(of_ranks[0], thoughts)
    return Decoding(whole, float(max(steps)), float(np.mean(steps)))


def exponential_lengths(count: int, mean: float, budget: int) -> np.ndarray:
    """[count] int64 lengths at equal steps of an exponential distribution that is cut at the
    budget, with this mean to a token."""

    def cut(scale: float) -> np.ndarray:
        share = (np.arange(count) + 0.5) / count
        return np.clip(np.rint(-scale * np.log1p(-share)), 1, budget).astype(np.int64)

    low, high = 0.0, 1e6 * budget
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean() < mean else (low, middle)
    return cut(high)


def steps_with_refill(lengths: np.ndarray, slots: int, look_every: int) -> int:
    """Tokens decoded one after another where each slot that is free takes the next thought. There
    is a place for every trunk: those that there are (`schedule.trunk_places`) cost up to 4 % more.
    """
    ends = [0] * min(slots, len(lengths))
    for length in (-(-lengths // look_every) * look_every).tolist():
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)
