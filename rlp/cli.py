"""The console script `rlp`: plan, run, and look at runs.

    rlp train CONFIG    run a config, as `train.py` does
    rlp plan CONFIG     what that run would read, hold and cost; nothing is written
    rlp view RUN        its logged thoughts, in the terminal
    rlp report RUN...   one HTML page about one or several runs
    rlp export STEP     a checkpoint as a Hugging Face folder
    rlp add-markers MODEL   a Hugging Face folder whose tokenizer has the markers of thoughts as
    tokens
    rlp eval CHECKPOINT benchmark accuracy of a Hugging Face folder, with and without thoughts
    rlp match RUN       the config of a control that spends what the run has spent
    rlp splice RUN      documents with a model's own thoughts in them, for the controls
                        mixed_sft and cpt_replay
    rlp mixed-sft RUN   rounds of splicing and training that spend what a run has spent
    rlp pipeline CONFIG stages of arms over seeds: RLP and its controls, SFT, RLVR
    rlp diversity CHECKPOINT...   how alike answers are: of one model, of several, above the floor
    rlp traces RUN_OR_FILE   traces that are right, in one language, short and unique, for SFT
    rlp spectrum rows|score   rows of tasks of known distributions; how near a model comes to these
    rlp select CORPUS   documents whose gradients under a proxy stand where few others do
    rlp audit RUN REFERENCE   what a run did otherwise than another one, step by step
    rlp world FOLDER    a small world, with its base and a config: something to train at once
    rlp probe CHECKPOINT DATA   what thinking gains on held-out documents: is there a reward to
                                learn from?

Exit codes: 0 done, 1 two runs differ (audit) or stages failed (pipeline), 2 something that the
command line names is not there or can not be used, 3 a file that can not be read back, 130 Ctrl-C.
What trains (train, mixed-sft) ends as a run does (`rlp.process.exit_codes`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlp.compare.eval_options import add_eval
from rlp.compare.splice_options import add_splice
from rlp.config import ConfigError, load_config
from rlp.data.errors import DataError
from rlp.post.diversity_options import add_diversity
from rlp.post.pipeline_options import add_pipeline
from rlp.post.pluralism_options import add_pluralism
from rlp.post.selection_options import add_select
from rlp.post.spectrum_options import add_spectrum
from rlp.post.traces_options import add_traces
from rlp.process.console import visible_text
from rlp.process.json_files import DamagedFileError
from rlp.process.run_folder import RunFolder, chosen_checkpoint, open_run_folder

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks

PROGRAMS = {"train": [], "plan": ["--dry-run"]}
"""Commands that are the program of a run (`rlp.train`), with what they add to its arguments. Their
exit codes are those of a run (`rlp.process.exit_codes`)."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in PROGRAMS:
        from rlp.train import main as program

        return program([*argv[1:], *PROGRAMS[argv[0]]], name=f"rlp {argv[0]}")
    parser = _parser()
    arguments, late = parser.parse_known_args(argv)
    if late and ("overrides" not in arguments or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if late:
        arguments.overrides += late  # argparse takes positional words before the first option only
    try:
        return arguments.command(arguments)
    except ConfigError as error:
        print(visible_text(f"rlp: {error}"), file=sys.stderr)
        return 2
    except (DamagedFileError, DataError) as error:
        print(visible_text(f"rlp: {error}"), file=sys.stderr)
        return 3
    except BrokenPipeError:
        raise  # nobody reads what is printed (`rlp.process.command`)
    except OSError as error:
        print(visible_text(f"rlp: {_refusal(error)}"), file=sys.stderr)
        return 2


def _refusal(error: OSError) -> str:
    """What the operating system refused, and for which of the paths that a command was given."""
    paths = " -> ".join(str(path) for path in (error.filename, error.filename2) if path is not None)
    where = f"{paths}: " if paths else ""
    return (
        f"{where}{error.strerror or error}. Write a path that this user can read, and for --out one"
        " on a disk with room that this user can write to."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlp",
        description="RLP, reinforcement as a pretraining objective: run it, look at runs.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in (("train", "run a config"), ("plan", "say what a run would hold and cost")):
        commands.add_parser(name, help=what)  # `main` hands both on
    for add_command in COMMANDS:
        add_command(commands)
    return parser


# Each command: its parser, and what it does. What a command alone needs is imported there, as it
# takes seconds.


def _add_view(commands: argparse._SubParsersAction) -> None:
    view = commands.add_parser("view", help="print the thoughts that a run logged")
    view.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    view.add_argument("--step", type=int, metavar="N", help="only those of step N")
    view.add_argument(
        "--sort",
        choices=("step", "best", "worst"),
        default="step",
        help="as logged (the default), or by reward",
    )
    view.add_argument(
        "--search",
        metavar="TEXT",
        help="only those with TEXT in prefix, thought or target, in any case",
    )
    view.add_argument(
        "--limit", type=int, default=20, metavar="N", help="at most N (20); 0 prints all"
    )
    view.set_defaults(command=_view)


def _view(arguments: argparse.Namespace) -> int:
    from rlp.measure.view import view_thoughts

    view_thoughts(
        open_run_folder(arguments.run),
        step=arguments.step,
        order=arguments.sort,
        search=arguments.search,
        limit=arguments.limit,
    )
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="write an HTML page about one or several runs")
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, that of a pipeline, or the JSON of a selection",
    )
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run folder; needed for several runs",
    )
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace) -> int:
    from rlp.measure.report import report_path, write_report
    from rlp.post.pipeline_report import is_pipeline, write_pipeline_report
    from rlp.post.selection_report import is_selection, write_selection_report

    if len(arguments.runs) == 1 and is_selection(selection := arguments.runs[0]):
        wanted = arguments.out or selection.with_suffix(".html")
        out = report_path([RunFolder(selection)], wanted)
        write_selection_report(selection, out)
        print(out)
        return 0
    if pipelines := [path for path in arguments.runs if is_pipeline(path)]:
        if len(arguments.runs) > 1:
            raise ConfigError(f"{pipelines[0]} is a pipeline: a report on one has no other runs.")
        out = report_path([RunFolder(pipelines[0])], arguments.out)
        write_pipeline_report(pipelines[0], out)
        print(out)
        return 0
    folders = [open_run_folder(path) for path in arguments.runs]
    out = report_path(folders, arguments.out)
    write_report(arguments.runs, out)
    print(out)
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser(
        "export", help="write a checkpoint as a Hugging Face folder, with float32 weights"
    )
    export.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help=(
            "a checkpoint, such as runs/NAME/checkpoints/step_100, or a run folder; without --step"
            " its steps are told"
        ),
    )
    export.add_argument("--step", metavar="N", help="of a run folder: the step, or `newest`")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    export.set_defaults(command=_export)


