"""The gain of a thought on the held-out panel, taken apart: columns, means and intervals.

The gain of a thought is reported against six predictions of the same targets:

    start       the starting checkpoint's, without a thought; in a run it is computed once and kept
    ema         the EMA's, without a thought: the baseline of the reward
    no_think    the policy's own, without a thought
    empty       the policy's own after an open and a close marker: what the format alone does
    shuffled    the policy's own after the thoughts of another document: what a thought about
                something else does

A policy that gets worse without thoughts raises the gain over the EMA and over its own no-think
prediction, and not that over the start. A thought that says something about its prefix gains over
the shuffled one.

The best of G thoughts gains even where thoughts are noise, if the targets that it is chosen by are
those that it is scored on. So what there is to select is measured in two other ways. With a horizon
of 2 or more one half of the targets chooses and the other half scores, each in turn, a and b:

    [S_a(argmax_c S_b(c)) + S_b(argmax_c S_a(c))] - S_no_think,    S(c) = S_a(c) + S_b(c)

And the thought after which the model is surest of its next token, whatever that is, is scored on
all of them; no target chooses it, so this works with a horizon of 1 too.

A panel is a sample of documents: intervals draw documents, with all their positions, with
replacement.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  C  columns
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlp.measure.panel import PANEL_SEED, Panel, PanelThoughts

CONFIDENCE, NUM_RESAMPLES = 0.95, 2000
"""Of the bootstrap intervals."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """What a panel said of a model: the gain of a thought, taken apart."""

    panel: Panel
    thoughts: PanelThoughts
    columns: dict[str, np.ndarray]
    """[M] float64 each, by the names of `EVALUATION` in `rlp/measure/metrics.py`: what was measured
    at each position. A gain is the mean over its thoughts."""
    reasoned_logprob: np.ndarray
    """[M, G] float64, nats: S_pred of each thought (eq. 3)."""
    means: dict[str, float]
    """The columns' means, and what is a number of the whole panel. What could not be measured is
    left out."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals of the means; empty for a panel of one document."""

    def numbers(self) -> dict[str, float]:
        """Means and the ends of their intervals, by the names of `EVALUATION`."""
        ends = {
            f"{name}_{end}": value
            for name, interval in self.intervals.items()
            for end, value in zip(("low", "high"), interval)
        }
        return self.means | ends


def decompose(
    panel: Panel,
    thoughts: PanelThoughts,
    answers: dict[str, np.ndarray],
    start_logprob: np.ndarray,
    close_tokens: int,
) -> Decomposition:
    """Columns, means and intervals from what was predicted.

    Args:
        answers: as `rlp.measure.panel_scoring` gives them.
        start_logprob: [M] nats.
        close_tokens: of the close marker.
    """
    reasoned = answers["reasoned"]
    lengths = thoughts.lengths() - close_tokens * ~thoughts.truncated
    columns = _columns(thoughts, answers, lengths, start_logprob)
    means, intervals = _ratios(panel, columns, answers["document_loss"])

    correlation, interval = _length_correlation(panel, reasoned, lengths)
    if correlation is not None:
        means["reward_length_correlation"] = correlation
        intervals |= interval
    finite = {name: ends for name, ends in intervals.items() if np.isfinite(ends).all()}
    means |= {"panel_positions": len(panel), "panel_documents": len(panel.documents)}
    return Decomposition(panel, thoughts, columns, reasoned, means, finite)


def _columns(
    thoughts: PanelThoughts,
    answers: dict[str, np.ndarray],
    lengths: np.ndarray,
    start_logprob: np.ndarray,
) -> dict[str, np.ndarray]:
    """What was measured at each position: [M] float64 each."""
    reasoned = answers["reasoned"]
    mean_reasoned = reasoned.mean(axis=1)
    without = {"start": start_logprob}
    if "baseline" in answers:
        without["ema"] = answers["baseline"]
    without |= {name: answers[name] for name in ("no_think", "empty")}
    if "shuffled" in answers:
        without["shuffled"] = answers["shuffled"].mean(axis=1)

    columns = {
        f"gain_over_{name}_nats": mean_reasoned - logprob for name, logprob in without.items()
    }
    columns |= {
        "positive_gain_frac": mean_reasoned > start_logprob,
        "accuracy_with_thought": answers["right_with"].mean(axis=1),
        "accuracy_without_thought": answers["right_without"],
        "thought_tokens_mean": lengths.mean(axis=1),
        "thought_truncated_frac": thoughts.truncated.mean(axis=1),
        "thought_empty_frac": (lengths == 0).mean(axis=1),
        "reasoned_logprob_nats": mean_reasoned,
    }
    columns |= {f"{name}_logprob_nats": logprob for name, logprob in without.items()}
    columns["open_marker_mass"] = answers["open_marker"]
    if reasoned.shape[1] > 1:
        columns["reward_group_std_nats"] = reasoned.std(axis=1, ddof=1)
        columns |= _selected(answers)
    return {name: values.astype(np.float64) for name, values in columns.items()}


