"""What thoughts add to the accuracy on a benchmark, and whether that can be told from nothing."""

from dataclasses import dataclass

import numpy as np

from rlp.measure.decomposition import bootstrap_intervals
from rlp.measure.verdict import LEAST_DOCUMENTS

METHOD = "95 % percentile bootstrap over questions"
"""Of the interval. Samples of a question are no new questions, so questions are what is drawn."""


@dataclass(frozen=True, slots=True)
class ThoughtGain:
    """Accuracy with thoughts minus accuracy without, paired by question."""

    mean: float
    standard_error: float | None
    """Over questions; None for a single one."""
    low: float | None
    high: float | None
    """By `METHOD`; None for a single question."""
    questions: int

    @property
    def verdict(self) -> str:
        """In words, in points of a hundred; none below `LEAST_DOCUMENTS` questions."""
        if self.questions < LEAST_DOCUMENTS:
            return (
                f"no verdict: {self.questions} questions, and intervals over fewer than"
                f" {LEAST_DOCUMENTS} say little"
            )
        effect = "no effect of thoughts can be told"
        if self.low > 0:
            effect = "thoughts help"
        elif self.high < 0:
            effect = "thoughts harm"
        low, high = 100 * self.low, 100 * self.high
        return (
            f"{effect}: {100 * self.mean:+.2f} points ({METHOD}, {self.questions} of them:"
            f" {low:+.2f} to {high:+.2f})"
        )


def thought_gain(think: list[dict], no_think: list[dict]) -> ThoughtGain:
    """The gain on a benchmark.

    Args:
        think, no_think: its rows in both modes, which asked the same questions.
    """
    with_thoughts, without = _per_question(think), _per_question(no_think)
    differences = np.array([with_thoughts[key] - without[key] for key in with_thoughts])
    count = len(differences)
    if count == 1:
        return ThoughtGain(float(differences[0]), None, None, None, 1)

    ((low, high),) = bootstrap_intervals(lambda total: total / count, differences[None])
    error = float(differences.std(ddof=1) / count**0.5)
    return ThoughtGain(float(differences.mean()), error, low, high, count)


def _per_question(rows: list[dict]) -> dict[tuple, float]:
    """The mean over samples, by task and question."""
    scores: dict[tuple, list[float]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["question"]), []).append(row["score"])
    return {key: float(np.mean(values)) for key, values in scores.items()}
