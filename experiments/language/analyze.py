"""Write the tables, the claims and the picture of README.md from results.jsonl.

python experiments/language/analyze.py
"""

import argparse
from pathlib import Path

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import Difference, claim_in_words, compare
from rlp.measure.results_file import Layout, Results, read_results
from rlp.process.schemas import NUMBER, Maybe

RESULTS = Path(__file__).parent / "results.jsonl"
LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=("accuracy", "mixed", "switches", "latin", "cyrillic", "n", "seconds"),
    others=dict.fromkeys(("accuracy_mixed", "accuracy_one_script", "traces"), Maybe(NUMBER)),
)
"""Shares, of `n` thoughts at held-out questions: right answers after them, thoughts with both
scripts, letters that are Latin, thoughts in Cyrillic alone; and CPU seconds of the arm."""

README = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "switching.png"

NAMES = {
    "base": "base",
    "rlvr": "RLVR",
    "rlvr_language": "RLVR + language",
    "sft_right": "SFT, right",
    "sft_language": "SFT, right and Latin",
    "rlp": "RLP",
    "rlp_language": "RLP + language",
    "rlp_language_4": "RLP + 4 x language",
}
ARMS = tuple(NAMES)

FAMILIES = {
    "rlvr": ("base", "rlvr_language"),
    "sft_right": ("base", "sft_language"),
    "rlp": ("base", "rlp_language", "rlp_language_4"),
}
"""What each way to train without regard to language is compared with."""

MARGIN = 0.05
"""By which a share of mixed thoughts differs from the base's where switching rose or fell."""


def complete(results: Results) -> list[int]:
    """Seeds of which every arm is there."""
    seeds = results.values("seed")
    return [seed for seed in seeds if set(results.where(seed=seed).values("arm")) == set(ARMS)]


def by_seed(results: Results, arm: str, figure: str, seeds: list[int]) -> dict[int, float]:
    """Of the seeds that are complete."""
    return {s: v for s, v in results.by_seed(arm, figure).items() if s in seeds}


def differences(
    results: Results, figure: str, reference: str, seeds: list[int]
) -> tuple[Difference, ...]:
    """A family, tested."""
    return compare(
        by_seed(results, reference, figure, seeds),
        {arm: by_seed(results, arm, figure, seeds) for arm in FAMILIES[reference]},
    )


def table(results: Results, seeds: list[int]) -> str:
    """A line for each arm: means over seeds, and in how many switching rose and fell."""
    titles = ["arm", "accuracy", "of mixed thoughts", "of others", "mixed", "switches"]
    titles += ["Latin letters", f"switching rose, seeds of {len(seeds)}", "fell"]
    titles += ["less than 0.05 mixed"]
    lines = []
    base = by_seed(results, "base", "mixed", seeds)
    for arm, name in NAMES.items():
        cells = [name]
        for figure in ("accuracy", "accuracy_mixed", "accuracy_one_script", "mixed", "switches"):
            cells.append(mean_of([line.get(figure) for line in lines_of(results, arm, seeds)]))
        cells.append(mean_of([line["latin"] for line in lines_of(results, arm, seeds)]))
        changes = [line["mixed"] - base[line["seed"]] for line in lines_of(results, arm, seeds)]
        cells += [str(sum(change > MARGIN for change in changes))]
        cells += [str(sum(change < -MARGIN for change in changes))]
        cells += [str(sum(line["mixed"] < MARGIN for line in lines_of(results, arm, seeds)))]
        lines.append(cells)
    return markdown_table(titles, lines)


def lines_of(results: Results, arm: str, seeds: list[int]) -> list[dict]:
    return [line for line in results.where(arm=arm).lines if line["seed"] in seeds]


def mean_of(values: list[float | None]) -> str:
    """With the number of seeds where not all have it."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    told = f"{sum(there) / len(there):.3f}"
    return told if len(there) == len(values) else f"{told} ({len(there)} seeds)"


def seed_table(results: Results, seeds: list[int]) -> str:
    """The share of mixed thoughts, seed by seed."""
    lines = []
    for seed in seeds:
        mixed = [f"{by_seed(results, arm, 'mixed', [seed])[seed]:.3f}" for arm in NAMES]
        lines.append([str(seed), *mixed])
    return markdown_table(["seed", *NAMES.values()], lines)


def claims(results: Results, seeds: list[int]) -> str:
    """What the exact paired test allows, and the price."""
    said = []
    for figure, words in (("mixed", "share of mixed thoughts"), ("accuracy", "accuracy")):
        for reference in FAMILIES:
            found = differences(results, figure, reference, seeds)
            said.append(f"- {words}: {claim_in_words(NAMES[reference], found, NAMES)}")
            for one in found if figure == "accuracy" else ():
                if one.arm != "base":
                    p = f"p {one.adjusted:.3f}" if one.relation else "no verdict"
                    said.append(
                        f"  - price of {NAMES[one.arm]}: {one.mean:+.3f} ({one.low:+.3f} to"
                        f" {one.high:+.3f}; {p})"
                    )
    return "\n".join(said)


def draw(results: Results, seeds: list[int], path: Path) -> None:
    """Mixed thoughts seed by seed, and what they go with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for place, (arm, name) in enumerate(NAMES.items()):
        mixed = list(by_seed(results, arm, "mixed", seeds).values())
        accuracy = list(by_seed(results, arm, "accuracy", seeds).values())
        spread = [place + 0.05 * (i - (len(mixed) - 1) / 2) for i in range(len(mixed))]
        left.scatter(spread, mixed, s=18, color=f"C{place}")
        left.hlines(sum(mixed) / len(mixed), place - 0.3, place + 0.3, color=f"C{place}")
        right.scatter(mixed, accuracy, s=18, color=f"C{place}", label=name)
    left.set_xticks(range(len(NAMES)), NAMES.values(), rotation=25, ha="right", fontsize=8)
    left.set_ylabel("thoughts with both scripts")
    left.set_title(f"{len(seeds)} seeds, each a dot; the line is their mean", fontsize=9)
    right.set_xlabel("thoughts with both scripts")
    right.set_ylabel("accuracy after a thought")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def sections(results: Results) -> dict[str, str]:
    """What the page has of the seeds that are complete."""
    seeds = complete(results)
    made = {"table": table, "seeds": seed_table, "claims": claims}
    return {name: make(results, seeds) for name, make in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    results = read_results(parser.parse_args().results, LAYOUT)
    README.write_text(fill_page(README.read_text(), sections(results)))
    draw(results, complete(results), PICTURE)


if __name__ == "__main__":
    main()
