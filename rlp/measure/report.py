"""One page about one or several runs: what they were, what they gained, what the thoughts say.

Reads run folders, finished or not, and writes a single HTML file that needs nothing else, neither
a server nor a network. Several runs are compared arm by arm: an arm is what runs that differ in
their seed have in common, and is shown by their mean and their spread. A file that a run does not
have, because it is older or has not come to it yet, leaves its part of the page out.

What a model or a document wrote is hostile until shown otherwise: it is escaped by the template,
and its control characters are spelled out.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from rlp.config import ConfigError
from rlp.measure.figures import (
    COLORS,
    GREY,
    LINES,
    Curve,
    Interval,
    draw_curves,
    draw_intervals,
)
from rlp.measure.metrics import EVALUATION, METRICS
from rlp.measure.report_runs import (
    Arm,
    Run,
    _arms,
    _distinct,
    _read_run,
)
from rlp.measure.verdict import match_words, verdict
from rlp.measure.view import information_gain_of, worth_of
from rlp.process.console import quoted_text, visible_text
from rlp.process.files import open_to_read, write_atomically
from rlp.process.run_folder import RunFolder, open_run_folder

GENERATOR = '<meta name="generator" content="rlp report">'
"""In the head of every report, so that a report can be told from a file that somebody wrote."""

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

POST_TRAINING = ("accuracy_with_thought", "accuracy_without_thought", "gain_over_start_nats")
"""What `post_training.jsonl` says of each stage."""

THOUGHTS_SHOWN = 3
"""Most helpful thoughts of a step, and as many least helpful ones."""

ALARMS_SHOWN = 10
"""Of a run; there may be one for each step."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One small figure: curves from `metrics.jsonl` or `evaluation.jsonl`."""

    title: str
    unit: str
    note: str
    """What it shows, for who sees it for the first time."""
    names: tuple[str, ...]
    labels: tuple[str, ...] = ("",)


MAIN_PLOTS = (
    Plot(
        "Gain on held-out positions",
        "nats",
        "How much a thought raises the log-probability of the token that really came next.",
        ("gain_over_start_nats", "gain_over_ema_nats"),
        ("over the start", "over the EMA"),
    ),
    Plot(
        "Accuracy on held-out positions",
        "fraction",
        "How often the most probable token is the one that really came next.",
        ("accuracy_with_thought", "accuracy_without_thought"),
        ("with a thought", "without"),
    ),
)
"""Drawn over each axis."""

PLOTS = (
    Plot("Reward", "", "Mean of what the step's thoughts were rewarded with.", ("reward/mean",)),
    Plot(
        "Information gain",
        "nats",
        "How much the step's thoughts raised the log-probability of the token that really came"
        " next.",
        ("gain/mean",),
    ),
    Plot(
        "How many are rewarded",
        "fraction",
        "Thoughts, and positions on average over their thoughts, with a reward above 0.",
        ("reward/positive_frac", "reward/positive_positions_frac"),
        ("thoughts", "positions"),
    ),
    Plot(
        "Positions with nothing to learn",
        "fraction",
        "All thoughts of the position have the same reward.",
        ("reward/flat_groups_frac",),
    ),
    Plot(
        "Thought length",
        "tokens",
        "Sampled tokens, the close marker not counted.",
        ("thought/tokens_mean", "thought/tokens_std"),
        ("mean", "standard deviation"),
    ),
    Plot(
        "Thoughts cut off, thoughts empty",
        "fraction",
        "Ended by the budget; closed at once.",
        ("thought/truncated_frac", "thought/empty_frac"),
        ("cut off", "empty"),
    ),
    Plot(
        "Variety of thoughts",
        "fraction",
        "Different word pairs among the thoughts of a position. A fall: they become one template.",
        ("thought/distinct_bigrams_frac",),
    ),
    Plot(
        "What thoughts repeat",
        "fraction",
        "Copied from the context; holding the target itself; written in another script than the"
        " context.",
        ("thought/copied_frac", "thought/holds_target_frac", "thought/script_switch_frac"),
        ("context", "target", "other script"),
    ),
    Plot(
        "Entropy of thought tokens",
        "nats per token",
        "How open the choice of the next thought token is. Near 0: always the same thought.",
        ("policy/entropy",),
    ),
    Plot("Gradient norm", "", "Before clipping.", ("optim/grad_norm",)),
    Plot(
        "Loss on training documents",
        "nats per token",
        "Next-token loss without thoughts.",
        ("lm/loss",),
    ),
    Plot(
        "Loss on held-out documents",
        "nats per token",
        "The same on documents that are not trained on.",
        ("document_loss_nats",),
    ),
    Plot(
        "Urge to think",
        "probability",
        "Of the open marker where a thought may start, held out; left out of every prediction that"
        " is scored.",
        ("open_marker_mass",),
    ),
)

