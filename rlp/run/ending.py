"""The end of a run: the exported model, ledger, summary and report, and where everything is."""

from dataclasses import dataclass

from rlp.config import Config, ConfigError
from rlp.learn.export import export_model, model_card
from rlp.measure.report import write_report
from rlp.measure.verdict import verdict
from rlp.process.console import format_duration
from rlp.process.exit_codes import DONE, NOT_MATCHED
from rlp.process.faults import fault
from rlp.process.files import remove
from rlp.process.json_files import DamagedFileError, read_json, write_json
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import settle_logs
from rlp.run.held_out import HEADLINE, Evaluation
from rlp.run.state import OpenRun


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    code: int
    """As a process ends with it: 0 where all is well (`rlp.process.exit_codes`)."""
    folder: RunFolder
    """Where everything is."""
    summary: dict | None = None
    """What summary.json holds; None where the run was stopped before its end."""


def finish(run: OpenRun, before: Evaluation | None, after: Evaluation | None) -> Ending:
    """Export the model, write ledger, summary and report, and tell where everything is.

    Args:
        before, after: evaluations of the held-out panel before the first step and after the last.
    """
    match, ledger, state = run.opened.match, run.parts.ledger, run.state
    spent = ledger.to_json()
    run.wall.enter("export and report")
    run.host.watchdog.mark("export")
    export(run, before, after)
    summary = {
        "before": before and before.values,
        "after": after and after.values,
        "before_cold": before and before.cold,
        "after_cold": after and after.cold,
        "steps": state.step,
        "seconds": state.seconds,
        "wall_s": run.wall.so_far(),
        "flops": ledger.flops,
        "counted_without": list(run.opened.setup.shapes.uncounted),
        "bad_documents": run.opened.setup.stream.bad,
        "verdict": verdict([before.values if before else {}], [after.values if after else {}]),
        "match": match and {"by": match.by, "ratio": match.ratio(spent)},
    }
    run.host.on_first_rank(
        run.folder, lambda: write_end(run, summary), "the end of the run could not be written"
    )
    run.log.say(closing_words(run, before, after, summary["verdict"]))
    if match:
        run.log.say(match.table(spent))
    run.log.close()
    holds = match is None or match.holds(spent)
    return Ending(DONE if holds else NOT_MATCHED, run.folder, summary)


def export(run: OpenRun, before: Evaluation | None, after: Evaluation | None) -> None:
    """The model as a Hugging Face folder. A collective."""
    engine, folder = run.parts.engine, run.folder
    card = model_card(
        run.config,
        before and before.values,
        after and after.values,
        run.state.step,
        engine.policy.stock_time_step_limit,
    )
    if run.ranks.is_first:
        for left in (folder.export, *folder.path.glob(".tmp.export.*")):
            # By an end that was interrupted: a complete run does not come here.
            remove(left)
    with run.host.watchdog.working("export"):
        export_model(
            folder.export,
            engine,
            run.opened.setup.tokenizer,
            run.ranks,
            run.config,
            run.opened.setup.thought_format,
            card,
        )


def write_end(run: OpenRun, summary: dict) -> None:
    """Rank 0's: ledger, summary and report, in this order: a run with a summary is complete."""
    settle_logs(run.folder)
    fault("summary")
    write_json(run.folder.ledger_json, run.parts.ledger.to_json(), point="end.torn_ledger")
    write_json(run.folder.summary_json, summary, point="end.torn_summary")
    write_page(run)


def already_complete(run: OpenRun) -> Ending:
    """The ending of a run that is started again after its end: its report is made if it has none.
    A collective."""
    if run.ranks.is_first and not run.folder.report_html.exists():
        write_page(run)
    run.log.say(
        f"{run.folder.path} is complete: nothing to do. To go on from it, write run.dir=OTHER"
        f" run.resume={run.folder.checkpoints}/step_{run.state.step} and a larger budget."
    )
    return Ending(DONE, run.folder, read_json(run.folder.summary_json))


def write_page(run: OpenRun) -> None:
    """Rank 0's: the page, which is made from the other files; a run does not fail for it."""
    try:
        write_report([run.folder.path], run.folder.report_html)
    except (OSError, DamagedFileError, ConfigError) as error:
        run.log.say(
            f"the report could not be written: {error}. Write it with: rlp report {run.folder.path}"
        )


def closing_words(
    run: OpenRun, before: Evaluation | None, after: Evaluation | None, judged: list[str]
) -> str:
    """What the run took, what it gained, and where everything is."""
    took = format_duration(run.state.seconds)
    lines = [
        "",
        f"{run.state.step} steps in {took}, {run.parts.ledger.flops:.3g} FLOPs",
        f"this process took {run.wall.told()}",
    ]
    if before and after:
        lines += panel_table(before, after, run.config)
    lines += judged
    places = {
        "run folder": run.folder.path,
        "report": run.folder.report_html,
        "model": run.folder.export,
    }
    return "\n".join(lines + [f"{what:<12}{path}" for what, path in places.items()])


def panel_table(before: Evaluation, after: Evaluation, config: Config) -> list[str]:
    """The numbers that a run is told by, before and after, and those of cold thoughts at their
    side."""
    columns, head = [(before.values, after.values)], ""
    if before.cold and after.cold:
        temperatures = (config.thought.temperature, config.evaluation.cold_temperature)
        columns.append((before.cold, after.cold))
        head = " " * 36 + "".join(f"{f'thoughts at T {t:g}':>18}" for t in temperatures)
    positions = after.values["panel_positions"]
    title = f"held-out panel of {positions:.0f} positions"
    lines = [head] if head else []
    lines.append(f"{title:<36}" + f"{'before':>9} {'after':>8}" * len(columns))
    for name, words in HEADLINE.items():
        cells = "".join(f"{first[name]:>9.3f} {last[name]:>8.3f}" for first, last in columns)
        lines.append(f"  {words:<34}{cells}")
    return lines
