"""The tables and the picture of README.md from results.jsonl.

python -m experiments.pluralism.report
"""

import json
from pathlib import Path

import numpy as np

from experiments.pluralism.reading import FIGURES, PANELS
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Layout, Results, read_results

HERE = Path(__file__).resolve().parent
README, RESULTS, PICTURE = HERE / "README.md", HERE / "results.jsonl", HERE / "arms.png"
REAL = HERE / "smollm2.json"
"""What `rlp pluralism --json` wrote of the real model."""

ARMS = {
    "base": "base",
    "mode_sft": "mode SFT",
    "rlvr": "RLVR",
    "spectrum": "Spectrum",
    "one_draw": "one draw",
    "one_draw_8": "one draw x 8",
}
CONTROLS = {
    "everything": "lists everything",
    "uniform": "uniform",
    "majority": "majority",
    "population": "the population, whoever is named",
    "as_wanted": "as wanted",
    "as_named": "as named, the disallowed too",
}
WORDS = ARMS | CONTROLS

LAYOUT = Layout(("arm", "seed", "panel"), (*FIGURES, "seconds"))
"""panel: topics that the arms are trained on, or others, which only the base has read."""

TESTED = {
    "distributional": "distance to the population",
    "steerable": "steerable (below 0: it is moved towards the community)",
    "named": "distance to the named community",
    "moved": "moved by the disallowed name",
    "overton": "Overton",
}
FAMILIES = {
    "base": ("mode_sft", "rlvr", "spectrum", "one_draw", "one_draw_8"),
    "spectrum": ("mode_sft", "rlvr", "one_draw", "one_draw_8"),
}
"""What a reference is compared with: fixed beforehand. A family of five takes eight seeds."""


def whole_seeds(results: Results) -> list[int]:
    """Seeds of which every arm is there."""
    return [seed for seed in results.values("seed") if not results.missing(list(WORDS), [seed])]


def make_parts(results: Results) -> dict[str, str]:
    """By name, each as README.md has it: of whole seeds."""
    seeds = whole_seeds(results)
    lines = tuple(line for line in results.lines if line["seed"] in seeds)
    results = Results(results.path, results.layout, lines)
    return {
        "seeds": seeds_in_words(seeds),
        **{panel: table(results, panel) for panel in PANELS},
        "controls": controls_table(results),
        **{f"claims {reference}": claims(results, reference) for reference in FAMILIES},
        "costs": costs_table(results),
        "real": real_table(json.loads(REAL.read_text(encoding="utf-8"))),
    }


def seeds_in_words(seeds: list[int]) -> str:
    if not seeds:
        return "No seed has run to its end yet, so nothing is claimed."
    return f"{len(seeds)} seeds have run to the end: {', '.join(map(str, seeds))}."


def over_seeds(results: Results, arm: str, figure: str) -> str:
    """Mean, and standard deviation over seeds."""
    values = list(results.by_seed(arm, figure).values())
    if not values:
        return "-"
    spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def table(results: Results, panel: str) -> str:
    """A row for each arm."""
    part = results.where(panel=panel)
    rows = [[ARMS[arm], *(over_seeds(part, arm, name) for name in FIGURES)] for arm in ARMS]
    return markdown_table(["arm", *FIGURES.values()], rows)


def controls_table(results: Results) -> str:
    """The controls on the topics that the claims are about."""
    shown = [name for name in FIGURES if name not in ("by_examples", "named", "unnamed")]
    part = results.where(panel="held_out")
    rows = [[CONTROLS[arm], *(over_seeds(part, arm, name) for name in shown)] for arm in CONTROLS]
    return markdown_table(["control", *(FIGURES[name] for name in shown)], rows)


def claims(results: Results, reference: str) -> str:
    """The sentences that the exact test allows."""
    part = results.where(panel="held_out")
    words = {arm: ARMS[arm] for arm in (reference, *FAMILIES[reference])}
    return "\n".join(
        f"- {said}: {part.claim(reference, words, figure) or 'nothing has run.'}"
        for figure, said in TESTED.items()
    )


def costs_table(results: Results) -> str:
    """CPU seconds of an arm, mean over seeds."""
    part = results.where(panel="held_out")
    row = [
        f"{np.mean(list(found.values())):.0f}" if (found := part.by_seed(arm, "seconds")) else "-"
        for arm in ARMS
    ]
    return markdown_table(["CPU seconds", *ARMS.values()], [["of one seed", *row]])


REAL_WORDS = {
    "instruct": "as it comes",
    "instruct_chat": "as it comes, chat format",
    "warm": "after SFT on GSM8K's steps",
}
REAL_FIGURES = {
    "valid": "answers that name one option",
    "overton": "Overton",
    "distributional": "distance to the made shares",
    "distributional_floor": "by chance",
    "steerable": "steerable",
    "moved": "moved by the disallowed name",
    "moved_floor": "by chance",
}


def real_table(told: dict) -> str:
    """A row for each model, with its interval over questions where it has one to be read."""
    rows = []
    for name, words in REAL_WORDS.items():
        figures = told["models"][name]
        cells = [f"{figures[figure]:.3f}" for figure in REAL_FIGURES]
        for column, figure in enumerate(REAL_FIGURES):
            if figure in ("steerable", "moved"):
                low, high = figures["intervals"][figure]
                cells[column] += f" [{low:.3f}, {high:.3f}]"
        counts = [list(one["counts"].values()) for one in figures["by_question"]]
        first = f"{sum(one[0] for one in counts)} of {sum(map(sum, counts))}"
        rows.append([words, *cells, first])
    return markdown_table(["SmolLM2-135M", *REAL_FIGURES.values(), "name the first option"], rows)


def draw(results: Results, path: Path) -> None:
    """The figures that are tested, on both panels: points are seeds, bars their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, TESTED):
        for shift, panel, color in ((-0.18, "trained", "#999999"), (0.18, "held_out", "#0072b2")):
            part = results.where(panel=panel)
            for place, arm in enumerate(ARMS):
                values = list(part.by_seed(arm, name).values())
                axis.plot([place + shift] * len(values), values, ".", color=color, alpha=0.5)
                label = {"trained": "trained topics", "held_out": "other topics"}[panel]
                low, high = place + shift - 0.15, place + shift + 0.15
                axis.hlines(np.mean(values), low, high, color=color, label=label * (place == 0))
        axis.axhline(0, color="#888888", linestyle=":")
        axis.set_xticks(range(len(ARMS)), ARMS.values(), fontsize=8)
        axis.set_title(TESTED[name], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].remove()
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    results = read_results(RESULTS, LAYOUT)
    parts = make_parts(results)
    page = README.read_text(encoding="utf-8")
    README.write_text(fill_page(page, parts), encoding="utf-8")
    if whole_seeds(results):
        draw(results, PICTURE)


if __name__ == "__main__":
    main()
