"""Write the tables and the pictures of README.md from the results.

python experiments/prismatic/analyze.py
"""

import numpy as np
from layouts import (
    GSM8K,
    GSM8K_LAYOUT,
    GSM8K_MEASURES,
    HERE,
    LOOP,
    LOOP_ARMS,
    LOOP_LAYOUT,
    MEASURES,
    PRETRAINING,
    PRETRAINING_ARMS,
    PRETRAINING_LAYOUT,
    RESULTS,
    SET_LAYOUT,
    SUBSETS,
)
from sets import CONTROLLED, SETS

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import Difference, compare
from rlp.measure.results_file import Results, read_results

README, PICTURE = HERE / "README.md", HERE / "sets.png"

NAMES = {
    "g_vendi": "G-Vendi",
    "hidden_vendi": "Vendi of hidden states",
    "ngram_vendi": "Vendi of words (TF-IDF)",
    "word_vendi": "Vendi of words (TF-IDF)",
    "g_vendi_untrained": "G-Vendi, untrained proxy",
    "nats": "mean nats of an answer",
    "skills": "true skills (entropy)",
    "entries": "true entries (entropy)",
    "tokens": "tokens of a problem",
}
ARM_NAMES = {
    "random": "random",
    "words": "sparse in words",
    "hidden": "sparse in hidden states",
    "gradient": "sparse in gradients",
    "all": "all that pass the vote",
}