AXES = {
    "step": "step",
    "tokens": "input tokens",
    "flops": "FLOPs",
    "seconds": "seconds of training",
}


class Cell(NamedTuple):
    """A number in a table, and in small type the range that goes with it."""

    text: str
    spread: str = ""


def write_report(run_folders: list[Path], out: Path) -> None:
    """Write one self-contained HTML page about the runs, over whatever is at `out`.

    Raises:
        ConfigError: a path that is no run folder.
        DamagedFileError: a file of a run that can not be read.
    """
    if not run_folders:
        raise ValueError("write_report needs at least one run folder, got none.")
    folders = [open_run_folder(path) for path in run_folders]
    labels = _distinct(
        [folder.name for folder in folders], [str(folder.path) for folder in folders]
    )
    runs = [_read_run(folder, label) for folder, label in zip(folders, labels)]
    write_atomically(Path(out), _render(runs).encode(), point="report.torn_page")


def report_path(folders: list[RunFolder], out: Path | None) -> Path:
    """Where a report on some runs is written: `out`, or in the folder of a single run. A report
    replaces reports; anything else that has its name stays.

    Raises:
        ConfigError: nothing can be written there.
    """
    if out is None and len(folders) > 1:
        raise ConfigError(
            f"a report on {len(folders)} runs belongs to none of their folders. Write --out FILE."
        )
    out = out or folders[0].report_html
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.parent}. Make it, or write another path."
        )
    if out.is_dir():
        raise ConfigError(
            f"--out {out} is a folder. Write the path of a file, such as {out / 'report.html'}."
        )
    own = {folder.report_html.resolve() for folder in folders}
    if out.exists() and out.resolve() not in own and not _is_report(out):
        raise ConfigError(
            f"--out {out} exists and is no report, so it is not written over. Write another path."
        )
    return out


