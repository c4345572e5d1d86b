"""The tables and the picture of README.md from results.jsonl.

python -m experiments.spectrum.report
"""

from pathlib import Path

import numpy as np

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Layout, Results, read_results

HERE = Path(__file__).resolve().parent
README, RESULTS, PICTURE = HERE / "README.md", HERE / "results.jsonl", HERE / "spread.png"

SHOTS = (0, 1, 2, 4, 8)

FIGURES = (
    *("told_jsd", "told_mass", "told_yield", "told_accuracy", "kshot_excess", "kshot_jsd"),
    *(f"shots_{k}_{name}" for k in SHOTS for name in ("jsd", "mass", "excess", "accuracy")),
)
"""kshot: mean over the numbers of pairs above 0 that are asked."""

LAYOUT = Layout(
    ("arm", "seed", "panel", "temperature"),
    (*FIGURES, "optimizer_steps", "input_tokens", "flops", "seconds"),
)
"""panel: the model, tiny, single or smollm2. Costs are those of the last stage."""

WORDS = {
    "base": "base",
    "spectrum": "Spectrum of base",
    "one_steps": "one draw of base (equal steps)",
    "one_draws": "one draw of base (equal draws)",
    "mode": "mode-SFT",
    "mode_spectrum": "Spectrum of mode-SFT",
    "mode_one_steps": "one draw of mode-SFT (equal steps)",
    "mode_one_draws": "one draw of mode-SFT (equal draws)",
}

ORACLES = {"bayes": "Bayes", "uniform": "uniform"}

CLAIMS = (
    ("mode_spectrum", ("mode", "mode_one_steps", "mode_one_draws")),
    ("spectrum", ("base", "one_steps", "one_draws")),
)
"""What Spectrum tuning is compared with; one family each."""

CLAIMED = {"told_jsd": "JSD, told", "kshot_excess": "nats above Bayes after pairs"}


def whole_seeds(results: Results, panel: str, arms: tuple[str, ...]) -> list[int]:
    """Seeds of a model of which all arms are there."""
    lines = results.where(panel=panel, temperature=1.0)
    return [seed for seed in lines.values("seed") if not lines.missing(arms, [seed])]


def arms_of(panel: str) -> tuple[str, ...]:
    """The arms that a model has."""
    every = tuple(WORDS)
    return every if panel == "tiny" else every[:4]


def chosen(results: Results, panel: str, temperature: float = 1.0) -> Results:
    """Lines of whole seeds."""
    seeds = whole_seeds(results, panel, arms_of(panel))
    lines = results.where(panel=panel, temperature=temperature).lines
    lines = tuple(line for line in lines if line["seed"] in seeds)
    return Results(results.path, results.layout, lines)


def make_parts(results: Results) -> dict[str, str]:
    """By name, each as README.md has it."""
    return {
        "seeds": seeds_in_words(results),
        "tiny": main_table(chosen(results, "tiny"), arms_of("tiny")),
        "shots": shots_table(chosen(results, "tiny"), arms_of("tiny")),
        "claims": claims(chosen(results, "tiny"), CLAIMS),
        "heat": heat_table(results),
        "single": main_table(chosen(results, "single"), arms_of("single")),
        "single_claims": claims(chosen(results, "single"), CLAIMS[1:]),
        "single_shots": shots_table(chosen(results, "single"), arms_of("single")),
        "smollm2": main_table(chosen(results, "smollm2"), arms_of("smollm2")),
        "smollm2_shots": shots_table(chosen(results, "smollm2"), arms_of("smollm2"), (0, 2, 8)),
    }


def seeds_in_words(results: Results) -> str:
    told = []
    for panel in ("tiny", "single", "smollm2"):
        seeds = whole_seeds(results, panel, arms_of(panel))
        told.append(f"{panel}: {len(seeds)} ({', '.join(map(str, seeds)) or 'none yet'})")
    return f"Seeds of which every arm is there: {'; '.join(told)}."


