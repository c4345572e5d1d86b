"""Figures of a report: which there are, and the curves and intervals that they are drawn from."""

from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rlp.measure.figures import (
    COLORS,
    GREY,
    LINES,
    Curve,
    Interval,
    draw_curves,
    draw_intervals,
)
from rlp.measure.metrics import EVALUATION
from rlp.measure.report_runs import Arm
from rlp.measure.report_tables import GAINS, different_lines


@dataclass(frozen=True, slots=True)
class Plot:
    """One small figure: curves from `metrics.jsonl` or `evaluation.jsonl`."""

    title: str
    unit: str
    note: str
    """What it shows, for who sees it for the first time."""
    names: tuple[str, ...]
    labels: tuple[str, ...] = ("",)


MAIN_PLOTS = (
    Plot(
        "Gain on held-out positions",
        "nats",
        "How much a thought raises the log-probability of the token that really came next.",
        ("gain_over_start_nats", "gain_over_ema_nats"),
        ("over the start", "over the EMA"),
    ),
    Plot(
        "Accuracy on held-out positions",
        "fraction",
        "How often the most probable token is the one that really came next.",
        ("accuracy_with_thought", "accuracy_without_thought"),
        ("with a thought", "without"),
    ),
)
"""Drawn over each axis."""

PLOTS = (
    Plot("Reward", "", "Mean of what the step's thoughts were rewarded with.", ("reward/mean",)),
    Plot(
        "Information gain",
        "nats",
        "How much the step's thoughts raised the log-probability of the token that really came"
        " next.",
        ("gain/mean",),
    ),
    Plot(
        "How many are rewarded",
        "fraction",
        "Thoughts, and positions on average over their thoughts, with a reward above 0.",
        ("reward/positive_frac", "reward/positive_positions_frac"),
        ("thoughts", "positions"),
    ),
    Plot(
        "Positions with nothing to learn",
        "fraction",
        "All thoughts of the position have the same reward.",
        ("reward/flat_groups_frac",),
    ),
    Plot(
        "Thought length",
        "tokens",
        "Sampled tokens, the close marker not counted.",
        ("thought/tokens_mean", "thought/tokens_std"),
        ("mean", "standard deviation"),
    ),
    Plot(
        "Thoughts cut off, thoughts empty",
        "fraction",
        "Ended by the budget; closed at once.",
        ("thought/truncated_frac", "thought/empty_frac"),
        ("cut off", "empty"),
    ),
    Plot(
        "Variety of thoughts",
        "fraction",
        "Among the thoughts of a position: different word pairs over all (a fall: they become one"
        " template), word pairs that a sibling has too, and pairs of thoughts that are the same.",
        (
            "thought/distinct_bigrams_frac",
            "thought/sibling_overlap_frac",
            "thought/duplicates_frac",
        ),
        ("different", "shared", "the same thought"),
    ),
    Plot(
        "What thoughts repeat",
        "fraction",
        "Copied from the context; holding the target itself; written in another script than the"
        " context.",
        ("thought/copied_frac", "thought/holds_target_frac", "thought/script_switch_frac"),
        ("context", "target", "other script"),
    ),
    Plot(
        "Language of thoughts",
        "fraction",
        "Of their letters those of the thought's most frequent script, and those of reward.script"
        " where one is named; and thoughts that mix scripts.",
        (
            "thought/script_purity_frac",
            "thought/target_script_frac",
            "thought/mixed_scripts_frac",
        ),
        ("most frequent script", "reward.script", "thoughts that mix"),
    ),
    Plot(
        "Entropy of thought tokens",
        "nats per token",
        "How open the choice of the next thought token is. Near 0: always the same thought.",
        ("policy/entropy",),
    ),
    Plot("Gradient norm", "", "Before clipping.", ("optim/grad_norm",)),
    Plot(
        "Loss on training documents",
        "nats per token",
        "Next-token loss without thoughts.",
        ("lm/loss",),
    ),
    Plot(
        "Loss on held-out documents",
        "nats per token",
        "The same on documents that are not trained on.",
        ("document_loss_nats",),
    ),
    Plot(
        "Urge to think",
        "probability",
        "Of the open marker where a thought may start, held out; left out of every prediction that"
        " is scored.",
        ("open_marker_mass",),
    ),
)