def _is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`."""
    with open_to_read(path.resolve()) as file:
        return GENERATOR.encode() in file.read(2000)


# The page


def _render(runs: list[Run]) -> str:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "visible": visible_text,
        "quoted": quoted_text,
        "gain": information_gain_of,
        "worth": worth_of,
    }
    arms = _arms(runs)
    # One run is shown by its own name, the seed with it.
    alone = len(runs) == 1
    title = runs[0].label if alone else arms[0].label if len(arms) == 1 else f"{len(arms)} arms"
    return templates.get_template("report.html.j2").render(
        generator=Markup(GENERATOR),
        alone=alone,
        runs=runs,
        arms=arms,
        title=title,
        facts=_common_facts(runs),
        summary=[_arm_summary(arm) for arm in arms],
        verdicts=[(arm, _verdict(arm)) for arm in arms],
        differences=_differences(arms),
        panel=_before_after(runs[0]),
        results=_results(
            arms,
            [name for name in BEFORE_AFTER if name not in (*list(GAINS)[1:], "panel_positions")],
        ),
        gain_results=_results(arms, list(GAINS)),
        alarms=[
            {
                "label": run.label,
                "shown": run.alarms[:ALARMS_SHOWN],
                "more": max(0, len(run.alarms) - ALARMS_SHOWN),
            }
            for run in runs
            if run.alarms
        ],
        changes=[(run.label, run.changes) for run in runs if run.changes],
        main_plots=_main_plots(arms, alone),
        plots=[
            figure for plot in PLOTS if (figure := _figure(plot, arms, "step", alone, (4.4, 2.6)))
        ],
        gains=_gains_figure(arms, alone),
        post_training=_post_training(arms),
        ledger=_ledger_table(runs[0]),
        ledgers=_ledger_comparison(arms),
        thoughts=[
            {"arm": arm, "run": arm.runs[0], "columns": _thought_columns(arm.runs[0])}
            for arm in arms
        ],
        environments=[_environment_rows(run) for run in runs],
        definitions=[
            (name, *metric)
            for name, metric in (METRICS | EVALUATION).items()
            if not name.endswith(("_low", "_high"))
        ],
    )


def _visible(value: object) -> object:
    """What enters the page, before it is escaped: control characters and halves of characters are
    spelled out."""
    return (
        visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _common_facts(runs: list[Run]) -> list[tuple[str, str]]:
    """Rows of (what, value) that are the same for all runs."""
    facts = [_facts(run) for run in runs]
    return [
        (what, value)
        for what, value in facts[0].items()
        if all(fact[what] == value for fact in facts)
    ]


def _facts(run: Run) -> dict[str, str]:
    machine, setting = run.environment or {}, run.setting
    return {
        "Status": _status(run),
        "Model": (
            setting("model.path")
            + (", random initialization" if setting("model.init") == "random" else "")
        ),
        "Data": setting("data.train"),
        "Loss weights": ", ".join(
            f"{term} {setting(f'objective.{term}_weight')}"
            for term in ("policy", "lm", "predictor", "kl")
        ),
        "Thoughts": (
            f"{setting('thought.group_size')} per position, up to"
            f" {setting('thought.max_thought_tokens')} tokens, temperature"
            f" {setting('thought.temperature')}"
        ),
        "Baseline": (
            setting("baseline.kind")
            + (
                f", decay {setting('baseline.ema_decay')}"
                if setting("baseline.kind") == "ema"
                else ""
            )
        ),
        "Batch": (
            f"{setting('optim.batch_size')} documents, positions in each:"
            f" {setting('position.per_document')}, learning rate {setting('optim.learning_rate')}"
        ),
        "Seed": setting("run.seed"),
        "Cost": _cost(run),
        "Started": machine.get("date", "-").replace("T", " ").replace("+00:00", " UTC"),
        "Commit": _commit(machine),
        "Hardware": _hardware(machine),
    }


def _status(run: Run) -> str:
    if run.summary is None:
        return f"unfinished, at step {run.last_step}"
    matched = match_words(run.summary.get("match"))
    return f"finished, {run.summary.get('steps', run.last_step)} steps" + (
        f"; {matched}" if matched else ""
    )


def _cost(run: Run) -> str:
    totals = run.summary or run.ledger
    if totals is None:
        return "-"
    return f"{duration(totals.get('seconds'))}, {number(totals.get('flops'), '.3g')} FLOPs"


def _commit(machine: dict) -> str:
    commit = machine.get("commit")
    return (
        "-"
        if commit is None
        else commit[:10] + (", with uncommitted changes" if machine.get("dirty") else "")
    )


def _hardware(machine: dict) -> str:
    if not machine:
        return "-"
    devices = machine["devices"]
    gpus = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices) if name != "cpu"]
    return (
        ", ".join(gpus)
        or f"{machine['cpu']}, {machine['cores']} cores, ranks: {machine['world_size']}"
    )


def _arm_summary(arm: Arm) -> dict:
    """An arm in the table of arms: its runs and how far they are."""
    seeds = ", ".join(run.setting("run.seed") for run in arm.runs)
    status = _some([_status(run) for run in arm.runs])
    return {
        "arm": arm,
        "runs": len(arm.runs),
        "seeds": seeds,
        "status": status,
        "folders": ", ".join(run.label for run in arm.runs),
    }


def _verdict(arm: Arm) -> list[str]:
    """What an arm's numbers say, in words, and whether it may be compared."""
    ends = [run.before_and_after() for run in arm.runs]
    matches = dict.fromkeys(
        match_words(run.summary.get("match")) for run in arm.runs if run.summary is not None
    )
    so_far = (
        []
        if all(run.summary is not None for run in arm.runs)
        else ["So far, as not every run has ended."]
    )
    return [
        *so_far,
        *verdict([before for before, _ in ends], [after for _, after in ends]),
        *(f"{words[0].upper()}{words[1:]}." for words in matches if words),
    ]


def _differences(arms: list[Arm]) -> list[tuple[str, list[str]]]:
    """Settings in which any two runs differ, where and how they run apart: (key, one cell per
    arm)."""
    settings = {run.label: _flat(run.config) for arm in arms for run in arm.runs}
    keys = dict.fromkeys(
        key
        for flat in settings.values()
        for key in flat
        if not key.startswith(("run.", "logging.", "checkpoint."))
    )
    cells = {
        key: [_some([settings[run.label].get(key, "-") for run in arm.runs]) for arm in arms]
        for key in keys
    }
    return [
        (key, row)
        for key, row in cells.items()
        if len({flat.get(key, "-") for flat in settings.values()}) > 1
    ]


def _flat(config: dict[str, dict[str, object]]) -> dict[str, str]:
    """Settings by dotted key, as text."""
    return {
        f"{section}.{name}": str(value)
        for section, values in config.items()
        for name, value in values.items()
    }


def _some(values: list[str]) -> str:
    """Different values, the first three of them."""
    distinct = list(dict.fromkeys(values))
    return "; ".join(distinct[:3]) + (
        f"; and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    )


# Tables


def number(value: float | None, form: str) -> str:
    """A number as a table shows it; a dash where there is none."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if minutes >= 60
        else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    )


_FORMS = {
    "nats": ".4f",
    "nats per token": ".4f",
    "fraction": ".3f",
    "tokens": ".1f",
    "positions": ",.0f",
}


def _form(name: str) -> str:
    """How a number of the panel is written."""
    return ("+" if name.startswith("gain") else "") + _FORMS[EVALUATION[name].unit]


def _before_after(run: Run) -> dict:
    """The panel of one run before and after; of an unfinished run, before and latest."""
    before, after = run.before_and_after()
    later = "after" if run.summary is not None else f"step {after.get('step', '-')}"
    names = [name for name in BEFORE_AFTER if name in before or name in after]
    return {"later": later, "rows": [_before_after_row(name, before, after) for name in names]}


def _before_after_row(name: str, before: dict, after: dict) -> dict:
    change = (
        ""
        if name == "panel_positions" or name not in before or name not in after
        else number(after[name] - before[name], "+" + _FORMS[EVALUATION[name].unit])
    )
    return {
        "what": BEFORE_AFTER[name],
        "unit": EVALUATION[name].unit,
        "definition": EVALUATION[name].definition,
        "before": _panel_cell(name, before),
        "after": _panel_cell(name, after),
        "change": change,
    }


def _panel_cell(name: str, line: dict) -> Cell:
    """A number of one evaluation, with its bootstrap interval where there is one."""
    ends = (line.get(f"{name}_low"), line.get(f"{name}_high"))
    return Cell(
        number(line.get(name), _form(name)),
        "" if None in ends else " to ".join(number(end, _form(name)) for end in ends),
    )


def _spread_cell(values: list[float | None], form: str) -> Cell:
    """Mean of the runs that have the number, and their least and largest."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("-")
    low, high = number(min(known), form), number(max(known), form)
    return Cell(number(fmean(known), form), f"{low} to {high}" if low != high else "")


def _results(arms: list[Arm], names: list[str]) -> dict:
    """Numbers of the panel after the runs, an arm a row; before them all, the first row."""
    ends = [[run.before_and_after() for run in arm.runs] for arm in arms]
    names = [name for name in names if any(name in after for arm in ends for _, after in arm)]
    before = [line for arm in ends for line, _ in arm]
    rows = [(None, _result_cells(names, before))] + [
        (arm, _result_cells(names, [after for _, after in lines])) for arm, lines in zip(arms, ends)
    ]
    return {
        "columns": [
            (BEFORE_AFTER[name], EVALUATION[name].unit, EVALUATION[name].definition)
            for name in names
        ],
        "rows": rows if names else [],
    }


def _result_cells(names: list[str], lines: list[dict]) -> list[Cell]:
    """Of one evaluation, with its bootstrap intervals; of several that differ, with their
    spread."""
    different = [(name, _different(lines, name)) for name in names]
    return [
        (
            _panel_cell(name, some[0])
            if len(some) == 1
            else _spread_cell([line.get(name) for line in lines], _form(name))
        )
        for name, some in different
    ]


def _different(lines: list[dict], name: str) -> list[dict]:
    """Evaluations that have a number, those that say the same of it once: runs from one start have
    one panel before them."""
    return list(
        {
            (line[name], line.get(f"{name}_low"), line.get(f"{name}_high")): line
            for line in lines
            if line.get(name) is not None
        }.values()
    )


def _post_training(arms: list[Arm]) -> list[tuple[Arm, str, list[Cell]]]:
    """(arm, stage, one cell per name in `POST_TRAINING`), where runs have a
    `post_training.jsonl`."""
    rows = []
    for arm in arms:
        lines = [line for run in arm.runs for line in run.post_training]
        for stage in dict.fromkeys(line.get("stage", "-") for line in lines):
            here = [line for line in lines if line.get("stage", "-") == stage]
            rows.append(
                (
                    arm,
                    str(stage),
                    [
                        _spread_cell([line.get(name) for line in here], _form(name))
                        for name in POST_TRAINING
                    ],
                )
            )
    return rows


def _ledger_table(run: Run) -> dict:
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
        "seconds": duration(ledger.get("seconds")),
    }


def _phase_time(count: dict) -> str:
    """A dash for work whose time was taken together with another phase's: FLOPs in no time are a
    lie."""
    return "-" if count["flops"] and not count["seconds"] else duration(count["seconds"])


def _ledger_comparison(arms: list[Arm]) -> dict:
    """Means over the runs of each arm: totals, and the seconds of each phase that took any."""
    totals = [[run.totals() for run in arm.runs] for arm in arms]
    phases = [
        phase
        for phase in dict.fromkeys(
            phase for arm in totals for total in arm for phase in total["phases"]
        )
        if any(total["phases"].get(phase, {}).get("seconds") for arm in totals for total in arm)
    ]

    def generated(total: dict) -> int | None:
        return (
            sum(count["tokens_generated"] for count in total["phases"].values())
            if total["phases"]
            else None
        )

    def seconds(values: list[float | None]) -> Cell:
        known = [value for value in values if value is not None]
        return Cell(duration(fmean(known)) if known else "-")

    rows = []
    for arm, runs in zip(arms, totals):
        cells = [
            _spread_cell([total.get("input_tokens") for total in runs], ",.0f"),
            _spread_cell([generated(total) for total in runs], ",.0f"),
            *(
                _spread_cell([total.get(name) for total in runs], ".4g")
                for name in ("flops", "paper_flops")
            ),
            seconds([total.get("seconds") for total in runs]),
        ]
        rows.append(
            (
                arm,
                cells
                + [
                    seconds([total["phases"].get(phase, {}).get("seconds") for total in runs])
                    for phase in phases
                ],
            )
        )
    return {"phases": phases, "rows": rows}


# Figures


def _main_plots(arms: list[Arm], alone: bool) -> list[dict]:
    """The main plots over each axis that all runs know; of one run over its steps, as nothing is
    compared."""
    drawn = []
    for axis, label in AXES.items() if not alone else (("step", AXES["step"]),):
        figures = [
            figure
            for plot in MAIN_PLOTS
            if (figure := _figure(plot, arms, axis, alone, (5.2, 2.8)))
        ]
        if figures:
            drawn.append({"axis": axis, "label": label, "figures": figures})
    return drawn


def _figure(
    plot: Plot, arms: list[Arm], axis: str, alone: bool, size: tuple[float, float]
) -> dict | None:
    """A plot with its caption; None where no run has its numbers. One run has a color per quantity;
    arms have a color each, and a dash per quantity."""
    curves, shown = [], set()
    for arm in arms:
        for j, name in enumerate(plot.names):
            x, values = arm_curve(arm, name, axis)
            if len(x):
                curves.append(
                    Curve(
                        x,
                        values,
                        COLORS[j] if alone else arm.color,
                        LINES[j],
                        dots=name in EVALUATION,
                    )
                )
                shown.add(j)
    if not curves:
        return None
    keys = (
        [(plot.labels[j], COLORS[j] if alone else "#555555", LINES[j]) for j in sorted(shown)]
        if len(plot.names) > 1
        else []
    )
    return {
        "title": plot.title,
        "unit": plot.unit,
        "note": plot.note,
        "source": draw_curves(curves, keys, unit=plot.unit, x_label=AXES[axis], size=size),
    }


def arm_curve(arm: Arm, name: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric of an arm: x [X] and values [runs, X], at the steps at which all its runs measured
    it.

    At a step the runs' places on the axis (tokens, FLOPs, seconds) are averaged. Runs that never
    measured it are left out.
    """
    runs = [(run.along(axis), values) for run in arm.runs if (values := run.values(name))]
    if not runs:
        return np.zeros(0), np.zeros((0, 0))
    steps = [
        step
        for step in runs[0][1]
        if all(step in places and step in values for places, values in runs)
    ]
    places = np.array([[places[step] for step in steps] for places, _ in runs], dtype=float)
    return places.mean(axis=0), np.array(
        [[values[step] for step in steps] for _, values in runs], dtype=float
    )


def _gains_figure(arms: list[Arm], alone: bool) -> dict | None:
    """What the gain is a gain over: before all runs, and after, arm by arm. None where the controls
    were not measured."""
    ends = [[run.before_and_after() for run in arm.runs] for arm in arms]
    before = _gain_intervals([line for arm in ends for line, _ in arm])
    after = [_gain_intervals([line for _, line in arm]) for arm in ends]
    names = [
        label for name, label in GAINS.items() if any(label in intervals for intervals in after)
    ]
    if not {GAINS["gain_over_empty_nats"], GAINS["gain_over_shuffled_nats"]} & set(names):
        return None
    series = [(GREY, before)] + [
        (COLORS[0] if alone else arm.color, intervals) for arm, intervals in zip(arms, after)
    ]
    return {
        "source": draw_intervals(names, series, x_label="nats"),
        "grey": GREY,
        "color": COLORS[0],
    }


def _gain_intervals(lines: list[dict]) -> dict[str, Interval]:
    """Gains by label: of one evaluation with its bootstrap interval; of several that differ, their
    mean, least and largest."""
    intervals = {}
    for name, label in GAINS.items():
        values, different = (
            [line[name] for line in lines if line.get(name) is not None],
            _different(lines, name),
        )
        if len(different) == 1:
            intervals[label] = Interval(
                values[0],
                different[0].get(f"{name}_low", values[0]),
                different[0].get(f"{name}_high", values[0]),
            )
        elif values:
            intervals[label] = Interval(fmean(values), min(values), max(values))
    return intervals


# Thoughts and details


def _thought_columns(run: Run) -> list[dict]:
    """The first and the last step with logged thoughts, side by side."""
    steps = sorted({thought["step"] for thought in run.thoughts})
    ends = steps if len(steps) < 2 else [steps[0], steps[-1]]
    return [
        {
            "step": step,
            **_extremes([thought for thought in run.thoughts if thought["step"] == step]),
        }
        for step in ends
    ]


def _extremes(thoughts: list[dict]) -> dict[str, list[dict]]:
    """Most and least helpful thoughts by `worth_of`, none of them twice; those of which neither was
    measured are left out."""
    different = {
        (thought["document"], thought["position"], thought["thought"]): thought
        for thought in thoughts
        if worth_of(thought) is not None
    }
    ranked = sorted(different.values(), key=lambda thought: -worth_of(thought))
    num_best, num_worst = (
        min(THOUGHTS_SHOWN, (len(ranked) + 1) // 2),
        min(THOUGHTS_SHOWN, len(ranked) // 2),
    )
    return {"best": ranked[:num_best], "worst": ranked[::-1][:num_worst]}


def _environment_rows(run: Run) -> list[tuple[str, str]]:
    return [(name, _plain(value)) for name, value in (run.environment or {}).items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner or 'not installed'}" for name, inner in value.items())
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else "-"
        if value is None
        else str(value)
    )