def spearman(one: list[float], other: list[float]) -> float:
    """Correlation of ranks; equal values share theirs."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def complete(results: Results, arms: tuple[str, ...]) -> list[int]:
    """Seeds of which every arm is there."""
    seeds = results.values("seed")
    return [seed for seed in seeds if set(arms) <= set(results.where(seed=seed).values("arm"))]


def correlations(
    results: Results, arms: tuple[str, ...], measure: str, outcome: str, sign: float = 1.0
) -> dict[int, float]:
    """By seed, over the sets of these arms."""
    found = {}
    for seed in complete(results, arms):
        lines = [line for line in results.where(seed=seed).lines if line["arm"] in arms]
        pairs = [(line[measure], sign * line[outcome]) for line in lines]
        found[seed] = spearman(*zip(*pairs))
    return found


def interval(values: dict[int, float]) -> str:
    """Mean and 95 % t interval over seeds."""
    (one,) = compare(values, {"": dict.fromkeys(values, 0.0)})
    return f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})"


def less(difference: Difference, digits: int = 2) -> str:
    """The reference minus the other: mean, interval, seeds in which it is above, p unadjusted."""
    above = sum(value > 0 for value in difference.differences)
    return (
        f"{difference.mean:+.{digits}f} ({difference.low:+.{digits}f} to"
        f" {difference.high:+.{digits}f});"
        f" {above} of {len(difference.seeds)}; p {difference.p:.3f}"
    )


def sets_table(results: Results) -> str:
    """A line for each measure of A."""
    rows = []
    ours = correlations(results, CONTROLLED, "g_vendi", "accuracy")
    for measure in MEASURES:
        theirs = correlations(results, CONTROLLED, measure, "accuracy")
        (apart,) = compare(ours, {measure: theirs})
        every = correlations(results, SETS, measure, "accuracy")
        beyond = "" if measure == "g_vendi" else less(apart)
        rows.append([NAMES[measure], interval(theirs), beyond, interval(every)])
    return markdown_table(
        ["measure", "18 sets, all right, half new", "G-Vendi minus it; seeds above", "all 24 sets"],
        rows,
    )


def within_table(results: Results) -> str:
    """Does it say more than how many skills there are? Of sets with one number of skills."""
    groups = {}
    for arm in CONTROLLED:
        groups.setdefault(int(arm.split("_")[1]), []).append(arm)
    rows = []
    for skills, arms in groups.items():
        lines = [line for line in results.lines if line["arm"] in arms]
        cells = [f"{np.mean([line[name] for line in lines]):.1f}" for name in VENDIS]
        accuracy = [line["accuracy"] for line in lines]
        rows.append([str(skills), *cells, f"{np.mean(accuracy):.3f}"])
    return markdown_table(["skills", *(NAMES[name] for name in VENDIS), "held-out accuracy"], rows)


VENDIS = ("g_vendi", "hidden_vendi", "ngram_vendi", "g_vendi_untrained")


def loop_table(results: Results) -> str:
    """A line for each arm of B: means over seeds."""
    seeds = complete(results, LOOP_ARMS)
    figures = ("kept", "skills", "covered", "entries", "error_one", "error_kept", "accuracy")
    rows = []
    for arm in LOOP_ARMS:
        lines = [line for line in results.where(arm=arm).lines if line["seed"] in seeds]
        means = {name: np.mean([line[name] for line in lines]) for name in figures}
        rows.append(
            [ARM_NAMES[arm], f"{means['kept']:.0f}"]
            + [f"{means[name]:.1f}" for name in ("skills", "covered", "entries")]
            + [f"{means[name]:.3f}" for name in ("error_one", "error_kept", "accuracy")]
        )
    titles = ["arm", "kept", "skills (entropy)", "skills with 4 or more", "entries (entropy)"]
    titles += ["error of one answer", "error of what is kept", "held-out accuracy"]
    return markdown_table(titles, rows)


def loop_claims(results: Results) -> str:
    """Gradients against each other arm, by the exact paired test."""
    seeds = complete(results, LOOP_ARMS)
    said = []
    for figure in ("skills", "error_kept", "accuracy"):
        by_arm = {
            arm: {s: v for s, v in results.by_seed(arm, figure).items() if s in seeds}
            for arm in LOOP_ARMS
        }
        ours = by_arm.pop("gradient")
        for one in compare(ours, by_arm):
            verdict = one.relation or "no verdict on"
            said.append(
                f"- {figure}: sparse in gradients {verdict} {ARM_NAMES[one.arm]}:"
                f" {one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f}; p {one.adjusted:.3f}, Holm"
                f" over {len(by_arm)}, {len(one.seeds)} seeds)"
            )
    return "\n".join(said)


DIFFERENT = tuple(name for name in SUBSETS if not name.startswith("repeated"))


def gsm8k_table(results: Results) -> str:
    """A line for each measure of C; the sign is such that 1 is a measure that rises where the
    held-out loss falls."""
    rows = []
    for measure in GSM8K_MEASURES:
        cells = [
            interval(correlations(results, arms, measure, "held_out_nats", -1.0))
            for arms in (SUBSETS, DIFFERENT)
        ]
        right = interval(correlations(results, SUBSETS, measure, "held_out_right"))
        rows.append([NAMES[measure], *cells, right])
    return markdown_table(
        [
            "measure",
            f"less held-out loss, {len(SUBSETS)} subsets",
            f"the {len(DIFFERENT)} without repetition",
            "more tokens right, all",
        ],
        rows,
    )


def subsets_table(results: Results) -> str:
    """A line for each subset of C: means over seeds."""
    rows = []
    for name in SUBSETS:
        lines = results.where(arm=name).lines
        means = {
            figure: np.mean([line[figure] for line in lines]) for figure in GSM8K_LAYOUT.figures
        }
        rows.append(
            [name.replace("_", " ")]
            + [f"{means[figure]:.1f}" for figure in ("g_vendi", "hidden_vendi", "word_vendi")]
            + [f"{means['tokens']:.0f}", f"{means['nats']:.2f}"]
            + [f"{means['held_out_nats']:.3f}", f"{means['held_out_right']:.3f}"]
        )
    titles = ["subset", "G-Vendi", "hidden", "words", "tokens", "nats", "held-out nats", "right"]
    return markdown_table(titles, rows)


def pretraining_table(results: Results) -> str:
    """A line for each arm of D: means over seeds, and the selected ones against it."""
    seeds = complete(results, PRETRAINING_ARMS)
    by_arm = {
        arm: {s: v for s, v in results.by_seed(arm, "accuracy").items() if s in seeds}
        for arm in PRETRAINING_ARMS
    }
    ours = by_arm["selected"]
    apart = {
        one.arm: one
        for one in compare(
            ours, {arm: by_arm[arm] for arm in PRETRAINING_ARMS if arm != "selected"}
        )
    }
    rows = []
    for arm in PRETRAINING_ARMS:
        lines = [line for line in results.where(arm=arm).lines if line["seed"] in seeds]
        means = {
            name: np.mean([line[name] for line in lines]) for name in PRETRAINING_LAYOUT.figures
        }
        rows.append(
            [arm, f"{means['distinct']:.0f}", f"{means['straight']:.2f}"]
            + [f"{means['flops']:.3g}", f"{means['before']:.3f}", f"{means['accuracy']:.3f}"]
            + [less(apart[arm], 3) if arm in apart else ""]
        )
    titles = ["documents", "different", "straight", "FLOPs", "accuracy before", "after"]
    return markdown_table([*titles, "selected minus it; seeds above"], rows)


def draw(results: Results) -> None:
    """Each set of A: what three measures say, and the accuracy of its student."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.8), sharey=True)
    for panel, measure in zip(panels, VENDIS):
        for fillers, marker in ((8, "o"), (32, "s"), (128, "^")):
            lines = [
                line
                for line in results.lines
                if line["arm"] in CONTROLLED and line["arm"].endswith(f"_{fillers}")
            ]
            skills = [np.log2(int(line["arm"].split("_")[1])) for line in lines]
            panel.scatter(
                [line[measure] for line in lines],
                [line["accuracy"] for line in lines],
                c=skills,
                cmap="viridis",
                marker=marker,
                s=22,
                label=f"{fillers} fillers",
            )
        panel.set_xlabel(NAMES[measure])
    panels[0].set_ylabel("held-out accuracy of the student")
    panels[0].legend(fontsize=8)
    panels[1].set_title("each mark a set of a seed; the lighter, the more skills", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)


def parts() -> dict[str, str]:
    """What the page has of the results that are there."""
    sets = read_results(RESULTS, SET_LAYOUT)
    loop, gsm8k = read_results(LOOP, LOOP_LAYOUT), read_results(GSM8K, GSM8K_LAYOUT)
    return {
        "sets": sets_table(sets),
        "levels": within_table(sets),
        "loop": loop_table(loop),
        "claims": loop_claims(loop),
        "gsm8k": gsm8k_table(gsm8k),
        "subsets": subsets_table(gsm8k),
        "pretraining": pretraining_table(read_results(PRETRAINING, PRETRAINING_LAYOUT)),
    }


def main() -> None:
    README.write_text(fill_page(README.read_text(), parts()))
    draw(read_results(RESULTS, SET_LAYOUT))


if __name__ == "__main__":
    main()
