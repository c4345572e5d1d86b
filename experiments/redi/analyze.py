"""Write the tables, the claims and the picture of README.md from results.jsonl.

python experiments/redi/analyze.py
"""

import argparse
from pathlib import Path

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import Difference, claim_in_words
from rlp.measure.results_file import Layout, Results, read_results
from rlp.process.schemas import COUNT, PLAIN, Many, Maybe

RESULTS = Path(__file__).parent / "results.jsonl"
FIGURES = (
    "rate",
    "pass_1",
    "pass_8",
    "right",
    "chosen",
    "rejected",
    "slip",
    "after_slip",
    "gradient_first",
    "gradient_last",
    "seconds",
)
"""pass@1 and pass@8 at held-out questions. Log-probabilities in nats a token: of the right traces
of held-out questions, of the chosen and rejected of the arm's pairs, of the first wrong token of a
rejected, and of the tokens behind it that are right where they stand. Norms of the gradient, of the
first and last ten steps. CPU seconds."""

LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=FIGURES,
    others={"pairs": COUNT, "curve": Many(PLAIN), "collapse": Maybe(COUNT)},
)
"""An arm is `NAME@RATE`, or `start`. `curve` is how the start came about; `collapse` the step at
which the alarm fired."""

START = "start"
RATES = (3e-5, 3e-4)
ARMS: dict[str, dict[str, object]] = {
    "alpha_0": {"alpha": 0.0},
    "alpha_0.2": {"alpha": 0.2},
    "alpha_0.5": {"alpha": 0.5},
    "alpha_0.8": {"alpha": 0.8},
    "alpha_1": {"alpha": 1.0},
    "first_wrong": {"alpha": 0.8, "negative": "first_wrong"},
    "after_wrong": {"alpha": 0.8, "negative": "after_wrong"},
    "dpo": {"loss": "dpo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0},
}
"""Settings of the stage `redi`."""
OWN = "own_"
OWN_ARMS = ("alpha_0", "alpha_0.2", "alpha_0.8", "alpha_1", "first_wrong")
"""Of pairs of the start's own traces; they are called `own_NAME@RATE`."""

NAMES = {
    "alpha_0": "alpha 0",
    "alpha_0.2": "alpha 0.2",
    "alpha_0.5": "alpha 0.5",
    "alpha_0.8": "alpha 0.8",
    "alpha_1": "alpha 1",
    "first_wrong": "first wrong",
    "after_wrong": "after wrong",
    "dpo": "DPO",
    "simpo": "SimPO",
}
FAMILIES = {
    "alpha_0": (("alpha_0.2", "alpha_0.5", "alpha_0.8", "alpha_1"), ("dpo", "simpo")),
    "alpha_0.8": (("first_wrong", "after_wrong"),),
}
"""What each reference is compared with at a rate, family by family."""
OWN_FAMILIES = {"alpha_0": (("alpha_0.2", "alpha_0.8", "alpha_1"), ("first_wrong",))}

README = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "redi.png"


def arms_of(own: bool) -> list[tuple[str, str]]:
    """Arms as results have them, by rates, and in words."""
    names = OWN_ARMS if own else tuple(ARMS)
    return [
        (_named(name, rate, own), f"{NAMES[name]}, {rate:g}") for rate in RATES for name in names
    ]


def _named(name: str, rate: float, own: bool) -> str:
    return f"{OWN if own else ''}{name}@{rate:g}"


EVERY = [START, *(arm for own in (False, True) for arm, _ in arms_of(own))]


def complete(results: Results) -> list[int]:
    """Seeds of which every arm is there."""
    return [
        seed
        for seed in results.values("seed")
        if set(results.where(seed=seed).values("arm")) >= set(EVERY)
    ]


def lines_of(results: Results, arm: str) -> list[dict]:
    """Of the complete seeds, in their order."""
    lines = {line["seed"]: line for line in results.where(arm=arm).lines}
    return [lines[seed] for seed in complete(results)]


def start_table(results: Results) -> str:
    """The start on its way, seed by seed."""
    rows = []
    for line in lines_of(results, START):
        curve = line["curve"]
        passes = [f"{one['pass_1']:.3f}, {one['pass_8']:.3f}" for one in curve]
        again = [_of(results, _named("alpha_0", rate, False), line["seed"]) for rate in RATES]
        passes += [f"{one['pass_1']:.3f}, {one['pass_8']:.3f}" for one in again]
        rows.append([str(line["seed"]), str(line["pairs"]), *passes])
    steps = [str(one["steps"]) for one in lines_of(results, START)[0]["curve"]]
    titles = ["seed", "pairs", "base", *(f"start, {one} steps" for one in steps[1:])]
    return markdown_table([*titles, *(f"alpha 0, {rate:g}" for rate in RATES)], rows)


def _of(results: Results, arm: str, seed: int) -> dict:
    (line,) = results.where(arm=arm, seed=seed).lines
    return line


COLUMNS = {
    "pass_1": "pass@1",
    "pass_8": "pass@8",
    "right": "right, held out",
    "chosen": "chosen",
    "rejected": "rejected",
    "slip": "first wrong token",
    "after_slip": "sound tokens behind it",
    "gradient_first": "gradient, first ten steps",
    "gradient_last": "last ten",
}


def table(results: Results, own: bool) -> str:
    """A line for each arm: means over seeds, and how often it collapsed and was above alpha 0."""
    seeds = complete(results)
    arms = [(START, "start"), *arms_of(own)] if not own else arms_of(own)
    rows = []
    for arm, words in arms:
        lines = lines_of(results, arm)
        cells = [words, *(_mean([line[figure] for line in lines]) for figure in COLUMNS)]
        rate = arm.rpartition("@")[2]
        control = None if arm == START else lines_of(results, f"{OWN if own else ''}alpha_0@{rate}")
        for figure in ("pass_1", "pass_8"):
            is_control = control is None or control == lines
            above = sum(one[figure] > two[figure] for one, two in zip(lines, control or lines))
            cells.append("-" if is_control else str(above))
        cells.append("-" if arm == START else str(sum(x["collapse"] is not None for x in lines)))
        rows.append(cells)
    above = [f"{name} above alpha 0, seeds of {len(seeds)}" for name in ("pass@1", "pass@8")]
    return markdown_table(["arm, rate", *COLUMNS.values(), *above, "alarm, seeds"], rows)


def _mean(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{sum(there) / len(there):.3f}" if there else "-"


def best_table(results: Results) -> str:
    """Every arm at the rate whose mean pass@1 is higher, which favours those that need it."""
    rows = []
    for own in (False, True):
        for name in OWN_ARMS if own else tuple(ARMS):
            by_rate = {rate: lines_of(results, _named(name, rate, own)) for rate in RATES}
            passes = {rate: [line["pass_1"] for line in lines] for rate, lines in by_rate.items()}
            best = max(passes, key=lambda rate: sum(passes[rate]))
            cells = [
                _mean([line[figure] for line in by_rate[best]]) for figure in ("pass_1", "pass_8")
            ]
            rows.append(["the start" if own else "the base", NAMES[name], f"{best:g}", *cells])
    return markdown_table(["pairs of", "arm", "rate", "pass@1", "pass@8"], rows)


def claims(results: Results) -> str:
    """What the exact paired test allows, where it allows anything, and the intervals."""
    seeds = complete(results)
    there = Results(
        results.path,
        results.layout,
        tuple(line for line in results.lines if line["seed"] in seeds),
    )
    said = []
    for own, families in ((False, FAMILIES), (True, OWN_FAMILIES)):
        for rate in RATES:
            for reference, groups in families.items():
                for group in groups:
                    for figure in ("pass_1", "pass_8"):
                        said.append(_claim(there, reference, group, rate, figure, own))
    return "\n".join(said)


def _claim(
    results: Results, reference: str, group: tuple[str, ...], rate: float, figure: str, own: bool
) -> str:
    arms = [_named(name, rate, own) for name in group]
    found = results.compare(_named(reference, rate, own), arms, figure)
    words = {_named(name, rate, own): NAMES[name] for name in group}
    pairs = "the start's own failures" if own else "the base's failures"
    intervals = "; ".join(f"{words[one.arm]} {_interval(one)}" for one in found)
    has_verdict = any(one.relation for one in found)
    claim = f" {claim_in_words(NAMES[reference], found, words)}" if has_verdict else ""
    return (
        f"- {pairs}, rate {rate:g}, {COLUMNS[figure]}: {NAMES[reference]} minus {intervals}.{claim}"
    )


def _interval(one: Difference) -> str:
    return f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def draw(results: Results, path: Path) -> None:
    """pass@1 and pass@8 of every arm, seed by seed, less those of the start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    start = {line["seed"]: line for line in lines_of(results, START)}
    figure, rows = pyplot.subplots(2, 2, figsize=(12, 7), sharey="row", width_ratios=(9, 5))
    for row, name in zip(rows, ("pass_1", "pass_8")):
        for axes, own in zip(row, (False, True)):
            names = OWN_ARMS if own else tuple(ARMS)
            for shift, rate in enumerate(RATES):
                for place, arm in enumerate(names):
                    lines = lines_of(results, _named(arm, rate, own))
                    gains = [line[name] - start[line["seed"]][name] for line in lines]
                    at = place + 0.3 * shift - 0.15
                    axes.scatter([at] * len(gains), gains, s=14, color=f"C{shift}")
                    axes.hlines(sum(gains) / len(gains), at - 0.12, at + 0.12, color=f"C{shift}")
            axes.axhline(0, color="gray", linewidth=0.6)
            axes.set_xticks(range(len(names)), [NAMES[arm] for arm in names], rotation=25)
            axes.set_title(f"pairs of {'the start' if own else 'the base'}", fontsize=9)
        row[0].set_ylabel(f"{COLUMNS[name]} less the start's")
    for shift, rate in enumerate(RATES):
        rows[0][0].scatter([], [], s=14, color=f"C{shift}", label=f"rate {rate:g}")
    rows[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def filled(page: str, results: Results) -> str:
    """The page with its tables and claims made of the results."""
    return fill_page(
        page,
        {
            "start": start_table(results),
            "arms": table(results, own=False),
            "own": table(results, own=True),
            "best": best_table(results),
            "claims": claims(results),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = read_results(parser.parse_args().results, LAYOUT)
    README.write_text(filled(README.read_text(), results))
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
