"""Tables of a report: the panel before and after, what post-training did, and the ledger."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rlp.measure.metrics import EVALUATION
from rlp.measure.report_runs import Arm, RunRecord

GAINS = {
    "gain_over_start_nats": "Gain over the start",
    "gain_over_ema_nats": "Gain over the EMA",
    "gain_over_no_think_nats": "Gain over its own no-think",
    "gain_over_empty_nats": "Gain over an empty thought",
    "gain_over_shuffled_nats": "Gain over a shuffled thought",
}

BEFORE_AFTER = GAINS | {
    "positive_gain_frac": "Positions with a positive gain",
    "accuracy_with_thought": "Accuracy with a thought",
    "accuracy_without_thought": "Accuracy without",
    "document_loss_nats": "Loss on the documents",
    "thought_tokens_mean": "Thought length",
    "panel_positions": "Positions",
}

COLD = ("accuracy_with_thought", "gain_over_start_nats")
COLD_WORDS = ", cold thoughts"
"""What is shown of an evaluation whose thoughts are drawn at a lower temperature, and how."""

POST_TRAINING = ("accuracy_with_thought", "accuracy_without_thought", "gain_over_start_nats")
"""What `post_training.jsonl` says of each stage."""

DECIMALS = {
    "nats": ".4f",
    "nats per token": ".4f",
    "fraction": ".3f",
    "tokens": ".1f",
    "positions": ",.0f",
}
"""How a number of the panel is written, by its unit."""


class Cell(NamedTuple):
    """A number in a table, and in small type the range that goes with it."""

    text: str
    spread: str = ""


def number(value: float | None, digits: str) -> str:
    """A number as a table shows it; a dash where there is none.

    Args:
        digits: as `format` takes them, such as `.3f`.
    """
    return "-" if value is None else format(value, digits)


def hours_and_minutes(seconds: float | None) -> str:
    """Seconds with their units spelled out, for a page without a clock beside it: 1 h 02 min."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def digits(name: str) -> str:
    """How a number of the panel is written."""
    return ("+" if name.startswith("gain") else "") + DECIMALS[EVALUATION[name].unit]


def before_and_after(run: RunRecord) -> dict:
    """The panel of one run before and after; of an unfinished run, before and latest."""
    before, after = run.before_and_after()
    later = "after" if run.summary is not None else f"step {after.get('step', '-')}"
    names = [name for name in BEFORE_AFTER if name in before or name in after]
    rows = [_before_after_row(name, before, after) for name in names]
    cold = run.cold()
    for name in COLD:
        if any(name in line for line in cold):
            row = _before_after_row(name, *cold)
            rows.append(row | {"what": row["what"] + COLD_WORDS})
    return {"later": later, "rows": rows}


def _before_after_row(name: str, before: dict, after: dict) -> dict:
    change, unit = "", EVALUATION[name].unit
    if name != "panel_positions" and name in before and name in after:
        change = number(after[name] - before[name], "+" + DECIMALS[unit])
    return {
        "what": BEFORE_AFTER[name],
        "unit": unit,
        "definition": EVALUATION[name].definition,
        "before": _panel_cell(name, before),
        "after": _panel_cell(name, after),
        "change": change,
    }


def _panel_cell(name: str, line: dict) -> Cell:
    """A number of one evaluation, with its bootstrap interval where there is one."""
    ends = (line.get(f"{name}_low"), line.get(f"{name}_high"))
    return Cell(
        number(line.get(name), digits(name)),
        "" if None in ends else " to ".join(number(end, digits(name)) for end in ends),
    )