def _export(arguments: argparse.Namespace) -> int:
    from rlp.learn.checkpoint import CheckpointError, open_checkpoint
    from rlp.learn.export import export_checkpoint

    path = chosen_checkpoint(arguments.checkpoint, arguments.step)
    try:
        export_checkpoint(open_checkpoint(path), arguments.out)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    print(arguments.out if path == arguments.checkpoint else f"{arguments.out}: {path}")
    return 0


def _add_markers(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "add-markers",
        help=(
            "write a model as a Hugging Face folder whose tokenizer has the two markers of a"
            " thought as tokens"
        ),
        epilog=(
            "A run does the same with thought.add_markers=true. The rows of the new tokens begin"
            " as the mean of the tokens that wrote the markers before."
        ),
    )
    command.add_argument("model", metavar="MODEL", help="a Hugging Face folder or Hub name")
    command.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    command.add_argument(
        "--open", default="<think>", metavar="TEXT", help="the open marker (<think>)"
    )
    command.add_argument(
        "--close", default="</think>", metavar="TEXT", help="the close marker (</think>)"
    )
    command.set_defaults(command=_export_with_markers)


def _export_with_markers(arguments: argparse.Namespace) -> int:
    from rlp.config import ThoughtConfig
    from rlp.learn.export import export_with_markers

    notes = export_with_markers(
        arguments.model,
        ThoughtConfig(open_marker=arguments.open, close_marker=arguments.close, add_markers=True),
        arguments.out,
    )
    print("\n".join([*map(visible_text, notes), str(arguments.out)]))
    return 0


