"""Tables of README.md and curves.png, from results.jsonl.

    python experiments/pipeline/show.py runs/pipeline/results.jsonl

Copies the file beside this script, and writes what it says between the marks of README.md.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import claim_in_words, compare
from rlp.measure.results_file import Results
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_results import open_results

HERE = Path(__file__).parent
SHARED = ("sft", "rlvr")
WORDS = {
    "rlp": "RLP",
    "base": "base",
    "mixed_sft": "mixed SFT",
    "cpt": "CPT",
    "greedy_match": "greedy match",
    "rlvr_before": "RLVR on plain text",
    "cpt_replay": "CPT + replay",
    "shuffled_reward": "shuffled reward",
}
FIGURES = {
    "accuracy_with_thought": "accuracy with a thought",
    "thought_duplicates_frac": "pairs of a position's thoughts that are the same",
}


def points(results: Results, arm: str, stage: str, temperature: float) -> list[int]:
    """Steps of a stage that every seed of an arm has."""
    part = results.where(arm=arm, stage=stage, temperature=temperature)
    steps = [set(part.where(seed=seed).values("stage_step")) for seed in part.values("seed")]
    return sorted(set.intersection(*steps)) if steps else []


def value(
    results: Results, arm: str, stage: str, step: int, temperature: float, figure: str
) -> float | None:
    """The mean over seeds."""
    part = results.where(arm=arm, stage=stage, stage_step=step, temperature=temperature)
    values = [line[figure] for line in part.lines if line.get(figure) is not None]
    return fmean(values) if values else None


def columns(results: Results, temperature: float) -> list[tuple[str, int]]:
    """Stage and step of the columns behind the arm's own stage."""
    arm = results.values("arm")[0]
    return [(stage, step) for stage in SHARED for step in points(results, arm, stage, temperature)]


def own_end(results: Results, arm: str, temperature: float, figure: str) -> dict[int, float]:
    """By seed, after what an arm has alone; of the base what it begins with."""
    stages = results.where(arm=arm).values("stage")
    own = next((stage for stage in stages if stage not in ("start", *SHARED)), "start")
    lines = results.where(arm=arm, stage=own, temperature=temperature).lines
    last: dict[int, dict] = {}
    for line in lines:
        if line["stage_step"] >= last.get(line["seed"], line)["stage_step"]:
            last[line["seed"]] = line
    return {seed: line[figure] for seed, line in last.items() if line.get(figure) is not None}


def table(results: Results, figure: str, temperature: float) -> str:
    """A figure along the stages, means over seeds."""
    heads = columns(results, temperature)
    names = {"sft": "SFT", "rlvr": "RLVR"}
    head = [f"{FIGURES[figure]}, T {temperature:g}", "before"]
    titles = head + [f"{names[stage]} {step}" for stage, step in heads]
    rows = []
    for arm in results.values("arm"):
        alone = own_end(results, arm, temperature, figure)
        own = fmean(alone.values()) if alone else None
        cells = [value(results, arm, *head, temperature, figure) for head in heads]
        rows.append([WORDS[arm], *("-" if one is None else f"{one:.3f}" for one in (own, *cells))])
    keep = [column for column in range(len(titles)) if any(row[column] != "-" for row in rows)]
    chosen = [[row[column] for column in keep] for row in (titles, *rows)]
    return markdown_table(chosen[0], chosen[1:])


def claims(results: Results, figure: str) -> str:
    """What the exact test allows at T 1: RLP against the others where each has ended alone and
    after each stage, and what RLVR does to an arm."""
    arms, hot = results.values("arm"), results.where(temperature=1.0)
    ends = {"before": {arm: own_end(results, arm, 1.0, figure) for arm in arms}}
    for stage, step in columns(results, 1.0):
        part = hot.where(stage=stage, stage_step=step)
        ends[f"{stage.upper()} {step}"] = {arm: part.by_seed(arm, figure) for arm in arms}
    said = []
    for place in ("before", "SFT 64", "RLVR 80"):
        others = {arm: values for arm, values in ends[place].items() if arm != "rlp"}
        sentence = claim_in_words("RLP", compare(ends[place]["rlp"], others), WORDS)
        said.append(f"- {FIGURES[figure]}, {place}: {sentence}")
    for arm in arms:
        found = compare(ends["RLVR 80"][arm], {"sft": ends["SFT 16"][arm]})
        sentence = claim_in_words(f"{WORDS[arm]}, RLVR 80,", found, {"sft": "itself at SFT 16"})
        said.append(f"- {FIGURES[figure]}: {sentence}")
    return "\n".join(said)


def sections(results: Results, arms: list[str]) -> dict[str, str]:
    """What stands between the marks of the page."""
    temperatures = results.values("temperature")
    made = {"accuracy": "accuracy_with_thought", "variety": "thought_duplicates_frac"}
    told = {
        name: "\n\n".join(table(results, figure, T) for T in temperatures)
        for name, figure in made.items()
    }
    told |= {f"{name} claims": claims(results, figure) for name, figure in made.items()}
    seeds = results.values("seed")
    missing = [WORDS[arm] for arm in arms if arm not in results.values("arm")]
    told["runs"] = (
        f"- Seeds: {', '.join(map(str, seeds))}. Not run: {', '.join(missing) or 'nothing'}."
    )
    return told


def draw(results: Results, path: Path) -> None:
    """Accuracy along SFT and RLVR, thoughts at both temperatures, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = results.values("temperature")
    size = (9, 3.2 * len(temperatures))
    figure, rows = pyplot.subplots(len(temperatures), 2, figsize=size, squeeze=False)
    for axes, temperature in zip(rows, temperatures):
        for one, stage in zip(axes, SHARED):
            for arm in results.values("arm"):
                steps = points(results, arm, stage, temperature)
                at = [
                    value(results, arm, stage, step, temperature, "accuracy_with_thought")
                    for step in steps
                ]
                dashed = arm == "greedy_match"  # it lies on another one
                one.plot(
                    *(steps, at),
                    marker="o",
                    ls="--" if dashed else "-",
                    zorder=3 if dashed else 2,
                    label=WORDS[arm],
                )
            one.set_title(f"{stage.upper()}, thoughts at T {temperature:g}", fontsize=10)
            one.set_xlabel("step")
            one.set_ylim(0, 1.02)
    rows[0][0].set_ylabel("accuracy with a thought")
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=HERE / "results.jsonl")
    source = parser.parse_args().results
    if source.resolve() != (HERE / "results.jsonl").resolve():
        shutil.copyfile(source, HERE / "results.jsonl")
    results = open_results(HERE / "results.jsonl")
    arms = list(load_pipeline(HERE / "pipeline.yaml").arms)
    page = HERE / "README.md"
    page.write_text(fill_page(page.read_text(), sections(results, arms)))
    draw(results, HERE / "curves.png")


if __name__ == "__main__":
    main()
