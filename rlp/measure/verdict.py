"""What a run's numbers say in words: whether thoughts gain, whether the gain is self-harm, whether
the run has spent what it was to spend.

An effect is claimed only where a 95 % interval leaves 0 out, and none at all below
`LEAST_DOCUMENTS` held-out documents. Of several runs (one arm, several seeds) the mean is told,
with the interval that holds the intervals of all.
"""

from statistics import fmean
from typing import NamedTuple

TOLERANCE = 0.01
"""Largest relative difference of what two matched runs have spent."""

LEAST_DOCUMENTS = 30
"""A bootstrap over fewer documents gives intervals that are too short."""


class Measured(NamedTuple):
    """A number of the panel with its 95 % interval, in nats."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} nats (95 % interval {self.low:+.3f} to {self.high:+.3f})"

    @property
    def sign(self) -> int:
        """1 where it is clearly above 0, -1 where it is clearly below, 0 where the interval holds
        0."""
        return (self.low > 0) - (self.high < 0)


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
    """Mean over runs, and the interval that holds all of theirs; None where some run has no
    interval."""
    keys = (name, f"{name}_low", f"{name}_high")
    if not lines or any(line.get(key) is None for line in lines for key in keys):
        return None
    return Measured(
        fmean(line[name] for line in lines),
        min(line[keys[1]] for line in lines),
        max(line[keys[2]] for line in lines),
    )


def _by_training(before: Measured | None, after: Measured) -> str:
    """What training did to the gain. A change is clear where the two intervals do not overlap."""
    if before is None:
        return ""
    change = "training did not clearly change it"
    if after.low > before.high:
        change = "training raised it"
    elif after.high < before.low:
        change = "training lowered it"
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
    if own.high < start.low:
        return [
            f"{sentence} SELF-HARM: without a thought it predicts {-moved:.3f} nats worse than the"
            " start did, and that much of this gain is none."
        ]
    than_start = f"about as the start did ({moved:+.3f} nats)"
    if own.low > start.high:
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
