"""curves.png: accuracy and gain along pretraining, against FLOPs and against seconds, thoughts at
T 1. post_training.png: accuracy along both stages of post-training, thoughts at both temperatures.

Lines are means over seeds; a band, of the second, holds all of them.
"""

from pathlib import Path

import numpy as np
from analyze import METRICS, WORDS, at, stations
from arms import ARMS, POST_TRAINED, REFERENCE
from lines import RLVR_FROM, STEPS, TEMPERATURES

from rlp.measure.results_file import Results

COLORS = {
    "rlp": "#d55e00",
    "base": "#999999",
    "base_best_of_g": "#444444",
    "cpt": "#56b4e9",
    "cpt_replay": "#0072b2",
    "mixed_sft": "#cc79a7",
    "greedy_match": "#e69f00",
    "rpt": "#f0c419",
    "rlvr": "#7b3294",
    "rlp_lm": "#009e73",
    "shuffled_reward": "#b5b500",
    "other_thought": "#000000",
    "rlp_entropy": "#a6d96a",
    "rlp_uniform": "#8c510a",
    "rlp_paper": "#c7a17a",
    "rlp_fast": "#fdae61",
    "rlp_bounded": "#b2182b",
    "cpt_seconds": "#80cdc1",
}


def draw(results: Results, folder: Path) -> None:
    """Both files, into a folder."""
    draw_curves(results, folder / "curves.png")
    draw_post_training(results, folder / "post_training.png")


def draw_curves(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, amount in enumerate(("flops", "seconds")):
        for row, metric in enumerate(("accuracy_with_thought", "gain_over_start_nats")):
            axis = axes[row][column]
            for arm in ARMS:
                places, values = curve_of(results, arm, amount, metric)
                if len(places) > 1:
                    width = 2.2 if arm == REFERENCE else 1.2
                    axis.plot(
                        places, values, ".-", color=COLORS[arm], linewidth=width, label=WORDS[arm]
                    )
            axis.set_xlabel("FLOPs" if amount == "flops" else amount)
            _plain(axis)
        axes[0][0].set_ylabel(METRICS["accuracy_with_thought"])
        axes[1][0].set_ylabel(f"{METRICS['gain_over_start_nats']}, nats")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)


def curve_of(
    results: Results, arm: str, amount: str, metric: str
) -> tuple[list[float], list[float]]:
    """Mean amounts and mean numbers over seeds, at the points that every seed has."""
    lines = results.where(arm=arm, stage="pretrain", temperature=1.0)
    seeds = [lines.where(seed=seed).lines for seed in lines.values("seed")]
    seeds = [sorted(points, key=lambda line: line["stage_step"]) for points in seeds]
    if not seeds:
        return [], []
    # The last points stand at other steps from seed to seed, and belong together all the same.
    shortest = min(len(points) for points in seeds)
    chosen = [[*points[: shortest - 1], points[-1]] for points in seeds]
    grid = np.array([[[line[amount], line[metric]] for line in points] for points in chosen])
    places, values = grid.mean(axis=0).T
    return places.tolist(), values.tolist()


def draw_post_training(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True, sharex="col")
    for row, temperature in enumerate(TEMPERATURES):
        for column, stage in enumerate(STEPS):
            axis, points = axes[row][column], stations(results, stage, temperature)
            for arm in POST_TRAINED:
                seeds = [
                    list(part.by_seed(arm, "accuracy_with_thought").values()) for _, part in points
                ]
                if all(seeds):
                    steps, color = [step for step, _ in points], COLORS[arm]
                    means = [np.mean(part) for part in seeds]
                    axis.plot(steps, means, ".-", color=color, label=WORDS[arm])
                    ends = [[extreme(part) for part in seeds] for extreme in (min, max)]
                    axis.fill_between(steps, *ends, color=color, alpha=0.08, linewidth=0)
            axis.axhline(0.25, color="#999999", linewidth=0.8, linestyle=":")
            _plain(axis)
        axes[row][0].set_ylabel(f"accuracy, thoughts at {at(temperature)}")
    axes[1][0].set_xlabel("steps of SFT")
    axes[1][1].set_xlabel(f"steps of RLVR, from step {RLVR_FROM} of SFT")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=100)


def _plain(axis: object) -> None:
    axis.grid(color="#e8e8e8")
    axis.spines[["top", "right"]].set_visible(False)