def over_seeds(results: Results, arm: str, name: str) -> str:
    """Mean, and standard deviation over seeds."""
    values = list(results.by_seed(arm, name).values())
    if not values:
        return "-"
    digits = 1 if name == "told_yield" else 3
    spread = f" ({np.std(values, ddof=1):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def main_table(results: Results, arms: tuple[str, ...]) -> str:
    """A line for each arm and oracle."""
    shown = ("told_jsd", "told_mass", "told_yield", "kshot_jsd", "kshot_excess", "shots_8_accuracy")
    titles = ["arm", "JSD, told", "mass", "yield of 100", "JSD to Bayes after pairs"]
    titles += ["nats above Bayes after pairs", "accuracy after 8", "steps", "tokens read"]
    rows = []
    for arm, words in (WORDS | ORACLES).items():
        if arm not in arms and arm not in ORACLES:
            continue
        costs = []
        for name in ("optimizer_steps", "input_tokens"):
            values = list(results.by_seed(arm, name).values())
            costs.append(f"{np.mean(values):,.0f}" if values else "-")
        rows.append([words, *(over_seeds(results, arm, name) for name in shown), *costs])
    return markdown_table(titles, rows)


def shots_table(results: Results, arms: tuple[str, ...], shots: tuple[int, ...] = SHOTS) -> str:
    """Nats above Bayes, by the number of pairs before."""
    rows = [
        [words, *(over_seeds(results, arm, f"shots_{k}_excess") for k in shots)]
        for arm, words in (WORDS | ORACLES).items()
        if arm in arms or arm in ORACLES
    ]
    return markdown_table(["nats above Bayes after", *(f"{k} pairs" for k in shots)], rows)


def heat_table(results: Results) -> str:
    """What temperature does instead of tuning."""
    temperatures = sorted(results.where(panel="tiny").values("temperature"))
    rows = []
    for arm in ("base", "mode"):
        for temperature in temperatures:
            lines = chosen(results, "tiny", temperature)
            names = ("told_jsd", "told_mass", "told_yield", "kshot_excess")
            found = [over_seeds(lines, arm, name) for name in names]
            rows.append([WORDS[arm], f"{temperature:g}", *found])
    titles = ["arm", "T", "JSD, told", "mass", "yield of 100", "nats above Bayes after pairs"]
    return markdown_table(titles, rows)


def claims(results: Results, families: tuple = CLAIMS) -> str:
    """The sentences that the exact test allows, and how large each difference is."""
    if not results.lines:
        return "No seed has run to its end yet, so nothing is claimed."
    said = []
    for name, words in CLAIMED.items():
        for reference, family in families:
            arms = {arm: WORDS[arm] for arm in (reference, *family)}
            said.append(f"- {words}: {results.claim(reference, arms, name)}")
            for one in results.compare(reference, family, name):
                interval = f"{one.low:+.3f} to {one.high:+.3f}"
                said.append(
                    f"  - minus {WORDS[one.arm]}: {one.mean:+.4f} ({interval}; {signs(one)})"
                )
    return "\n".join(said)


def signs(difference: object) -> str:
    """In how many seeds the reference is lower."""
    lower = sum(value < 0 for value in difference.differences)
    return f"lower in {lower} of {len(difference.seeds)} seeds"


def draw(results: Results, path: Path) -> None:
    """Alignment beside steering, seeds as points; and nats above Bayes over pairs."""
    from matplotlib.figure import Figure

    own = chosen(results, "tiny")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (arm, words) in enumerate(WORDS.items()):
        jsd, excess = (own.by_seed(arm, name) for name in ("told_jsd", "kshot_excess"))
        marker = "o" if place < 4 else "s"
        left.plot(list(jsd.values()), list(excess.values()), marker, color=f"C{place}", label=words)
        means = [np.mean(list(own.by_seed(arm, f"shots_{k}_excess").values())) for k in SHOTS]
        right.plot(SHOTS, means, f"-{marker}", color=f"C{place}", label=words)
    left.set_xlabel("JSD of told tasks, nats")
    left.set_ylabel("nats above Bayes after pairs")
    right.set_xlabel("pairs before the question")
    right.set_ylabel("nats above Bayes, mean over seeds")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_xscale("log")
    left.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    results = read_results(RESULTS, LAYOUT)
    parts = make_parts(results)
    for name, part in parts.items():
        print(f"\n{name}\n{part}")
    README.write_text(fill_page(README.read_text(encoding="utf-8"), parts), encoding="utf-8")
    if chosen(results, "tiny").lines:
        draw(results, PICTURE)


if __name__ == "__main__":
    main()