def _selected(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a thought is worth that was not chosen by what it is scored on: [M] each."""
    surest = answers["surest"].argmax(axis=1)[:, None]
    found = {
        f"surest_thought_{name}": np.take_along_axis(answers[values], surest, axis=1)[:, 0]
        for name, values in (("gain_nats", "reasoned"), ("accuracy", "right_with"))
    }
    found["surest_thought_over_empty_nats"] = found["surest_thought_gain_nats"] - answers["empty"]
    found["surest_thought_gain_nats"] -= answers["no_think"]
    if "reasoned_halves" in answers:
        halves, without = answers["reasoned_halves"], answers["no_think_halves"]
        chosen_by_other = halves.argmax(axis=1)[:, None, ::-1]
        scored = np.take_along_axis(halves, chosen_by_other, axis=1)[:, 0]
        found["cross_selected_gain_nats"] = (scored - without).sum(axis=1)
        found["cross_selected_over_empty_nats"] = scored.sum(axis=1) - answers["empty"]
    return found


def _ratios(
    panel: Panel, columns: dict[str, np.ndarray], document_loss: np.ndarray
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means of the columns over positions and of the loss over tokens, and their intervals."""
    document_tokens = np.array([len(document.tokens) - 1 for document in panel.documents])
    summed = [panel.sum_over_documents(values) for values in columns.values()]
    totals = np.stack([*summed, document_loss])
    counts = np.stack([panel.num_positions()] * len(columns) + [document_tokens])

    names = [*columns, "document_loss_nats"]
    means = dict(zip(names, _ratio(totals.sum(axis=1), counts.sum(axis=1)).tolist()))
    return means, dict(zip(names, bootstrap_intervals(_ratio, totals, counts)))


def _length_correlation(
    panel: Panel, reasoned: np.ndarray, lengths: np.ndarray
) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """Within-group correlation of thought length and reward, and its interval by name; None where
    one of the two does not vary."""
    reward, length = (values - values.mean(axis=1, keepdims=True) for values in (reasoned, lengths))
    covariance, reward_variance, length_variance = (
        panel.sum_over_documents((one * other).sum(axis=1))
        for one, other in ((reward, length), (reward, reward), (length, length))
    )
    if not (reward_variance.sum() > 0 and length_variance.sum() > 0):
        return None, {}
    moments = (covariance, reward_variance, length_variance)
    correlation = _correlation(*(moment.sum() for moment in moments))
    intervals = bootstrap_intervals(_correlation, *(moment[None] for moment in moments))
    return float(correlation), dict(zip(["reward_length_correlation"], intervals))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / count


def _correlation(
    covariance: np.ndarray, variance: np.ndarray, other_variance: np.ndarray
) -> np.ndarray:
    """0 where one of the two does not vary."""
    scale = np.sqrt(variance * other_variance)
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0)


def bootstrap_intervals(of_sums: Callable, *parts: np.ndarray) -> list[tuple[float, float]]:
    """95 % percentile intervals of statistics of sums over documents, documents drawn with
    replacement.

    Positions of one document share their prefix, so they are drawn together. The same documents are
    drawn for every statistic.

    Args:
        of_sums: what is made of the sums of the parts, each [C] and more axes.
        parts: [C, B], what each document adds.

    Returns:
        C pairs; none for a single document.
    """
    if parts[0].shape[1] < 2:
        return []
    from scipy.stats import bootstrap

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return of_sums(*(part.sum(axis=axis) for part in drawn))

    low, high = bootstrap(
        parts,
        statistic,
        paired=True,
        vectorized=True,
        axis=1,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        batch=250,
        method="percentile",
        rng=np.random.default_rng(PANEL_SEED),
    ).confidence_interval
    return list(zip(low.tolist(), high.tolist()))
