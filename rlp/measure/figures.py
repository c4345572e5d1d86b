"""Figures of a report: small pictures that the page carries, drawn as SVG. Numbers come in, a data
URL goes out."""

import base64
import io
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, ScalarFormatter

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#882255",
    "#999933",
    "#888888",
)
"""Okabe and Ito's palette without its yellow, told apart by colour-blind readers too, and three of
Tol's after it."""

LINES = ("-", "--", ":")

GREY = "#777777"

MARGIN_INCHES, LABEL_GAP_INCHES = 0.57, 0.04
"""Left of the axes of a curve, and left of the labels that stand there; a label that needs more
gets more."""

_RC = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "axes.axisbelow": True,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "rlp report",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity of one run, or of several runs that differ in their seed."""

    x: np.ndarray
    """[X]."""
    values: np.ndarray
    """[runs, X]."""
    color: str
    line: str
    dots: bool
    """Few and exact values, as evaluations are, and not one for each step."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the range that goes with it; without one, `low` and `high` are the value."""

    value: float
    low: float
    high: float


def draw_curves(
    curves: list[Curve],
    keys: list[tuple[str, str, str]],
    *,
    unit: str,
    x_label: str,
    size: tuple[float, float],
) -> str:
    """Curves over steps, tokens, FLOPs or seconds.

    Args:
        keys: (label, color, line) of the legend; none for no legend.
        size: inches.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _framed(size, left=MARGIN_INCHES)
        for curve in curves:
            _draw_curve(axes, curve)
        _label_y(axes)
        if unit.startswith("nats") and axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
            axes.axhline(0, color="#999999", linewidth=0.8, zorder=1)
        if x_label == "step":
            axes.xaxis.get_major_locator().set_params(integer=True)
        elif max(curve.x.max() for curve in curves) >= 1000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x_label, color="#555555")
        if keys:
            axes.legend(
                [Line2D([], [], color=color, linestyle=line) for _, color, line in keys],
                [label for label, _, _ in keys],
                frameon=False,
                fontsize=8,
                loc="best",
            )
        _make_room(figure, axes)
        return _data_url(figure)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    """Evaluations as they are; steps thin, with the mean of their neighbours over them. Several
    runs: their mean, and a band from the least to the largest."""
    few = curve.dots or len(curve.x) < 20
    values = curve.values if few else np.stack([neighbour_mean(run) for run in curve.values])
    if len(values) > 1:
        axes.fill_between(
            curve.x,
            values.min(axis=0),
            values.max(axis=0),
            color=curve.color,
            alpha=0.15,
            linewidth=0,
        )
    elif not few:
        axes.plot(
            curve.x, curve.values[0], curve.line, color=curve.color, linewidth=0.7, alpha=0.35
        )
    axes.plot(
        curve.x,
        values.mean(axis=0),
        curve.line,
        color=curve.color,
        marker="o" if few else None,
        markersize=3,
        linewidth=1.7,
    )


def neighbour_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours, 1/40 of the curve on either side, fewer at the
    ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def draw_intervals(
    rows: list[str], series: list[tuple[str, dict[str, Interval]]], *, x_label: str
) -> str:
    """Values with their ranges: a row for each name, in it a dot for each of the series (color,
    interval by row)."""
    height = 0.13 * len(series) + 0.14
    with matplotlib.rc_context(_RC | {"axes.grid.axis": "x"}):
        figure, axes = _framed((5.6, len(rows) * height + 0.55), left=1.95)
        for index, (color, intervals) in enumerate(series):
            for name, interval in intervals.items():
                if name not in rows:
                    continue
                y = rows.index(name) + ((index + 0.5) / len(series) - 0.5) * (1 - 0.14 / height)
                axes.plot(
                    [interval.low, interval.high],
                    [y, y],
                    color=color,
                    linewidth=1.6,
                    solid_capstyle="butt",
                )
                axes.plot([interval.value], [y], "o", color=color, markersize=4.5)
        axes.axvline(0, color="#999999", linewidth=0.8, zorder=1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0, labelcolor="#1c1c1c")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label, color="#555555")
        _make_room(figure, axes)
        return _data_url(figure)


def _label_y(axes: Axes) -> None:
    """Labels that each say the whole number: what matplotlib takes out of them, and writes above
    the axes, nobody sees there."""
    largest = max(map(abs, axes.get_ylim()))
    plain = ScalarFormatter(useOffset=False)
    powers = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(plain if 1e-3 <= largest < 1e5 else powers)


def _make_room(figure: Figure, axes: Axes) -> None:
    """Move the left edge of the axes until the widest label beside them is inside the figure."""
    labels = axes.yaxis.get_tightbbox(figure.canvas.get_renderer())
    if labels is None or labels.x0 >= LABEL_GAP_INCHES * figure.dpi:
        return
    frame, width = axes.get_position(), figure.get_figwidth()
    left = frame.x0 + (LABEL_GAP_INCHES - labels.x0 / figure.dpi) / width
    axes.set_position((left, frame.y0, frame.x1 - left, frame.height))


def _framed(size: tuple[float, float], *, left: float) -> tuple[Figure, Axes]:
    """A figure and its axes, with fixed margins in inches: axes line up on the page, and a fitted
    layout would draw everything twice."""
    width, height = size
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)  # it measures labels
    return figure, figure.add_axes(
        (left / width, 0.44 / height, (width - left - 0.13) / width, (height - 0.54) / height)
    )


def _data_url(figure: Figure) -> str:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