def _spread_cell(values: list[float | None], digits: str) -> Cell:
    """Mean of the runs that have the number, and their least and largest."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("-")
    low, high = number(min(known), digits), number(max(known), digits)
    return Cell(number(fmean(known), digits), f"{low} to {high}" if low != high else "")


def results(arms: list[Arm], names: list[str]) -> dict:
    """Numbers of the panel after the runs, an arm a row; before them all, the first row."""
    return _results(arms, names, [[run.before_and_after() for run in arm.runs] for arm in arms], "")


def cold_results(arms: list[Arm]) -> dict:
    """The same of thoughts at the lower temperature."""
    return _results(arms, COLD, [[run.cold() for run in arm.runs] for arm in arms], COLD_WORDS)


def _results(
    arms: list[Arm], names: Sequence[str], ends: list[list[tuple[dict, dict]]], words: str
) -> dict:
    names = [name for name in names if any(name in after for arm in ends for _, after in arm)]
    rows = [(None, _result_cells(names, [before for arm in ends for before, _ in arm]))]
    for arm, of_runs in zip(arms, ends):
        rows.append((arm, _result_cells(names, [after for _, after in of_runs])))
    columns = [
        (BEFORE_AFTER[name] + words, EVALUATION[name].unit, EVALUATION[name].definition)
        for name in names
    ]
    return {"columns": columns, "rows": rows if names else []}


def _result_cells(names: list[str], lines: list[dict]) -> list[Cell]:
    """Of one evaluation, with its bootstrap intervals; of several that differ, with their
    spread."""
    cells = []
    for name in names:
        different = different_lines(lines, name)
        if len(different) == 1:
            cells.append(_panel_cell(name, different[0]))
        else:
            cells.append(_spread_cell([line.get(name) for line in lines], digits(name)))
    return cells


def different_lines(lines: list[dict], name: str) -> list[dict]:
    """Evaluations that have a number, those that say the same of it once: runs from one start have
    one panel before them."""
    different = {}
    for line in lines:
        if line.get(name) is not None:
            different[line[name], line.get(f"{name}_low"), line.get(f"{name}_high")] = line
    return list(different.values())


def post_training(arms: list[Arm]) -> list[tuple[Arm, str, list[Cell]]]:
    """(arm, stage, one cell per name in `POST_TRAINING`), where runs have a
    `post_training.jsonl`."""
    rows = []
    for arm in arms:
        stages: dict[object, list[dict]] = {}
        for run in arm.runs:
            for line in run.post_training:
                stages.setdefault(line.get("stage", "-"), []).append(line)
        for stage, lines in stages.items():
            cells = [
                _spread_cell([line.get(name) for line in lines], digits(name))
                for name in POST_TRAINING
            ]
            rows.append((arm, str(stage), cells))
    return rows


def ledger_table(run: RunRecord) -> dict:
    """One run, phase by phase."""
    ledger = {"phases": {}} | (run.ledger or {})
    total = ledger.get("flops") or math.nan
    rows = [
        (
            phase,
            f"{count['tokens_in']:,}",
            f"{count['tokens_generated']:,}",
            f"{count['tokens_trained']:,}",
            f"{count['flops']:.3g}",
            "-" if math.isnan(total) else f"{count['flops'] / total:.0%}",
            _phase_time(count),
        )
        for phase, count in ledger["phases"].items()
    ]
    return {
        "rows": rows,
        "flops": number(ledger.get("flops"), ".3g"),
        "paper_flops": number(ledger.get("paper_flops"), ".3g"),
        "seconds": hours_and_minutes(ledger.get("seconds")),
    }


def _phase_time(count: dict) -> str:
    """A dash for work whose time was taken together with another phase's: FLOPs in no time are a
    lie."""
    return "-" if count["flops"] and not count["seconds"] else hours_and_minutes(count["seconds"])


def ledger_comparison(arms: list[Arm]) -> dict:
    """Means over the runs of each arm: totals, and the seconds of each phase that took any."""
    totals = [[run.totals() for run in arm.runs] for arm in arms]
    phases: dict[str, bool] = {}
    for total in (total for of_arm in totals for total in of_arm):
        for phase, count in total["phases"].items():
            phases[phase] = phases.get(phase, False) or bool(count.get("seconds"))
    timed = [phase for phase, took_time in phases.items() if took_time]
    rows = [(arm, _ledger_cells(of_arm, timed)) for arm, of_arm in zip(arms, totals)]
    return {"phases": timed, "rows": rows}


def _ledger_cells(totals: list[dict], phases: list[str]) -> list[Cell]:
    """One arm's: tokens read and sampled, FLOPs, those of the paper, seconds, and each phase's."""
    of_phases = [
        [total["phases"].get(phase, {}).get("seconds") for total in totals] for phase in phases
    ]
    return [
        _spread_cell([total.get("input_tokens") for total in totals], ",.0f"),
        _spread_cell([_generated(total) for total in totals], ",.0f"),
        _spread_cell([total.get("flops") for total in totals], ".4g"),
        _spread_cell([total.get("paper_flops") for total in totals], ".4g"),
        _time_cell([total.get("seconds") for total in totals]),
        *(_time_cell(seconds) for seconds in of_phases),
    ]


def _generated(total: dict) -> int | None:
    if not total["phases"]:
        return None
    return sum(count["tokens_generated"] for count in total["phases"].values())


def _time_cell(seconds: list[float | None]) -> Cell:
    known = [value for value in seconds if value is not None]
    return Cell(hours_and_minutes(fmean(known)) if known else "-")