def _add_probe(commands: argparse._SubParsersAction) -> None:
    probe = commands.add_parser(
        "probe",
        help="what thinking gains on held-out documents: is there a reward to learn from?",
        epilog=(
            "Settings: section.key=value as in a config, above all evaluation.panel_positions,"
            " evaluation.thoughts_per_position, thought.max_thought_tokens, thought.temperature,"
            " position.selector=marker position.marker=TEXT, target.horizon, data.template. What is"
            " not set is as the checkpoint says, then as --config says."
        ),
    )
    probe.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=(
            "a Hugging Face folder or Hub name, or a checkpoint of a run, such as"
            " runs/NAME/checkpoints/step_100"
        ),
    )
    probe.add_argument(
        "data",
        metavar="DATA",
        help="held-out documents: a .jsonl, .parquet, .csv or .txt file, a glob, or hub:OWNER/NAME",
    )
    probe.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings")
    probe.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML config or a run folder, for settings"
    )
    probe.add_argument(
        "--start",
        metavar="CHECKPOINT",
        help=(
            "the starting checkpoint, to report the gain over it too; known where CHECKPOINT is"
            " that of a run"
        ),
    )
    probe.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="make this folder, with probe.json, rows.parquet (a row each position) and probe.png",
    )
    probe.set_defaults(command=_probe)


def _probe(arguments: argparse.Namespace) -> int:
    from rlp.measure.probe import probe_checkpoint

    probe_checkpoint(
        arguments.checkpoint,
        arguments.data,
        config=arguments.config,
        start=arguments.start,
        out=arguments.out,
        overrides=arguments.overrides,
        console=Console(highlight=False, markup=False, emoji=False, soft_wrap=True),
    )
    return 0


def _add_match(commands: argparse._SubParsersAction) -> None:
    from rlp.compare.arms import ARMS
    from rlp.compare.budget import AMOUNTS

    match = commands.add_parser(
        "match", help="write the config of a control arm that spends what a finished run has spent"
    )
    match.add_argument("run", type=Path, metavar="RUN", help="a finished run")
    match.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings of the arm, such as optim.learning_rate=3e-5",
    )
    match.add_argument(
        "--arm", choices=tuple(ARMS), required=True, help="the objective to compare with"
    )
    match.add_argument(
        "--by",
        choices=tuple(AMOUNTS),
        default="flops",
        help="what the two spend alike, to 1 %% (flops)",
    )
    match.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="for mixed_sft and cpt_replay: what rlp splice made",
    )
    match.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the YAML file to make"
    )
    match.set_defaults(command=_match)


def _match(arguments: argparse.Namespace) -> int:
    from rlp.compare.arms import write_arm

    config = write_arm(
        open_run_folder(arguments.run),
        arguments.arm,
        arguments.by,
        arguments.out,
        arguments.data,
        arguments.overrides,
    )
    spends = getattr(config.budget, arguments.by)
    print(
        f"{arguments.out}: {arguments.arm}, matched with {arguments.run} by {arguments.by}"
        f" ({spends:.6g}). Run it with\n  deepspeed train.py {arguments.out}"
    )
    return 0


def _add_mixed_sft(commands: argparse._SubParsersAction) -> None:
    from rlp.compare.budget import AMOUNTS

    command = commands.add_parser(
        "mixed-sft",
        help=(
            "rounds of mixed SFT that spend what a finished run has spent: splice with the model of"
            " the round before, train on it, again"
        ),
    )
    command.add_argument("run", type=Path, metavar="RUN", help="a finished RLP run")
    command.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings of all rounds"
    )
    command.add_argument("--rounds", type=int, default=3, metavar="N", help="how many (3)")
    command.add_argument(
        "--documents", type=int, required=True, metavar="N", help="that each round thinks about"
    )
    command.add_argument(
        "--learning-rate", type=float, required=True, metavar="X", help="of all rounds"
    )
    command.add_argument(
        "--loss",
        choices=("all", "thought_and_target"),
        default="thought_and_target",
        help="tokens that the LM loss is taken on (thought_and_target)",
    )
    command.add_argument(
        "--by", choices=tuple(AMOUNTS), default="flops", help="what the two spend alike (flops)"
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of the rounds; one that was begun with the same options is continued",
    )
    command.set_defaults(command=_mixed_sft)


