"""Figures that are means over questions, and how far they would go with other questions.

A figure is a mean over questions of each row (a model, a pair, a community), and then over rows.
Its interval is that of the middle 95 % of `DRAWS` resamples of the questions; models and answers
are taken as they are.

Dimensions
    R  rows;  Q  questions
"""

import numpy as np

DRAWS = 1000
"""Resamples of the questions behind an interval."""

DIGITS = 10
"""Decimals of a figure; what lies behind them is the order of a sum."""


def mean_over(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[...]: means over questions, then over rows; NaN where there is none.

    Args:
        values: [R, Q]; NaN where it was not measured.
        weights: [..., Q], how often each question counts.
    """
    whole = np.isfinite(values)
    sums = weights @ np.where(whole, values, 0).T
    counts = weights @ whole.T.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = sums / counts
    measured = np.isfinite(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measured, rows, 0).sum(axis=-1) / measured.sum(axis=-1)


def resamples(questions: int) -> np.ndarray:
    """[DRAWS, Q]: how often each question comes in each resample. The same for the same number."""
    drawn = np.random.default_rng(questions).integers(questions, size=(DRAWS, questions))
    counts = np.zeros((DRAWS, questions))
    np.add.at(counts, (np.arange(DRAWS)[:, None], drawn), 1)
    return counts


def as_number(value: float) -> float | None:
    """As JSON holds it: None where it was not measured."""
    return round(float(value), DIGITS) + 0.0 if np.isfinite(value) else None


def interval(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resamples, of those that measured anything."""
    there = values[np.isfinite(values)]
    return [as_number(end) for end in np.percentile(there, (2.5, 97.5))] if len(there) else None