AXES = {
    "step": "step",
    "tokens": "input tokens",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}


def small_plots(arms: list[Arm], alone: bool) -> list[dict]:
    """All small plots, over the steps."""
    figures = [_figure(plot, arms, "step", alone, (4.4, 2.6)) for plot in PLOTS]
    return [figure for figure in figures if figure]


def main_plots(arms: list[Arm], alone: bool) -> list[dict]:
    """The main plots over each axis that all runs know; of one run over its steps, as nothing is
    compared."""
    drawn = []
    for axis, label in AXES.items():
        if alone and axis != "step":
            continue
        figures = [_figure(plot, arms, axis, alone, (5.2, 2.8)) for plot in MAIN_PLOTS]
        if any(figures):
            drawn.append(
                {"axis": axis, "label": label, "figures": [figure for figure in figures if figure]}
            )
    return drawn


def _figure(
    plot: Plot, arms: list[Arm], axis: str, alone: bool, size: tuple[float, float]
) -> dict | None:
    """A plot with its caption; None where no run has its numbers. One run has a color per quantity;
    arms have a color each, and a dash per quantity."""
    curves, shown = [], set()
    for arm in arms:
        for j, name in enumerate(plot.names):
            x, values = arm_curve(arm, name, axis)
            if len(x):
                color = COLORS[j] if alone else arm.color
                curves.append(Curve(x, values, color, LINES[j], dots=name in EVALUATION))
                shown.add(j)
    if not curves:
        return None

    keys = []
    if len(plot.names) > 1:
        for j in sorted(shown):
            keys.append((plot.labels[j], COLORS[j] if alone else "#555555", LINES[j]))
    return {
        "title": plot.title,
        "unit": plot.unit,
        "note": plot.note,
        "source": draw_curves(curves, keys, unit=plot.unit, x_label=AXES[axis], size=size),
    }


def arm_curve(arm: Arm, name: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric of an arm: x [X] and values [runs, X], at the steps at which all its runs measured
    it.

    At a step the runs' places on the axis (tokens, FLOPs, seconds) are averaged. Runs that never
    measured it are left out.
    """
    runs = [(run.along(axis), values) for run in arm.runs if (values := run.values(name))]
    if not runs:
        return np.zeros(0), np.zeros((0, 0))
    steps = [
        step
        for step in runs[0][1]
        if all(step in places and step in values for places, values in runs)
    ]
    x = np.array([[places[step] for step in steps] for places, _ in runs], dtype=float)
    y = np.array([[values[step] for step in steps] for _, values in runs], dtype=float)
    return x.mean(axis=0), y


def gains_figure(arms: list[Arm], alone: bool) -> dict | None:
    """What the gain is a gain over: before all runs, and after, arm by arm. None where the controls
    were not measured."""
    ends = [[run.before_and_after() for run in arm.runs] for arm in arms]
    before = _gain_intervals([line for arm in ends for line, _ in arm])
    after = [_gain_intervals([line for _, line in arm]) for arm in ends]
    names = [label for label in GAINS.values() if any(label in intervals for intervals in after)]
    if not {GAINS["gain_over_empty_nats"], GAINS["gain_over_shuffled_nats"]} & set(names):
        return None
    series = [(GREY, before)]
    for arm, intervals in zip(arms, after):
        series.append((COLORS[0] if alone else arm.color, intervals))
    return {
        "source": draw_intervals(names, series, x_label="nats"),
        "grey": GREY,
        "color": COLORS[0],
    }


def _gain_intervals(lines: list[dict]) -> dict[str, Interval]:
    """Gains by label: of one evaluation with its bootstrap interval; of several that differ, their
    mean, least and largest."""
    intervals = {}
    for name, label in GAINS.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        different = different_lines(lines, name)
        if len(different) == 1:
            (line,) = different
            low, high = (line.get(f"{name}_{end}", line[name]) for end in ("low", "high"))
            intervals[label] = Interval(line[name], low, high)
        elif values:
            intervals[label] = Interval(fmean(values), min(values), max(values))
    return intervals
