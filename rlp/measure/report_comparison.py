"""Arms of a report beside its first arm: paired differences over seeds, and what may be claimed."""

import math

from rlp.measure.paired import Difference, claim_in_words, compare
from rlp.measure.report_runs import Arm, RunRecord
from rlp.measure.report_tables import BEFORE_AFTER, COLD_WORDS, digits, number

FIGURES = ("accuracy_with_thought", "accuracy_without_thought", "gain_over_start_nats")

READINGS = {"after": "", "after_cold": COLD_WORDS}
"""Evaluations of a summary, and what is said of them."""

PANEL_SETTINGS = (
    "data.held_out",
    "data.max_document_tokens",
    "position.marker",
    "position.per_document",
    "position.min_prefix_tokens",
    "target.horizon",
    "thought.temperature",
    "thought.max_thought_tokens",
    "evaluation.panel_positions",
    "evaluation.cold_temperature",
)
"""What a panel is drawn and read by: where two runs of one seed differ in one of them, their
numbers are of different things."""


def comparison(arms: list[Arm]) -> dict | None:
    """A family of paired differences for each figure, of the first arm minus each other; None where
    there is one arm, or nothing was measured."""
    if len(arms) < 2:
        return None
    reference, *others = arms
    refused = {arm.label: why for arm in others if (why := _not_comparable(reference, arm))}
    blocks = []
    for reading, words in READINGS.items():
        for figure in FIGURES:
            values = {arm.label: _by_seed(arm, reading, figure) for arm in arms}
            if not any(values.values()):
                continue
            own = values.pop(reference.label)
            found = compare(own, values, refused)
            what = f"{BEFORE_AFTER[figure]}{words}"
            blocks.append(
                {
                    "claim": f"{what}: {claim_in_words(reference.label, found)}",
                    "rows": [
                        (what, arm, *_cells(one, figure, reference))
                        for arm, one in zip(others, found)
                    ],
                }
            )
    return {"reference": reference, "blocks": blocks} if blocks else None


def _by_seed(arm: Arm, reading: str, figure: str) -> dict[int, float]:
    """A figure of the runs that have ended."""
    found = {}
    for run in arm.runs:
        value = ((run.summary or {}).get(reading) or {}).get(figure)
        if value is not None:
            found[run.seed] = value
    return found


def _not_comparable(reference: Arm, arm: Arm) -> str:
    """Why the runs of two arms are not of the same panels, seed by seed; empty where they are."""
    for one in (reference, arm):
        seeds = [run.seed for run in one.runs]
        if len(set(seeds)) < len(seeds):
            return f"{one.label} has several runs of one seed"
    ours = {run.seed: run for run in reference.runs}
    for run in arm.runs:
        if run.seed in ours and (apart := _panels_apart(ours[run.seed], run)):
            return f"their panels differ in {', '.join(apart)}"
    return ""


def _panels_apart(one: RunRecord, other: RunRecord) -> list[str]:
    apart = [key for key in PANEL_SETTINGS if one.setting(key) != other.setting(key)]
    if not apart:
        sizes = [run.before_and_after()[1] for run in (one, other)]
        apart = [
            name.replace("panel_", "") + " counted"
            for name in ("panel_positions", "panel_documents")
            if all(name in size for size in sizes) and sizes[0][name] != sizes[1][name]
        ]
    return apart


def _cells(one: Difference, figure: str, reference: Arm) -> tuple[str, str, str, str, str]:
    """Mean, t interval, p, Holm's p, and the relation in words."""
    form = "+" + digits(figure).lstrip("+")
    ends = [number(None if math.isnan(end) else end, form) for end in (one.low, one.high)]
    return (
        number(None if math.isnan(one.mean) else one.mean, form),
        " to ".join(ends) if "-" not in ends else "-",
        number(one.p if one.seeds else None, ".4f"),
        number(None if math.isnan(one.adjusted) else one.adjusted, ".4f"),
        f"no verdict: {one.refusal}"
        if one.refusal
        else f"{reference.label} is {one.relation} it"
        if one.relation != "not told apart from"
        else "not told apart",
    )
