"""The tables and the picture of README.md from results.jsonl.

python -m experiments.loop.report                             # of the committed results
python -m experiments.loop.report runs/loop/results.jsonl     # of a run; printed, not written
"""

import sys
from pathlib import Path

import numpy as np

from experiments.loop.arms import ARMS, REFERENCE, ROUNDS, WORDS, round_of
from experiments.loop.reading import TAIL
from experiments.loop.world import NAMES, entropy, zipf
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Layout, Results, read_results

HERE = Path(__file__).resolve().parent
README, RESULTS, PICTURE = HERE / "README.md", HERE / "results.jsonl", HERE / "rounds.png"

FIGURES = {
    "story_kl_nats": "KL from the truth, nats a story",
    "tail_alive": "tail names alive",
    "tail_mass": "mass of tail names",
    "name_entropy": "entropy of names, nats",
    "open_intra": "open: intra",
    "open_floor": "open: floor",
    "open_duplicates": "open: duplicates",
    "open_vendi": "open: Vendi",
    "open_entropy": "open: entropy of 16 answers, nats",
    "open_distinct_2": "open: distinct-2",
    "closed_intra": "closed: intra",
    "closed_entropy": "closed: entropy, nats",
    "accuracy": "accuracy",
    "document_loss_nats": "held-out loss, nats a token",
}
"""As columns are called."""

LAYOUT = Layout(
    ("arm", "seed", "stage"),
    (*FIGURES, "story_loss_nats", "optimizer_steps", "input_tokens", "flops", "seconds"),
)
"""stage: round_0 is the base; costs are those of the round's training."""

FAMILIES = {
    "collapse": (("real",), ("story_kl_nats", "tail_alive", "name_entropy", "accuracy")),
    "prevention": (
        ("mixed_eighth", "mixed_half", "filtered"),
        ("story_kl_nats", "tail_alive", "name_entropy", "accuracy"),
    ),
}
"""What own output is compared with after the last round, and by which figures: fixed beforehand.
The first takes six seeds, the second seven."""


def line_of(told: dict) -> dict:
    """A line of the pipeline's results as one of this experiment's."""
    identity = {"arm": told["arm"], "seed": told["seed"]}
    figures = {name: told.get(name) for name in LAYOUT.figures}
    return identity | {"stage": f"round_{round_of(told['stage'])}"} | figures


def make_tables(results: Results) -> dict[str, str]:
    """By name, each as README.md has it."""
    return {
        "seeds": seeds_in_words(results),
        "last": last_table(results),
        "rounds": rounds_table(results),
        **{name: claims(results, name) for name in FAMILIES},
    }


def seeds_in_words(results: Results) -> str:
    seeds = whole_seeds(results)
    if not seeds:
        return "No seed has run to its end yet, so nothing is claimed."
    count = "One seed has" if len(seeds) == 1 else f"{len(seeds)} seeds have"
    return f"{count} run to the end: {', '.join(map(str, seeds))}."


def whole_seeds(results: Results) -> list[int]:
    """Seeds of which all arms have all rounds."""
    last = results.where(stage=f"round_{ROUNDS}")
    return [seed for seed in results.values("seed") if not last.missing(list(ARMS), [seed])]


def _over_seeds(results: Results, arm: str, name: str) -> str:
    """Mean, and standard deviation over seeds."""
    values = list(results.by_seed(arm, name).values())
    if not values:
        return "-"
    spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def last_table(results: Results) -> str:
    """The base, every arm after its last round, and the truth where it is known."""
    last = results.where(stage=f"round_{ROUNDS}")
    rows = []
    if results.lines:
        first = results.where(stage="round_0")
        rows.append(["base", *(_over_seeds(first, REFERENCE, name) for name in FIGURES)])
    rows += [[WORDS[arm], *(_over_seeds(last, arm, name) for name in FIGURES)] for arm in ARMS]
    rows.append(["truth", *(TRUTH.get(name, "") for name in FIGURES)])
    return markdown_table(["after the last round", *FIGURES.values()], rows)


TRUTH = {
    "story_kl_nats": "0",
    "tail_alive": "1",
    "tail_mass": f"{zipf(len(NAMES))[-TAIL:].sum():.3f}",
    "name_entropy": f"{entropy(zipf(len(NAMES))):.3f}",
    "accuracy": "1",
    "closed_intra": "1",
    "closed_entropy": "0",
}


def rounds_table(results: Results) -> str:
    """KL and living tail, round by round."""
    rows = []
    for arm in ARMS:
        for name in ("story_kl_nats", "tail_alive", "accuracy"):
            found = [
                _over_seeds(results.where(stage=f"round_{n}"), arm, name).partition(" ")[0]
                for n in range(ROUNDS + 1)
            ]
            rows.append([WORDS[arm], FIGURES[name], *found])
    return markdown_table(["arm", "figure", "base", *map(str, range(1, ROUNDS + 1))], rows)


def claims(results: Results, family: str) -> str:
    """The sentences that the exact test allows."""
    arms, figures = FAMILIES[family]
    last = results.where(stage=f"round_{ROUNDS}")
    words = {arm: WORDS[arm] for arm in (REFERENCE, *arms)}
    return "\n".join(
        f"- {FIGURES[name]}: {last.claim(REFERENCE, words, name) or 'nothing has run.'}"
        for name in figures
    )


def draw(results: Results, path: Path) -> None:
    """Four figures over rounds: lines are means over seeds, points are seeds."""
    from matplotlib.figure import Figure

    shown = ("story_kl_nats", "tail_alive", "name_entropy", "accuracy")
    colors = dict(zip(ARMS, ("#d55e00", "#e69f00", "#009e73", "#cc79a7", "#0072b2")))
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, shown):
        for arm in ARMS:
            by_round = [
                list(results.where(stage=f"round_{n}").by_seed(arm, name).values())
                for n in range(ROUNDS + 1)
            ]
            there = [n for n, values in enumerate(by_round) if values]
            for n in there:
                axis.plot([n] * len(by_round[n]), by_round[n], ".", color=colors[arm], alpha=0.35)
            means = [np.mean(by_round[n]) for n in there]
            axis.plot(there, means, color=colors[arm], label=WORDS[arm])
        if name in TRUTH:
            axis.axhline(float(TRUTH[name]), color="#888888", linestyle=":", label="truth")
        axis.set_ylabel(FIGURES[name])
        axis.set_xlabel("round")
        axis.set_xticks(range(ROUNDS + 1))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    results = read_results(path, LAYOUT)
    tables = make_tables(results)
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    if path.resolve() != RESULTS:
        print(f"\nTo publish: copy {path} to {RESULTS}, and run this again.")
        return
    README.write_text(fill_page(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
