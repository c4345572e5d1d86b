"""Tables, claims and figures of the comparison, all from results.jsonl.

    python experiments/flop_matched/analyze.py                    # prints them
    python experiments/flop_matched/analyze.py --write            # and fills in pages, and draws

A claim is worded by the exact paired test over the seeds, with Holm's correction over the family
(`rlp.measure.paired`): "above", "below", or "not told apart from". Intervals in tables are 95 % t
intervals of the mean difference, paired by seed, of one arm each.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, BESIDE, FAMILY, POST_TRAINED, REFERENCE
from lines import LAYOUT, RLVR_FROM, ROOT, STEPS, TEMPERATURES

from rlp.config import ConfigError
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.paired import Difference
from rlp.measure.results_file import Results, read_results

FOLDER = Path(__file__).parent
WORDS = {arm: made.words for arm, made in ARMS.items()}
LEARNED = 0.9
"""Accuracy with a thought of an arm that has found the strategy."""
METRICS = {
    "accuracy_with_thought": "accuracy with a thought",
    "gain_over_start_nats": "gain over the start",
    "accuracy_without_thought": "accuracy without a thought",
    "document_loss_nats": "held-out loss",
}
PAGES = {
    FOLDER / "README.md": (
        "claims",
        "pretrain",
        "seeds",
        "bounded",
        "against",
        "selection",
        "sweep",
        "post",
        "post_claims",
        "beside",
        "costs",
    ),
    ROOT / "README.md": ("compared",),
    ROOT / "docs" / "comparing.md": ("claims", "against"),
}
"""Pages with generated parts, between `<!-- made NAME -->` and `<!-- end -->`."""


def ends(results: Results, stage: str, temperature: float) -> Results:
    """The last line of each arm and seed: the model that the stage ends with."""
    last: dict[tuple, dict] = {}
    for line in results.where(stage=stage, temperature=temperature).lines:
        key = line["arm"], line["seed"]
        if key not in last or line["stage_step"] >= last[key]["stage_step"]:
            last[key] = line
    return replace(results, lines=tuple(last.values()))


def at(temperature: float) -> str:
    return f"T {temperature:g}"


def mean_of(results: Results, arm: str, figure: str) -> float | None:
    """Over seeds; None where the arm has no such number."""
    values = list(results.by_seed(arm, figure).values())
    return float(np.mean(values)) if values else None


def told(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def against(one: Difference | None) -> str:
    """RLP minus an arm, with its interval and the p that counts."""
    if one is None:
        return ""
    p = f"p {one.adjusted:.3f}" if one.relation else "no verdict"
    return f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f}; {p})"


def claims(results: Results) -> str:
    """What the test allows to be said of the family after pretraining, number by number."""
    family = {arm: WORDS[arm] for arm in (REFERENCE, *FAMILY)}
    said = []
    for figure in ("accuracy_with_thought", "gain_over_start_nats"):
        for T in TEMPERATURES:
            claim = ends(results, "pretrain", T).claim(REFERENCE, family, figure)
            said.append(f"- {METRICS[figure]}, thoughts at {at(T)}: {claim}")
    return "\n".join([*said, reached(results)])


def reached(results: Results) -> str:
    """In how many worlds each trained arm learns the task."""
    final, counts = ends(results, "pretrain", 1.0), []
    for arm in (REFERENCE, *FAMILY):
        accuracy = final.by_seed(arm, "accuracy_with_thought").values()
        if ARMS[arm].is_trained and accuracy:
            learned = sum(value > LEARNED for value in accuracy)
            counts.append(f"{WORDS[arm]} {learned} of {len(accuracy)}")
    return f"- worlds with an accuracy above {LEARNED:g}, thoughts at T 1: {', '.join(counts)}."


def speaks_against(results: Results) -> str:
    """The same where RLP can be worse: what it does to prediction without thoughts."""
    family = {arm: WORDS[arm] for arm in (REFERENCE, *FAMILY) if arm != "base_best_of_g"}
    final = ends(results, "pretrain", 1.0)
    said = [
        f"- {METRICS[figure]}{note}: {final.claim(REFERENCE, family, figure)}"
        for figure, note in (
            ("accuracy_without_thought", ""),
            ("document_loss_nats", " on plain documents, nats a token, where above is worse"),
        )
    ]
    return "\n".join(said)


def pretrain(results: Results) -> str:
    """Means over seeds after pretraining, and RLP minus each arm of the family."""
    warm, cold = (ends(results, "pretrain", T) for T in TEMPERATURES)
    found = [
        {one.arm: one for one in part.compare(REFERENCE, FAMILY, "accuracy_with_thought")}
        for part in (warm, cold)
    ]
    rows = []
    for arm in (REFERENCE, *FAMILY, *BESIDE):
        figures = [
            told(mean_of(part, arm, figure))
            for part, figure in (
                (warm, "accuracy_with_thought"),
                (cold, "accuracy_with_thought"),
                (warm, "gain_over_start_nats"),
                (cold, "gain_over_start_nats"),
                (warm, "accuracy_without_thought"),
                (warm, "document_loss_nats"),
            )
        ]
        if any(figures):
            rows.append([WORDS[arm], *figures, *(against(part.get(arm)) for part in found)])
    header = [
        "arm",
        *(f"accuracy, {at(T)}" for T in TEMPERATURES),
        *(f"gain, {at(T)}" for T in TEMPERATURES),
        "accuracy without",
        "held-out loss",
        *(f"RLP minus arm: accuracy, {at(T)}" for T in TEMPERATURES),
    ]
    return markdown_table(header, rows)


def beside(results: Results) -> str:
    """The other questions, each a family of one."""
    said = []
    for arm in BESIDE:
        parts = [
            ends(results, "pretrain", T).claim(
                REFERENCE,
                {REFERENCE: WORDS[REFERENCE], arm: WORDS[arm]},
                "accuracy_with_thought",
            )
            for T in TEMPERATURES
            if results.has(arm=arm)
        ]
        said += [f"- {at(T)}: {part}" for T, part in zip(TEMPERATURES, parts)]
    return "\n".join(said)


def selection(results: Results) -> str:
    """What can be had from the base without training: the best of its thoughts, and their vote."""
    rows = []
    for T in TEMPERATURES:
        part = ends(results, "pretrain", T)
        shown = [
            mean_of(part, "base", "accuracy_with_thought"),
            mean_of(part, "base_best_of_g", "accuracy_with_thought"),
            _mean_of_other(part, "base_best_of_g", "accuracy_of_vote"),
            mean_of(part, "base_best_of_g", "gain_over_start_nats"),
            _mean_of_other(part, "base_best_of_g", "gain_of_mixture_nats"),
        ]
        rows.append([at(T), *map(told, shown)])
    header = ["thoughts at", "one thought", "the most confident of 8", "vote of 8"]
    return markdown_table(
        [*header, "gain, most confident", "gain, mean of the 8 predictions"], rows
    )


def _mean_of_other(part: Results, arm: str, name: str) -> float | None:
    values = [line[name] for line in part.where(arm=arm).lines if line.get(name) is not None]
    return float(np.mean(values)) if values else None


def sweep(results: Results) -> str:
    """The base over temperatures, and the one that other documents would choose."""
    lines = results.where(arm="base", stage="sweep")
    rows = []
    for T in lines.values("temperature"):
        part = lines.where(temperature=T)
        accuracy = list(part.by_seed("base", "accuracy_with_thought").values())
        rows.append(
            [
                f"{T:g}",
                told(float(np.mean(accuracy))),
                told(max(accuracy)),
                told(mean_of(part, "base", "gain_over_start_nats")),
            ]
        )
    chosen = [_chosen_on_other_documents(lines, seed) for seed in lines.values("seed")]
    rows.append(
        [
            "chosen on other documents",
            told(float(np.mean([line["accuracy_with_thought"] for line in chosen]))),
            told(max(line["accuracy_with_thought"] for line in chosen)),
            told(float(np.mean([line["gain_over_start_nats"] for line in chosen]))),
        ]
    )
    return markdown_table(
        ["temperature", "accuracy with a thought", "the best seed's", "gain over no thought"], rows
    )


def _chosen_on_other_documents(lines: Results, seed: int) -> dict:
    return max(lines.where(seed=seed).lines, key=lambda line: line["accuracy_on_other_documents"])


def stations(results: Results, stage: str, temperature: float) -> list[tuple[int, Results]]:
    """The points of a curve of post-training, the first of them before its first step, with their
    lines."""
    before = ends(results, "pretrain", temperature)
    if stage == "rlvr":
        before = results.where(stage="sft", stage_step=RLVR_FROM, temperature=temperature)
    later = [
        (step, results.where(stage=stage, stage_step=step, temperature=temperature))
        for step in STEPS[stage]
    ]
    return [(0, before), *later]


def post(results: Results) -> str:
    """Accuracy with a thought along both stages of post-training, with the test's word at every
    point: `*` where RLP is above, `!` where it is below."""
    arms = [arm for arm in POST_TRAINED if results.has(arm=arm, stage="sft")]
    tables = []
    for T in TEMPERATURES:
        points = [
            (f"{words} {step}", part)
            for stage, words in (("sft", "SFT"), ("rlvr", "RLVR"))
            for step, part in stations(results, stage, T)
            if step or stage == "sft"
        ]
        cells: dict[str, list[str]] = {arm: [] for arm in arms}
        for _, part in points:
            found = part.compare(REFERENCE, arms[1:], "accuracy_with_thought")
            marks = {one.arm: {"above": "*", "below": "!"}.get(one.relation, "") for one in found}
            for arm in arms:
                mean = told(mean_of(part, arm, "accuracy_with_thought"))
                cells[arm].append(mean + marks.get(arm, ""))
        header = [f"thoughts at {at(T)}", *(label for label, _ in points)]
        tables.append(markdown_table(header, [[WORDS[arm], *cells[arm]] for arm in arms]))
    return "\n\n".join(tables)


def post_claims(results: Results) -> str:
    """What the test allows to be said at the end of each stage of post-training."""
    said = []
    for stage, words in (
        ("sft", f"{STEPS['sft'][-1]} steps of SFT"),
        ("rlvr", f"{RLVR_FROM} of SFT and {STEPS['rlvr'][-1]} of RLVR"),
    ):
        arms = {arm: WORDS[arm] for arm in POST_TRAINED if results.has(arm=arm, stage=stage)}
        for T in TEMPERATURES:
            claim = ends(results, stage, T).claim(REFERENCE, arms, "accuracy_with_thought")
            said.append(f"- after {words}, thoughts at {at(T)}: {claim}")
    return "\n".join(said)


def seeds(results: Results) -> str:
    """Every world by itself, the base that computes best first."""
    final = ends(results, "pretrain", 1.0)
    arms = [arm for arm in (REFERENCE, *FAMILY) if final.has(arm=arm)]
    bases = sorted(final.where(arm="base").lines, key=lambda line: -line["computed_frac"])
    rows = [
        [
            str(base["seed"]),
            told(base["computed_frac"]),
            told(base["computing_share"]),
            told(base["computing_right_frac"]),
            told(base["computing_gain_nats"]),
            *(told(final.by_seed(arm, "accuracy_with_thought").get(base["seed"])) for arm in arms),
        ]
        for base in bases
    ]
    header = ["seed", "right words in a computing thought", "thoughts that compute"]
    header += ["of these with a gain", "their gain, nats", *(WORDS[arm] for arm in arms)]
    return markdown_table(header, rows)


def bounded(results: Results) -> str:
    """What a floor under the gain does, world by world, in the order of `seeds`."""
    final = ends(results, "pretrain", 1.0)
    bases = sorted(final.where(arm="base").lines, key=lambda line: -line["computed_frac"])
    order = [base["seed"] for base in bases]
    rows = []
    for arm in (REFERENCE, "rlp_bounded"):
        accuracy = final.by_seed(arm, "accuracy_with_thought")
        learned = sum(value > LEARNED for value in accuracy.values())
        cells = [told(accuracy.get(seed)) for seed in order]
        rows.append([WORDS[arm], *cells, f"{learned} of {len(accuracy)}"])
    header = ["accuracy, T 1, in the world of seed", *map(str, order), f"above {LEARNED:g}"]
    return markdown_table(header, rows)


def costs(results: Results) -> str:
    """What each arm spent in pretraining, mean over seeds."""
    final, rows = ends(results, "pretrain", 1.0), []
    for arm in ARMS:
        lines = final.where(arm=arm).lines
        if lines:
            mean = {
                name: np.mean([line[name] for line in lines])
                for name in ("stage_step", "input_tokens", "flops", "paper_flops", "seconds")
            }
            rows.append(
                [
                    WORDS[arm],
                    str(len(lines)),
                    f"{mean['stage_step']:.0f}",
                    f"{mean['input_tokens']:,.0f}",
                    f"{mean['flops']:.3g}",
                    f"{mean['paper_flops']:,.0f}",
                    f"{mean['seconds']:.1f}",
                ]
            )
    header = ["arm", "seeds", "steps", "input tokens", "FLOPs", "paper's T_flop", "seconds"]
    return markdown_table(header, rows)


def compared(results: Results) -> str:
    """The small table of the main README, and the sentences that go with it."""
    arms = [arm for arm in (REFERENCE, *FAMILY) if results.has(arm=arm, stage="pretrain")]
    rows = []
    for T in TEMPERATURES:
        final = ends(results, "pretrain", T)
        shown = [told(mean_of(final, arm, "accuracy_with_thought"), ".2f") for arm in arms]
        rows.append([at(T), *shown])
    last = ends(results, "rlvr", 1.0)
    if last.lines:
        shown = [told(mean_of(last, arm, "accuracy_with_thought"), ".2f") for arm in arms]
        rows.append([f"{at(1.0)}, and the same SFT and RLVR", *shown])
    family = {arm: WORDS[arm] for arm in (REFERENCE, *FAMILY)}
    claim = {
        T: ends(results, "pretrain", T).claim(REFERENCE, family, "accuracy_with_thought")
        for T in TEMPERATURES
    }
    sentences = "\n".join([*(f"- {at(T)}: {said}" for T, said in claim.items()), reached(results)])
    return markdown_table(["thoughts at", *(WORDS[arm] for arm in arms)], rows) + "\n\n" + sentences


def sections(results: Results) -> dict[str, str]:
    """Every generated part of a page, by name."""
    return {
        "claims": claims(results),
        "against": speaks_against(results),
        "pretrain": pretrain(results),
        "beside": beside(results),
        "selection": selection(results),
        "sweep": sweep(results),
        "post": post(results),
        "post_claims": post_claims(results),
        "seeds": seeds(results),
        "bounded": bounded(results),
        "costs": costs(results),
        "compared": compared(results),
    }


def filled(path: Path, parts: dict[str, str]) -> str:
    """A page of `PAGES` as the results make it."""
    return fill_page(path.read_text(encoding="utf-8"), {name: parts[name] for name in PAGES[path]})


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables, claims and figures from results.jsonl.")
    parser.add_argument("results", type=Path, nargs="?", default=FOLDER / "results.jsonl")
    parser.add_argument("--write", action="store_true", help="fill in the pages and draw")
    arguments = parser.parse_args()
    try:
        results = read_results(arguments.results, LAYOUT)
    except ConfigError as error:
        print(f"analyze: {error}", file=sys.stderr)
        return 2
    seeds = results.where(arm=REFERENCE, stage="pretrain").values("seed")
    for stage, arms in (("pretrain", ARMS), ("sft", POST_TRAINED), ("rlvr", POST_TRAINED)):
        if said := results.where(stage=stage).missing(list(arms), seeds):
            print(f"{stage}: {said} What is there is told.", file=sys.stderr)
    parts = sections(results)
    print("\n\n".join(f"{name}\n{text}" for name, text in parts.items()))
    if arguments.write:
        from figures import draw

        for path in PAGES:
            path.write_text(filled(path, parts), encoding="utf-8")
        draw(results, FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