def _mixed_sft(arguments: argparse.Namespace) -> int:
    """Exit codes are those of a run (`rlp.process.exit_codes`)."""
    from rlp.compare.mixed_sft import MixedSft, iterate
    from rlp.process.ranks import stop_ranks
    from rlp.train import run_program
    from rlp.trainer import Trainer

    asked = MixedSft(
        run=str(open_run_folder(arguments.run).path),
        rounds=arguments.rounds,
        documents=arguments.documents,
        learning_rate=arguments.learning_rate,
        loss=arguments.loss,
        by=arguments.by,
        overrides=tuple(arguments.overrides),
    )

    def work(start: Callable[[float], "Ranks"]) -> int:
        ranks = start(load_config(arguments.run / "config.yaml").run.watchdog_s)
        code, run = iterate(
            asked, arguments.out, ranks, lambda config: Trainer(config, ranks=ranks).fit().code
        )
        stop_ranks()
        if ranks.is_first and code == 0:
            print(
                f"{run.export}: the model of {asked.rounds} rounds; their cost: {run.ledger_json}"
            )
        return code

    return run_program(work)


def _add_audit(commands: argparse._SubParsersAction) -> None:
    audit = commands.add_parser(
        "audit",
        help="compare the journals of two runs: documents, thoughts and numbers of each step",
    )
    audit.add_argument(
        "run", type=Path, metavar="RUN", help="a run folder, such as one that was interrupted"
    )
    audit.add_argument(
        "reference", type=Path, metavar="REFERENCE", help="the run that it should equal"
    )
    audit.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help=(
            "of numbers, relative and absolute (0: bit for bit); above 0 checksums of weights are"
            " not compared"
        ),
    )
    audit.set_defaults(command=_audit)


def _audit(arguments: argparse.Namespace) -> int:
    """Exit code 1 where the two differ."""
    from rlp.measure.journal import audit

    differences = audit(arguments.run, arguments.reference, tolerance=arguments.tolerance)
    if not differences:
        print(f"{arguments.run} did what {arguments.reference} did")
        return 0
    print("\n".join(differences))
    return 1


def _add_world(commands: argparse._SubParsersAction) -> None:
    world = commands.add_parser(
        "world",
        help="write a small world: documents, a tiny base model, and the config that trains it",
    )
    world.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the folder to make; it may be there, empty"
    )
    world.add_argument(
        "--kind",
        default="rare",
        help="rare: of the base's thoughts few are of use, and none at a low temperature;"
        " headings: all are, but for slips, which a low temperature leaves out",
    )
    world.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of questions, documents and panel; 0, which the committed base is for, by default",
    )
    world.set_defaults(command=_world)


def _world(arguments: argparse.Namespace) -> int:
    from rlp.world.folder import WORLDS, write_world

    folder, kind = arguments.folder, arguments.kind
    with_base = write_world(folder, kind=kind, seed=arguments.seed)
    train = f"  rlp train {folder}/{WORLDS[kind].config}"
    if with_base:
        print(f"{folder}: train on it with\n{train}")
        return 0
    print(
        f"{folder}: no base comes with seed {arguments.seed}. Make it, and train on it, with\n"
        f"  rlp train {folder}/base.yaml run.dir={folder}/base_run\n"
        f"{train} model.path={folder}/base_run/export"
    )
    return 0


COMMANDS = (
    _add_view,
    _add_report,
    _add_export,
    _add_markers,
    add_eval,
    _add_probe,
    _add_match,
    add_splice,
    _add_mixed_sft,
    add_pipeline,
    add_diversity,
    add_pluralism,
    add_traces,
    add_spectrum,
    add_select,
    _add_audit,
    _add_world,
)
"""In the order of `rlp --help`. A command is a function that adds its parser, which names what it
does, and an entry here."""
