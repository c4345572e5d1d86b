"""What a run's numbers say in words: whether thoughts gain, whether the gain is self-harm, whether
the run has spent what it was to spend.

Of one run an effect is claimed only where its 95 % bootstrap interval over documents leaves 0 out,
and none at all below `LEAST_DOCUMENTS` held-out documents. Of several runs (one arm, several seeds)
the units are the seeds: the mean has a t interval over them, and an effect is claimed only where
the exact test over all flips of sign allows it, which takes six.
"""

from statistics import fmean
from typing import NamedTuple

from rlp.measure.paired import LEVEL, least_p, seeds_needed, sign_flip_p, t_interval

TOLERANCE = 0.01
"""Largest relative difference of what two matched runs have spent."""

LEAST_DOCUMENTS = 30
"""A bootstrap over fewer documents gives intervals that are too short."""


class Measured(NamedTuple):
    """A number of the panel with its 95 % interval, in nats."""

    mean: float
    low: float
    high: float
    of_runs: tuple[float, ...] = ()
    """The number in each run; empty for a single one, whose interval is over documents."""

    def __str__(self) -> str:
        over = f"t interval over {len(self.of_runs)} seeds" if self.of_runs else "interval"
        return f"{self.mean:+.3f} nats (95 % {over} {self.low:+.3f} to {self.high:+.3f})"

    @property
    def sign(self) -> int:
        """1 where it is clearly above 0, -1 where it is clearly below, else 0."""
        if self.of_runs:
            return _sign_over_seeds(self.of_runs)
        return (self.low > 0) - (self.high < 0)

    def moved_from(self, other: "Measured") -> int:
        """The sign of what lies between two numbers of the same runs: of one run, where their
        intervals do not overlap; of several, by the paired test."""
        if self.of_runs and other.of_runs:
            pairs = zip(self.of_runs, other.of_runs, strict=True)
            return _sign_over_seeds(tuple(own - its for own, its in pairs))
        return (self.low > other.high) - (self.high < other.low)


def _sign_over_seeds(values: tuple[float, ...]) -> int:
    if sign_flip_p(values) > LEVEL:
        return 0
    return 1 if fmean(values) > 0 else -1


def verdict(before: list[dict], after: list[dict]) -> list[str]:
    """Plain sentences about one run, or about runs that differ in their seed.

    Args:
        before, after: first and last evaluation of each run; empty where it has none.
    """
    if not after or not all(after):
        return [
            "No verdict: nothing was measured on held-out documents (data.held_out names none, or"
            " no evaluation has been made yet)."
        ]
    documents = min(_documents(line) for line in after)
    if documents < LEAST_DOCUMENTS:
        return [
            f"No verdict: the held-out panel has {documents} documents, and intervals over fewer"
            f" than {LEAST_DOCUMENTS} say little."
        ]
    gain = _measured(after, "gain_over_start_nats")
    if gain is None:
        return ["No verdict: the gain over the start has no interval here."]
    if 1 < len(after) < seeds_needed(1):
        return [
            f"No verdict: the exact test takes {seeds_needed(1)} seeds, and these are {len(after)}"
            f" (no p below {least_p(len(after)):.2g}). Gain over the start: {gain}."
        ]
    words = {
        1: "A thought predicts held-out tokens better than the starting model did without one",
        -1: "With a thought the held-out tokens are predicted worse than by the starting model"
        " without one",
        0: "No effect: a prediction with a thought can not be told from the starting model's"
        " without one",
    }
    change = _by_training(_measured(before, "gain_over_start_nats"), gain)
    return [f"{words[gain.sign]}: {gain}{change}.", *_over_own_no_think(after)]


def _documents(line: dict) -> int:
    """Documents of the panel; where only positions are counted, there are at most as many."""
    return int(line.get("panel_documents", line.get("panel_positions", 0)))


def _measured(lines: list[dict], name: str) -> Measured | None:
    """Of one run with its own interval, of several their mean with that over seeds; None where
    some run has no interval."""
    keys = (name, f"{name}_low", f"{name}_high")
    if not lines or any(line.get(key) is None for line in lines for key in keys):
        return None
    if len(lines) == 1:
        return Measured(*(lines[0][key] for key in keys))
    values = tuple(line[name] for line in lines)
    return Measured(fmean(values), *t_interval(values), values)


def _by_training(before: Measured | None, after: Measured) -> str:
    """What training did to the gain."""
    if before is None:
        return ""
    change = {
        1: "training raised it",
        -1: "training lowered it",
        0: "training did not clearly change it",
    }[after.moved_from(before)]
    return f"; before training it was {before.mean:+.3f}, so {change}"


def _over_own_no_think(after: list[dict]) -> list[str]:
    """Whether thoughts help the trained model itself, and whether it got worse without them."""
    gain, own, start = (
        _measured(after, name)
        for name in ("gain_over_no_think_nats", "no_think_logprob_nats", "start_logprob_nats")
    )
    if gain is None:
        return []
    effect = {1: "Thoughts help", -1: "Thoughts harm", 0: "No effect of thoughts"}[gain.sign]
    sentence = f"{effect} against its own prediction without one: {gain}."
    if own is None or start is None:
        return [sentence]
    moved = own.mean - start.mean
    direction = own.moved_from(start)
    if direction < 0:
        return [
            f"{sentence} SELF-HARM: without a thought it predicts {-moved:.3f} nats worse than the"
            " start did, and that much of this gain is none."
        ]
    than_start = f"about as the start did ({moved:+.3f} nats)"
    if direction > 0:
        than_start = f"{moved:.3f} nats better than the start did"
    return [f"{sentence} No self-harm seen: without a thought it predicts {than_start}."]


def budget_in_words(match: dict | None) -> str:
    """Whether a run has spent what the run has that it is compared with; empty where it is compared
    with none.

    Args:
        match: `match` of its summary.
    """
    if not match:
        return ""
    spent = f"{match['by']} {match['ratio']:.3f} of the other run's"
    if abs(match["ratio"] - 1) <= TOLERANCE:
        return f"matched: {spent}"
    allowed = f"allowed {1 - TOLERANCE:g} to {1 + TOLERANCE:g}"
    return f"NOT MATCHED: {spent}, {allowed}: no comparison"
