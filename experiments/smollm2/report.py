"""The tables of README.md from results.jsonl and costs.jsonl, and the sentence that they allow.

python experiments/smollm2/report.py            # the committed results again
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from layout import ARMS, CALIBRATED, COLD, LAYOUT, REFERENCE, TRAINED, WARM, WORDS
from panels import gate_in_words

from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import claim_in_words, compare
from rlp.measure.results_file import Results, read_results

HERE = Path(__file__).resolve().parent
README, RESULTS, COSTS = (HERE / name for name in ("README.md", "results.jsonl", "costs.jsonl"))
PAGES = {
    README: ("gate", "verdict", "arms", "claim", "text", "costs"),
    HERE.parents[1] / "README.md": ("short", "sentence"),
}
"""With what they have of these results."""

STAGES = {COLD: "as it comes", WARM: "after the warm start", CALIBRATED: "after calibration"}


def write_report(results: Path = RESULTS, costs: Path = COSTS) -> None:
    """Print the tables; where these are the committed results, write them to README.md."""
    tables = make_tables(read_results(results, LAYOUT), read_costs(costs))
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    if results.resolve() != RESULTS:
        print(f"\nTo publish: copy {results} and {costs} to {HERE}, and run its report.py.")
        return
    for page in PAGES:
        page.write_text(filled(page, tables), encoding="utf-8")


def filled(page: Path, tables: dict[str, str]) -> str:
    """A page of `PAGES` as the results make it."""
    own = {name: tables[name] for name in PAGES[page]}
    return fill_page(page.read_text(encoding="utf-8"), own)


def read_costs(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def make_tables(results: Results, costs: list[dict]) -> dict[str, str]:
    """By name, each as README.md has it."""
    return {
        "short": short_table(results),
        "gate": gate_table(results),
        "verdict": gate_words(results),
        "arms": arms_table(results),
        "text": text_table(results),
        "claim": claim(results),
        "sentence": claim(results).partition("\n")[0].removeprefix("- "),
        "costs": costs_table(costs),
    }


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


# The gate


def gate_table(results: Results) -> str:
    """A row for each reading of the model before the arms."""
    rows = []
    for stage, words in STAGES.items():
        for line in results.where(stage=stage, panel="results").lines:
            gain = f"{line['gain']:+.3f} [{line['gain_low']:+.3f}, {line['gain_high']:+.3f}]"
            best = "-"
            if line["best_of_g"] is not None:
                ends = f"[{line['best_of_g_low']:+.3f}, {line['best_of_g_high']:+.3f}]"
                best = f"{line['best_of_g']:+.3f} {ends}"
            rows.append(
                [
                    words,
                    f"{line['temperature']:g}",
                    f"{line['n']:g} x {line['group_size']:g}",
                    gain,
                    best,
                    _number(line["no_think"]),
                    f"{line['accuracy_without']:.3f}",
                    f"{line['accuracy']:.3f}",
                    _number(line["surest_accuracy"]),
                    _number(line["over_another"], "{:+.3f}"),
                    f"{line['closed_frac']:.2f}",
                ]
            )
    titles = [
        *("SmolLM2", "T", "positions x thoughts", "gain, nats a token", "best of G"),
        *("without a thought, nats", "accuracy without", "with", "with the surest of G"),
        *("over another's thought", "closed"),
    ]
    return markdown_table(titles, rows)


def gate_words(results: Results) -> str:
    lines = results.where(stage=CALIBRATED, panel="results", temperature=1.0).lines
    return gate_in_words(lines[0])[1] if lines else "The gate has not been read."


def short_table(results: Results) -> str:
    """One row for each model, at temperature 1 and at 0.3."""
    warm, cold = (results.where(panel="results", temperature=t) for t in (1.0, 0.3))
    rows = []
    for stage, words in STAGES.items():
        at = [one.where(stage=stage).lines for one in (warm, cold)]
        for line in at[0]:
            gain = f"{line['gain']:+.2f} [{line['gain_low']:+.2f}, {line['gain_high']:+.2f}]"
            right = [f"{line[name]:.2f}" for name in ("accuracy_without", "accuracy")]
            rows.append([words, f"{line['n']:g}", gain, *right])
            rows[-1].append(f"{at[1][0]['accuracy']:.2f}" if at[1] else "-")
    for arm in arms_of(results):
        one, other = (at.where(stage=TRAINED) for at in (warm, cold))
        line = one.where(arm=arm).lines[0]
        right = [_over_seeds(one, arm, name, "{:.2f}") for name in ("accuracy_without", "accuracy")]
        seeds = len(one.by_seed(arm, "gain"))
        gain = _over_seeds(one, arm, "gain", "{:+.2f}")
        name = f"then {WORDS[arm]}, {seeds} seed{'s' * (seeds > 1)}"
        name = "the same, on the arms' panel" if arm == "base" else name
        cold_right = _over_seeds(other, arm, "accuracy", "{:.2f}")
        rows.append([name, f"{line['n']:g}", gain, *right, cold_right])
    titles = [
        *(
            "SmolLM2",
            "positions",
            "gain over no thought, nats a token",
            "accuracy without a thought",
        ),
        *("with one", "at T 0.3"),
    ]
    return markdown_table(titles, rows)


# The arms


def _over_seeds(results: Results, arm: str, name: str, form: str = "{:.3f}") -> str:
    """Mean and standard deviation over seeds."""
    values = list(results.by_seed(arm, name).values())
    if not values:
        return "-"
    mean = form.format(np.mean(values))
    plain = form.replace("+", "")
    return mean if len(values) == 1 else f"{mean} ({plain.format(np.std(values, ddof=1))})"


def arms_of(results: Results) -> list[str]:
    """Those that have a line, the start first."""
    there = results.where(stage=TRAINED).values("arm")
    return [arm for arm in ("base", *ARMS) if arm in there]


def arms_table(results: Results) -> str:
    """Means over seeds, standard deviations in brackets."""
    trained = results.where(stage=TRAINED, panel="results")
    rows = []
    for arm in arms_of(results):
        warm, cold = trained.where(temperature=1.0), trained.where(temperature=0.3)
        rows.append(
            [
                WORDS[arm],
                str(len(warm.by_seed(arm, "gain"))),
                _over_seeds(warm, arm, "gain_over_start", "{:+.3f}"),
                _over_seeds(warm, arm, "accuracy"),
                _over_seeds(cold, arm, "gain_over_start", "{:+.3f}"),
                _over_seeds(cold, arm, "accuracy"),
                _over_seeds(warm, arm, "accuracy_without"),
                _over_seeds(warm, arm, "best_of_g", "{:+.3f}"),
                _over_seeds(warm, arm, "thought_tokens", "{:.1f}"),
                _over_seeds(warm, arm, "flops", "{:.3g}"),
                _over_seeds(warm, arm, "seconds", "{:.0f}"),
            ]
        )
    titles = [
        *("arm", "seeds", "gain over the start, T 1", "accuracy, T 1"),
        *("gain, T 0.3", "accuracy, T 0.3", "accuracy without a thought", "best of G"),
        *("tokens of a thought", "FLOPs", "seconds"),
    ]
    return markdown_table(titles, rows)


def _text_row(words: str, arm: str, read: Results) -> list[str]:
    row = [words, str(len(read.where(panel="solutions").by_seed(arm, "loss")))]
    for panel in ("solutions", "other_text"):
        of_panel = read.where(panel=panel)
        row += [
            _over_seeds(of_panel, arm, "gain_over_start", "{:+.3f}"),
            _over_seeds(of_panel, arm, "no_think"),
            _over_seeds(of_panel, arm, "loss"),
        ]
    return [*row, _over_seeds(read.where(panel="results"), arm, "loss")]


def text_table(results: Results) -> str:
    """What speaks against an arm: other positions, and plain text."""
    cold, trained = (results.where(stage=stage, temperature=1.0) for stage in (COLD, TRAINED))
    rows = [_text_row("as it comes", "base", cold)] if cold.lines else []
    read = [arm for arm in arms_of(results) if trained.has(arm=arm, panel="solutions")]
    rows += [_text_row(WORDS[arm], arm, trained) for arm in read]
    titles = [
        *("arm", "seeds", "any token of solutions: gain of a thought", "without one, nats", "loss"),
        *(
            "other text: gain of a thought",
            "without one, nats",
            "loss",
            "loss of lines with results",
        ),
    ]
    return markdown_table(titles, rows)


def claim(results: Results) -> str:
    """The sentence that the exact paired test allows, at both temperatures, and what is missing."""
    trained = results.where(stage=TRAINED, panel="results")
    arms = [arm for arm in arms_of(results) if arm != REFERENCE]
    if REFERENCE not in arms_of(results):
        return "No arm has run, so nothing is claimed."
    said = []
    for temperature in sorted(trained.values("temperature"), reverse=True):
        at = trained.where(temperature=temperature)
        reference = at.by_seed(REFERENCE, "gain_over_start")
        family = {arm: at.by_seed(arm, "gain_over_start") for arm in arms}
        if "base" in family:  # one model, whatever the seed
            family["base"] = dict.fromkeys(reference, next(iter(family["base"].values())))
        sentence = claim_in_words(WORDS[REFERENCE], compare(reference, family), WORDS)
        said.append(f"At T {temperature:g}: {sentence}")
    seeds = sorted(trained.by_seed(REFERENCE, "gain")) if len(said) == 1 else None
    seeds = seeds or sorted(trained.where(temperature=1.0).by_seed(REFERENCE, "gain"))
    wanted = trained.where(temperature=1.0).missing(list(ARMS), seeds)
    if wanted:
        said.append(f"Missing: {wanted.partition('has no line of ')[2]}")
    return "\n".join(f"- {sentence}" for sentence in said)


def costs_table(costs: list[dict]) -> str:
    """Mean seconds by stage and machine; a stage that was interrupted has several lines."""
    found: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for line in costs:
        model = line.get("model", TRAINED)
        of = line.get("arm", "") if model == TRAINED else STAGES[model]
        found[line["stage"], of, line["machine"]].append(line)
    rows = []
    for (stage, of, machine), lines in found.items():
        wall, cpu = ([line[name] for line in lines] for name in ("wall_s", "cpu_s"))
        known = [value for value in cpu if value is not None]
        seconds = [f"{np.mean(wall):.0f}", f"{np.mean(known):.0f}" if known else "-"]
        rows.append([stage, WORDS.get(of, of), str(len(lines)), *seconds, machine])
    return markdown_table(["stage", "of", "times", "wall, s each", "CPU, s each", "machine"], rows)


if __name__ == "__main__":
    write_report()
