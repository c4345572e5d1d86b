"""Tables, figures and verdict of the comparison, all from results.jsonl.

    python experiments/flop_matched/analyze.py RESULTS            # prints them
    python experiments/flop_matched/analyze.py RESULTS --readme README.md --figures FOLDER

Differences are RLP minus the arm, paired by seed, with 95 % intervals: the percentile bootstrap of
the mean over seeds (scipy, 9999 resamples). With five seeds such an interval is somewhat too short;
it is a guide, no proof.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

STAGES = {
    "pretrain": "after pretraining",
    "sft": "after the same SFT",
    "rlvr": "after the same SFT and RLVR",
}
METRICS = {
    "accuracy_with_thought": "accuracy with a thought",
    "accuracy_without_thought": "accuracy without",
    "gain_over_start_nats": "gain over start, nats",
}
ARMS = {
    "base": "base",
    "cpt_tokens": "CPT (same tokens)",
    "cpt_flops": "CPT (same FLOPs)",
    "mixed_sft": "mixed SFT",
    "greedy_match": "greedy match",
    "rlp": "RLP",
    "rlp_lm": "RLP + LM",
    "shuffled_reward": "placebo (shuffled reward)",
    "foreign_thought": "placebo (foreign thought)",
}
COLORS = (
    "#999999",
    "#56b4e9",
    "#0072b2",
    "#cc79a7",
    "#e69f00",
    "#d55e00",
    "#009e73",
    "#bbbb00",
    "#000000",
)


def read_results(path: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """(arm, stage) -> seed -> line."""
    results: dict[tuple[str, str], dict[int, dict]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        value = json.loads(line)
        results[value["arm"], value["stage"]][value["seed"]] = value
    return results


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    from scipy import stats

    if len(set(differences)) < 2:
        return differences[0], differences[0]
    found = stats.bootstrap(
        (np.array(differences),),
        np.mean,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def difference(results: dict, arm: str, stage: str, metric: str) -> tuple[float, float, float]:
    """RLP minus an arm, paired by seed: mean, low, high."""
    ours, theirs = results["rlp", stage], results[arm, stage]
    pairs = [ours[seed][metric] - theirs[seed][metric] for seed in sorted(ours) if seed in theirs]
    return float(np.mean(pairs)), *interval(pairs)


def table(results: dict, stage: str) -> str:
    """One stage: means over seeds, and RLP minus the arm."""
    lines = [
        "| arm | "
        + " | ".join(METRICS.values())
        + " | "
        + " | ".join(f"RLP minus arm: {words}" for words in METRICS.values())
        + " |",
        "|---" * (1 + 2 * len(METRICS)) + "|",
    ]
    for arm, words in ARMS.items():
        if (arm, stage) not in results:
            continue
        means = [
            f"{np.mean([line[metric] for line in results[arm, stage].values()]):.3f}"
            for metric in METRICS
        ]
        differences = [
            (
                ""
                if arm == "rlp"
                else "{:+.3f} ({:+.3f} to {:+.3f})".format(*difference(results, arm, stage, metric))
            )
            for metric in METRICS
        ]
        lines.append(f"| {words} | " + " | ".join(means + differences) + " |")
    return "\n".join(lines)


def costs(results: dict) -> str:
    """What each arm spent in pretraining, mean over seeds."""
    lines = [
        (
            "| arm | seeds | input tokens | FLOPs | paper's T_flop | seconds | held-out loss, nats"
            " a token |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for arm, words in ARMS.items():
        rows = list(results.get((arm, "pretrain"), {}).values())
        if rows:
            mean = {
                name: np.mean([row[name] for row in rows])
                for name in (
                    "input_tokens",
                    "flops",
                    "paper_flops",
                    "seconds",
                    "document_loss_nats",
                )
            }
            lines.append(
                f"| {words} | {len(rows)} | {mean['input_tokens']:,.0f} | {mean['flops']:.3g} |"
                f" {mean['paper_flops']:,.0f} | {mean['seconds']:.1f} |"
                f" {mean['document_loss_nats']:.3f} |"
            )
    return "\n".join(lines)


def verdict(results: dict) -> str:
    """What the intervals of accuracy with a thought say, stage by stage."""
    said = []
    for stage, words in STAGES.items():
        groups: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
        for arm in ARMS:
            if arm != "rlp" and (arm, stage) in results:
                _, low, high = difference(results, arm, stage, "accuracy_with_thought")
                groups[
                    "above" if low > 0 else "below" if high < 0 else "not told apart from"
                ].append(ARMS[arm])
        said.append(
            f"- {words}: RLP is "
            + "; ".join(
                f"{relation} {', '.join(arms)}" for relation, arms in groups.items() if arms
            )
            + "."
        )
    return "\n".join(said)


def sections(results: dict) -> dict[str, str]:
    """Every generated part of the README, by name."""
    return {"verdict": verdict(results), "costs": costs(results)} | {
        stage: table(results, stage) for stage in STAGES
    }


def fill(readme: str, parts: dict[str, str]) -> str:
    """The README with its parts between `<!-- NAME -->` and `<!-- end -->` replaced.

    Raises:
        ValueError: a part has no place.
    """
    for name, text in parts.items():
        start = readme.find(f"<!-- {name} -->")
        end = readme.find("<!-- end -->", start)
        if start < 0 or end < 0:
            raise ValueError(
                f"the README has no <!-- {name} --> ... <!-- end -->; write the two lines where the"
                " part belongs."
            )
        readme = readme[:start] + f"<!-- {name} -->\n{text}\n" + readme[end:]
    return readme


def draw(results: dict, folder: Path) -> None:
    """curves.png: accuracy and gain against tokens, FLOPs and seconds; stages.png: accuracy after
    each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for column, (name, words) in enumerate(
        {"input_tokens": "input tokens", "flops": "FLOPs", "seconds": "seconds"}.items()
    ):
        for row, metric in enumerate(("accuracy_with_thought", "gain_over_start_nats")):
            for (arm, label), color in zip(ARMS.items(), COLORS):
                lines = [
                    line["curve"]
                    for line in results.get((arm, "pretrain"), {}).values()
                    if line.get("curve")
                ]
                for index, points in enumerate(lines):
                    axes[row][column].plot(
                        [point[name] for point in points],
                        [point[metric] for point in points],
                        color=color,
                        linewidth=1,
                        alpha=0.7,
                        label=label if index == 0 else None,
                    )
            axes[row][column].set_xlabel(words)
            axes[row][column].grid(color="#e8e8e8")
            axes[row][column].spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel(METRICS["accuracy_with_thought"])
        axes[1][0].set_ylabel(METRICS["gain_over_start_nats"])
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False
    )
    figure.savefig(folder / "curves.png", dpi=110)

    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for index, ((arm, label), color) in enumerate(zip(ARMS.items(), COLORS)):
        values = [
            [line["accuracy_with_thought"] for line in results[arm, stage].values()]
            for stage in STAGES
            if (arm, stage) in results
        ]
        places = [place + (index - 4) * 0.09 for place in range(len(values))]
        axis.bar(places, [np.mean(part) for part in values], width=0.08, color=color, label=label)
        for place, part in zip(places, values):
            axis.plot([place] * len(part), part, ".", color="#333333", markersize=3)
    axis.set_xticks(range(len(STAGES)), STAGES.values())
    axis.set_ylabel(METRICS["accuracy_with_thought"])
    axis.axhline(0.25, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(folder / "stages.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables, figures and verdict from results.jsonl.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="fill in the generated parts of this file")
    parser.add_argument(
        "--figures", type=Path, help="write curves.png and stages.png into this folder"
    )
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    parts = sections(results)
    print("\n\n".join(f"{name}\n{text}" for name, text in parts.items()))
    if arguments.readme:
        arguments.readme.write_text(fill(arguments.readme.read_text(), parts))
    if arguments.figures:
        draw(results, arguments.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
