"""One page about one or several runs: what they were, what they gained, what the thoughts say.

Reads run folders, finished or not, and writes a single HTML file that needs nothing else, neither
a server nor a network. Several runs are compared arm by arm: an arm is what runs that differ in
their seed have in common, and is shown by their mean and their spread. A file that a run does not
have, because it is older or has not come to it yet, leaves its part of the page out.

What a model or a document wrote is hostile until shown otherwise: it is escaped by the template,
and its control characters are spelled out.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup

from rlp.config import ConfigError
from rlp.measure.metrics import EVALUATION, METRICS
from rlp.measure.report_comparison import comparison
from rlp.measure.report_facts import arm_summary, common_facts, differences, environment_rows
from rlp.measure.report_plots import gains_figure, main_plots, small_plots
from rlp.measure.report_runs import Arm, RunRecord, arms_of, distinct_names, read_run
from rlp.measure.report_tables import (
    BEFORE_AFTER,
    GAINS,
    before_and_after,
    cold_results,
    ledger_comparison,
    ledger_table,
    post_training,
    results,
)
from rlp.measure.verdict import budget_in_words, verdict
from rlp.measure.view import information_gain_of, worth_of
from rlp.process.console import quoted_text, visible_text
from rlp.process.files import open_to_read, write_atomically
from rlp.process.run_folder import RunFolder, open_run_folder

GENERATOR = '<meta name="generator" content="rlp report">'
"""In the head of every report, so that a report can be told from a file that somebody wrote."""

THOUGHTS_SHOWN = 3
"""Most helpful thoughts of a step, and as many least helpful ones."""

ALARMS_SHOWN = 10
"""Of a run; there may be one for each step."""


def write_report(run_folders: list[Path], out: Path) -> None:
    """Write one self-contained HTML page about the runs, over whatever is at `out`.

    Raises:
        ConfigError: a path that is no run folder.
        DamagedFileError: a file of a run that can not be read.
    """
    if not run_folders:
        raise ValueError("write_report needs at least one run folder, got none.")
    folders = [open_run_folder(path) for path in run_folders]
    labels = distinct_names(
        [folder.name for folder in folders], [str(folder.path) for folder in folders]
    )
    runs = [read_run(folder, label) for folder, label in zip(folders, labels)]
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


def _render(runs: list[RunRecord]) -> str:
    arms = arms_of(runs)
    # One run is shown by its own name, the seed with it.
    alone = len(runs) == 1
    title = arms[0].label if len(arms) == 1 else f"{len(arms)} arms"
    rest = [name for name in BEFORE_AFTER if name not in GAINS and name != "panel_positions"]
    definitions = [
        (name, *metric)
        for name, metric in (METRICS | EVALUATION).items()
        if not name.endswith(("_low", "_high"))
    ]
    return page_template(Path(__file__).parent / "report.html.j2").render(
        generator=Markup(GENERATOR),
        alone=alone,
        runs=runs,
        arms=arms,
        title=runs[0].label if alone else title,
        facts=common_facts(runs),
        summary=[arm_summary(arm) for arm in arms],
        verdicts=[(arm, _verdict(arm)) for arm in arms],
        differences=differences(arms),
        panel=before_and_after(runs[0]),
        results=results(arms, [next(iter(GAINS)), *rest]),
        cold_results=cold_results(arms),
        comparison=comparison(arms),
        gain_results=results(arms, list(GAINS)),
        alarms=[_alarms(run) for run in runs if run.alarms],
        changes=[(run.label, run.changes) for run in runs if run.changes],
        main_plots=main_plots(arms, alone),
        plots=small_plots(arms, alone),
        gains=gains_figure(arms, alone),
        post_training=post_training(arms),
        ledger=ledger_table(runs[0]),
        ledgers=ledger_comparison(arms),
        thoughts=[
            {"arm": arm, "run": arm.runs[0], "columns": _thought_columns(arm.runs[0])}
            for arm in arms
        ],
        environments=[environment_rows(run) for run in runs],
        definitions=definitions,
    )


def page_template(path: Path) -> jinja2.Template:
    """A template of a page, which escapes what enters it, and may include the style of reports."""
    folders = [path.parent, Path(__file__).parent]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
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
    return templates.get_template(path.name)


def _visible(value: object) -> object:
    """What enters the page, before it is escaped: control characters and halves of characters are
    spelled out."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return visible_text(value) if is_text else value


def _alarms(run: RunRecord) -> dict:
    return {
        "label": run.label,
        "shown": run.alarms[:ALARMS_SHOWN],
        "more": max(0, len(run.alarms) - ALARMS_SHOWN),
    }


def _verdict(arm: Arm) -> list[str]:
    """What an arm's numbers say, in words, and whether it may be compared."""
    ends = [run.before_and_after() for run in arm.runs]
    finished = [run for run in arm.runs if run.summary is not None]
    sentences = [] if len(finished) == len(arm.runs) else ["So far, as not every run has ended."]
    sentences += verdict([before for before, _ in ends], [after for _, after in ends])
    for words in dict.fromkeys(budget_in_words(run.summary.get("match")) for run in finished):
        if words:
            sentences.append(f"{words[0].upper()}{words[1:]}.")
    return sentences


def _thought_columns(run: RunRecord) -> list[dict]:
    """The first and the last step with logged thoughts, side by side."""
    steps = sorted({thought["step"] for thought in run.thoughts})
    ends = steps if len(steps) < 2 else [steps[0], steps[-1]]
    columns = []
    for step in ends:
        logged = [thought for thought in run.thoughts if thought["step"] == step]
        columns.append({"step": step, **_extremes(logged)})
    return columns


def _extremes(thoughts: list[dict]) -> dict[str, list[dict]]:
    """Most and least helpful thoughts by `worth_of`, none of them twice; those of which neither was
    measured are left out."""
    different = {}
    for thought in thoughts:
        if worth_of(thought) is not None:
            different[thought["document"], thought["position"], thought["thought"]] = thought
    ranked = sorted(different.values(), key=lambda thought: -worth_of(thought))
    num_best = min(THOUGHTS_SHOWN, (len(ranked) + 1) // 2)
    num_worst = min(THOUGHTS_SHOWN, len(ranked) // 2)
    return {"best": ranked[:num_best], "worst": ranked[::-1][:num_worst]}
