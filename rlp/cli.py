"""The console script `rlp`: look at runs that exist. Runs are started by `train.py`.

    rlp view RUN        its logged thoughts, in the terminal
    rlp report RUN...   one HTML page about one or several runs
    rlp export STEP     a checkpoint as a Hugging Face folder
    rlp add-markers MODEL   a Hugging Face folder whose tokenizer has the markers of thoughts as
    tokens
    rlp eval CHECKPOINT benchmark accuracy of a Hugging Face folder, with and without thoughts
    rlp match RUN       the config of a control that spends what the run has spent
    rlp splice RUN      documents with the start's own best thoughts in them, for the control
                        mixed_sft
    rlp audit RUN REFERENCE   what a run did otherwise than another one, step by step
    rlp world FOLDER    the heading world, with its base and a config: something to train at once
    rlp probe CHECKPOINT DATA   what thinking gains on held-out documents: is there a reward to
                                learn from?

Exit codes: 0 done, 1 two runs differ (audit), 2 something that the command line names is not there
or can not be used, 3 a file that can not be read back, 130 Ctrl-C.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlp.config import ConfigError
from rlp.data.sources import DataError
from rlp.measure.report import is_report, write_report
from rlp.measure.report_runs import information_gain_of, worth_of
from rlp.process.console import quoted_text, visible_text
from rlp.process.files import append, write_new
from rlp.process.json_files import DamagedFileError
from rlp.process.run_folder import RunFolder, open_run_folder, saved_steps
from rlp.process.run_logs import read_json_lines

if TYPE_CHECKING:
    from rlp.compare.benchmarks import Result
    from rlp.compare.tasks import Benchmark


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
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
        prog="rlp", description="Look at runs of RLP, reinforcement as a pretraining objective."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_view(commands)
    _add_report(commands)
    _add_export(commands)
    _add_markers(commands)
    _add_eval(commands)
    _add_probe(commands)
    _add_match(commands)
    _add_splice(commands)
    _add_audit(commands)
    _add_world(commands)
    return parser


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
    view.set_defaults(command=view_thoughts)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="write an HTML page about one or several runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run folder; needed for several runs",
    )
    report.set_defaults(command=report_runs)


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
    export.set_defaults(command=export_step)


def _add_markers(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "add-markers",
        help=(
            "write a model as a Hugging Face folder "
            "whose tokenizer has the two markers of a thought as tokens"
        ),
        epilog=(
            "A run does the same with thought.add_markers=true. The "
            "rows of the new tokens begin as the mean of the tokens that "
            "wrote the markers before."
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
    command.set_defaults(command=add_markers)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval", help="benchmark accuracy with and without thoughts, through lm-evaluation-harness"
    )
    command.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=(
            "a Hugging Face folder, such as runs/NAME/export, a run folder (its export is meant),"
            " or a Hub name"
        ),
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tasks",
        metavar="NAME[,NAME]",
        help="tasks of lm_eval, or files of questions that end in .jsonl",
    )
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a YAML file of benchmarks, such as configs/benchmarks_paper.yaml",
    )
    command.add_argument(
        "--question-field", default="question", metavar="FIELD", help="of a .jsonl file (question)"
    )
    command.add_argument(
        "--answer-field",
        default="answer",
        metavar="FIELD",
        help="of a .jsonl file (answer); what follows its last #### is compared",
    )
    command.add_argument(
        "--examples",
        metavar="FILE",
        help="few-shot examples for a .jsonl file, another file of the same fields",
    )
    command.add_argument(
        "--shots", type=int, metavar="N", help="few-shot examples in each prompt (as the task says)"
    )
    command.add_argument("--limit", type=int, metavar="N", help="at most N questions of each task")
    command.add_argument(
        "--samples",
        type=int,
        metavar="K",
        help="answers to each question; accuracy is pass@1, their mean (1)",
    )
    mode = command.add_mutually_exclusive_group()
    mode.add_argument(
        "--think", action="store_const", const=("think",), dest="modes", help="with thoughts only"
    )
    mode.add_argument(
        "--no-think",
        action="store_const",
        const=("no_think",),
        dest="modes",
        help="without thoughts only; default: both",
    )
    command.add_argument(
        "--thought-budget", type=int, metavar="L", help="tokens of a thought at most (as trained)"
    )
    command.add_argument(
        "--thought-temperature", type=float, metavar="T", help="0 is greedy (as trained)"
    )
    command.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="tokens of an answer at most (as the task says)",
    )
    command.add_argument(
        "--answer-temperature", type=float, metavar="T", help="0, the default, is greedy"
    )
    command.add_argument("--seed", type=int, default=0, help="of all noise (0)")
    command.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="sequences decoded side by side (32); changes memory and speed, never an answer",
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 on a GPU and on a CPU with instructions for it, else float32",
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="write results and settings; a file that exists is never written over",
    )
    command.add_argument(
        "--rows",
        type=Path,
        metavar="OUT",
        help="write every thought and answer, one JSON object a line",
    )
    command.set_defaults(command=evaluate_checkpoint, modes=("think", "no_think"))


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
    probe.set_defaults(command=probe_one)


def _add_match(commands: argparse._SubParsersAction) -> None:
    from rlp.compare.match import AMOUNTS, ARMS

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
        "--data", type=Path, metavar="FOLDER", help="for mixed_sft: what rlp splice made"
    )
    match.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the YAML file to make"
    )
    match.set_defaults(command=match_run)


def _add_splice(commands: argparse._SubParsersAction) -> None:
    splice = commands.add_parser(
        "splice",
        help=(
            "put the starting checkpoint's best of G thoughts into the training documents of a run"
        ),
    )
    splice.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a YAML config")
    splice.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings")
    splice.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=(
            "documents to read; default: as many as the run is to read (budget.steps x"
            " optim.batch_size)"
        ),
    )
    splice.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    splice.set_defaults(command=splice_documents)


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
    audit.set_defaults(command=audit_runs)


def _add_world(commands: argparse._SubParsersAction) -> None:
    world = commands.add_parser(
        "world",
        help="write the heading world: documents, a tiny base model, and the config that trains it",
    )
    world.add_argument(
        "folder", type=Path, metavar="FOLDER", help="the folder to make; it may be there, empty"
    )
    world.set_defaults(command=write_heading_world)


def write_heading_world(arguments: argparse.Namespace) -> int:
    """`rlp world`."""
    from rlp.world.folder import write_world

    write_world(arguments.folder)
    print(f"{arguments.folder}: train on it with\n  rlp train {arguments.folder}/quickstart.yaml")
    return 0


def audit_runs(arguments: argparse.Namespace) -> int:
    """`rlp audit`. Exit code 1 where the two differ."""
    from rlp.measure.journal import audit

    for folder in (open_run_folder(arguments.run), open_run_folder(arguments.reference)):
        if not folder.journal_jsonl.exists():
            raise ConfigError(
                f"{folder.path} has no journal.jsonl: it was run with logging.journal=false, or has"
                " made no step."
            )
    differences = audit(arguments.run, arguments.reference, tolerance=arguments.tolerance)
    print(
        "\n".join(differences)
        if differences
        else f"{arguments.run} did what {arguments.reference} did"
    )
    return 1 if differences else 0


def match_run(arguments: argparse.Namespace) -> int:
    """`rlp match`."""
    from rlp.compare.match import write_match

    config = write_match(
        open_run_folder(arguments.run),
        arguments.arm,
        arguments.by,
        arguments.out,
        arguments.data,
        arguments.overrides,
    )
    print(
        f"{arguments.out}: {arguments.arm}, matched with {arguments.run} by {arguments.by}"
        f" ({getattr(config.budget, arguments.by):.6g}). Run it with\n  deepspeed train.py"
        f" {arguments.out}"
    )
    return 0


def splice_documents(arguments: argparse.Namespace) -> int:
    """`rlp splice`."""
    from rlp.compare.splice import splice
    from rlp.config import load_config
    from rlp.process.ranks import start_ranks, stop_ranks

    path = open_run_folder(arguments.run).config_yaml if arguments.run.is_dir() else arguments.run
    config = load_config(path, arguments.overrides)
    documents = arguments.documents or (config.budget.steps or 0) * config.optim.batch_size
    if documents < 1:
        raise ConfigError(
            f"{path} has no budget.steps, so how many documents it reads is not known. Write"
            " --documents N."
        )
    try:
        told = splice(config, documents, arguments.out, start_ranks())
    finally:
        stop_ranks()
    print(
        f"{arguments.out}: {told['documents']} documents, {told['with_thought_frac']:.1%} with a"
        f" thought; reward of the best of {told['group_size']} {told['best_reward_mean_nats']:+.3f}"
        f" nats, of all {told['reward_mean_nats']:+.3f}"
    )
    return 0


def probe_one(arguments: argparse.Namespace) -> int:
    """`rlp probe`."""
    from rlp.measure.probe import (
        probe_checkpoint,  # it loads transformers, which the other commands do without
    )

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


def evaluate_checkpoint(arguments: argparse.Namespace) -> int:
    """`rlp eval`."""
    import torch  # it and transformers take seconds, which the other commands do without

    from rlp.compare.benchmarks import open_evaluator, run_benchmarks, thought_gain
    from rlp.compare.tasks import load_tasks, versions

    for name, least in (("batch_size", 1), ("seed", 0), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    for name in ("json", "rows"):
        _refuse_output(f"--{name}", getattr(arguments, name))
    benchmarks, checkpoint = _benchmarks(arguments), _evaluated(arguments.checkpoint)
    if arguments.device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {arguments.device}: torch sees no GPU here. Write --device cpu."
        )
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu")
        if arguments.device == "auto"
        else arguments.device
    )
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 110)  # a folded table can not be read
    results, rows = [], {}
    tasks = load_tasks(benchmarks)
    evaluator = open_evaluator(checkpoint, device=device, dtype=arguments.dtype)
    for note in evaluator.marker_notes():
        console.print(visible_text(note))
    for result, said in run_benchmarks(
        benchmarks,
        tasks,
        evaluator,
        modes=arguments.modes,
        limit=arguments.limit,
        seed=arguments.seed,
        rows=arguments.batch_size,
    ):
        results.append(result)
        rows[result.benchmark, result.mode] = said
        console.print(
            f"{result.benchmark} {result.mode}: {result.questions} questions, {result.metric},"
            f" {result.seconds:.0f} s",
            style="dim",
        )
        if arguments.rows:
            lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in said)
            append(arguments.rows, lines.encode(), point="eval.torn_rows")
    gains = (
        {name: thought_gain(rows[name, "think"], rows[name, "no_think"]) for name in benchmarks}
        if len(arguments.modes) == 2
        else {}
    )
    console.print(_result_table(results, gains))
    if arguments.json:
        content = {
            "checkpoint": checkpoint,
            "seed": arguments.seed,
            "limit": arguments.limit,
            "versions": versions(),
            "benchmarks": {
                name: dataclasses.asdict(benchmark) for name, benchmark in benchmarks.items()
            },
            "results": [dataclasses.asdict(result) for result in results],
            "thought_gain": {
                name: {"accuracy": mean, "standard_error": error}
                for name, (mean, error) in gains.items()
            },
        }
        write_new(
            arguments.json, (json.dumps(content, indent=2) + "\n").encode(), point="eval.torn_json"
        )
    return 0


def _evaluated(name: str) -> str:
    """The model folder or Hub name that is to be evaluated; of a run folder its export. Looked at
    before anything is asked or loaded."""
    path = Path(name)
    if (path / "meta.json").is_file():
        raise ConfigError(
            f"{path} is a checkpoint of a run, which becomes a model by: rlp export {path} --out"
            " FOLDER"
        )
    if not (path / "config.yaml").is_file() or (path / "config.json").is_file():
        if not path.exists() and (
            path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        ):
            raise ConfigError(
                f"no folder at {name}. Write a folder that holds a Hugging Face model, such as"
                " runs/NAME/export, or a Hub name."
            )
        return name
    export = open_run_folder(path).export
    if not export.is_dir():
        raise ConfigError(
            f"{path} is a run folder that has no export: its run has not ended. Make a model of a"
            f" checkpoint first: rlp export {path} --step newest --out FOLDER"
        )
    print(f"{path} is a run folder; what is evaluated is its export, {export}")
    return str(export)


def _benchmarks(arguments: argparse.Namespace) -> dict[str, "Benchmark"]:
    """What the command line asks for; a flag given there counts for every benchmark."""
    from rlp.compare.tasks import Benchmark, load_benchmarks

    if arguments.config is not None:
        benchmarks = load_benchmarks(arguments.config)
    else:
        names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
        if not names:
            raise ConfigError(
                "--tasks names no task. Write --tasks gsm8k, or the path of a .jsonl file."
            )
        prompt, reference = (
            f"Question: {{{{{arguments.question_field}}}}}\nAnswer:",
            f"{{{{{arguments.answer_field}}}}}",
        )
        if len({Path(name).stem for name in names}) < len(names):
            raise ConfigError(
                f"--tasks {arguments.tasks}: two of them have one name. Write a YAML file of"
                " benchmarks, where each has its own, and --config."
            )
        benchmarks = {
            Path(name).stem if name.endswith(".jsonl") else name: (
                Benchmark(
                    data=name, prompt=prompt, reference=reference, examples=arguments.examples
                )
                if name.endswith(".jsonl")
                else Benchmark(task=name)
            )
            for name in names
        }
    given = {
        "shots": arguments.shots,
        "samples": arguments.samples,
        "thought_tokens": arguments.thought_budget,
        "thought_temperature": arguments.thought_temperature,
        "answer_tokens": arguments.answer_tokens,
        "answer_temperature": arguments.answer_temperature,
    }
    return {
        name: dataclasses.replace(
            benchmark, **{key: value for key, value in given.items() if value is not None}
        )
        for name, benchmark in benchmarks.items()
    }


def _refuse_output(flag: str, path: Path | None) -> None:
    """Before any work: a file that can not be written at the end, or that would be written over."""
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{flag}: {path} exists and is never written over. Write another path.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{flag} {path}: there is no folder {path.parent}. Make it, or write another path."
        )


def _result_table(results: list["Result"], gains: dict[str, tuple[float, float | None]]) -> Table:
    """pass@1 and its standard error in percent; tokens of a thought and of an answer, and the
    percentage that the budget ended; answers that the check could not read (percent), did not
    finish in time, or died of."""

    def percent(mean: float, error: float | None) -> str:
        return f"{100 * mean:.2f}" + ("" if error is None else f" +- {100 * error:.2f}")

    table = Table(
        "benchmark",
        "mode",
        "asked",
        "pass@1 %",
        "thought",
        "cut %",
        "answer",
        "cut %",
        "unread %",
        "late",
        "died",
        box=None,
        pad_edge=False,
    )
    for result in results:
        table.add_row(
            result.benchmark,
            result.mode,
            f"{result.questions} x {result.samples}",
            percent(result.accuracy, result.standard_error),
            f"{result.thought_tokens_mean:.1f}",
            f"{100 * result.thought_truncated_frac:.0f}",
            f"{result.answer_tokens_mean:.1f}",
            f"{100 * result.answer_truncated_frac:.0f}",
            f"{100 * result.unparseable_frac:.0f}",
            str(result.check_timeouts),
            str(result.check_crashes),
        )
    for name, (mean, error) in gains.items():
        table.add_row(name, "difference", "", percent(mean, error))
    return table


def export_step(arguments: argparse.Namespace) -> int:
    """`rlp export`."""
    # they load transformers, which the other commands do without
    from rlp.learn.checkpoint import (
        CheckpointError,
        open_checkpoint,
    )
    from rlp.learn.export import export_checkpoint

    path = _chosen_checkpoint(arguments.checkpoint, arguments.step)
    try:
        export_checkpoint(open_checkpoint(path), arguments.out)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    print(arguments.out if path == arguments.checkpoint else f"{arguments.out}: {path}")
    return 0


def _chosen_checkpoint(path: Path, step: str | None) -> Path:
    """The checkpoint that a command line means: the path itself, or a step of a run folder."""
    parent = path / "checkpoints" if (path / "config.yaml").is_file() else path
    steps = saved_steps(parent)
    if not steps and parent == path:
        if step is not None:
            raise ConfigError(
                f"--step goes with a run folder, and {path} is none. Leave it out, or write the"
                " run.dir of a run."
            )
        return path
    if not steps:
        raise ConfigError(
            f"{path} is a run folder without a checkpoint: the run has saved none yet."
        )
    chosen = {"newest": list(steps.values())[-1]} | {
        str(number): folder for number, folder in steps.items()
    }
    if step not in chosen:
        asked = "is a run folder" if step is None else f"has no checkpoint of step {step}"
        raise ConfigError(
            f"{path} {asked}. It holds those of {', '.join(f'step {number}' for number in steps)}."
            f" Write --step {list(steps)[-1]}, or --step newest."
        )
    return chosen[step]


def add_markers(arguments: argparse.Namespace) -> int:
    """`rlp add-markers`."""
    from rlp.config import ThoughtConfig
    from rlp.learn.export import (
        export_with_markers,  # it loads transformers; other commands do without
    )

    notes = export_with_markers(
        arguments.model,
        ThoughtConfig(open_marker=arguments.open, close_marker=arguments.close, add_markers=True),
        arguments.out,
    )
    print("\n".join([*map(visible_text, notes), str(arguments.out)]))
    return 0


def view_thoughts(arguments: argparse.Namespace) -> int:
    """`rlp view`."""
    folder = open_run_folder(arguments.run)
    thoughts = _logged_thoughts(folder)
    if arguments.step is not None:
        thoughts = _of_step(thoughts, arguments.step, folder)
    if arguments.search is not None:
        thoughts = [thought for thought in thoughts if _mentions(thought, arguments.search)]
    thoughts = _sorted(thoughts, arguments.sort)
    console = Console(highlight=False, markup=False, emoji=False)
    shown = thoughts[: arguments.limit] if arguments.limit > 0 else thoughts
    for thought in shown:
        console.print(_as_text(thought))
        console.print()
    console.print(Text(f"{len(shown)} of {len(thoughts)} thoughts", style="dim"))
    return 0


def _logged_thoughts(folder: RunFolder) -> list[dict]:
    if not folder.thoughts_jsonl.exists():
        raise ConfigError(
            f"{folder.path} has no thoughts.jsonl: the run has logged no thoughts. They come every"
            " logging.every_n_steps steps, unless logging.thoughts is 0 or no term of the loss"
            " thinks."
        )
    return read_json_lines(folder.thoughts_jsonl)


def _of_step(thoughts: list[dict], step: int, folder: RunFolder) -> list[dict]:
    chosen = [thought for thought in thoughts if thought["step"] == step]
    if not chosen:
        steps = sorted({thought["step"] for thought in thoughts})
        nearest = sorted(sorted(steps, key=lambda logged: abs(logged - step))[:5])
        raise ConfigError(
            f"{folder.path} logged no thoughts at step {step}. Write --step with a logged one, such"
            f" as {', '.join(map(str, nearest)) or 'none yet'}."
        )
    return chosen


def _mentions(thought: dict, text: str) -> bool:
    return any(
        text.casefold() in thought[part].casefold() for part in ("prefix_tail", "thought", "target")
    )


def _sorted(thoughts: list[dict], order: str) -> list[dict]:
    """By `worth_of`, stable; thoughts of which nothing was measured come last."""
    if order == "step":
        return sorted(thoughts, key=lambda thought: thought["step"])
    sign = -1 if order == "best" else 1
    unmeasured = float("inf")
    return sorted(
        thoughts,
        key=lambda thought: unmeasured if worth_of(thought) is None else sign * worth_of(thought),
    )


def _as_text(thought: dict) -> Group:
    """One thought for the terminal. Text objects, so that markup that a model wrote stays text;
    each in a column of its own, so that its line ends stay there."""
    parts = Table.grid(padding=(0, 2, 0, 0))
    parts.add_column(no_wrap=True, style="cyan")
    parts.add_column(overflow="fold")
    parts.add_row("  context", Text(visible_text(thought["prefix_tail"]), "dim"))
    parts.add_row(
        "  thought",
        (
            Text(visible_text(thought["thought"]))
            if thought["thought"].strip()
            else Text(quoted_text(thought["thought"]))
        ),
    )
    parts.add_row("  next", Text(quoted_text(thought["target"]), "bold"))
    return Group(_numbers(thought), parts)


def _numbers(thought: dict) -> Text:
    """Where a thought stands, what it was rewarded for, and how probable the target was with it and
    without. What was not logged is left out."""
    reward, gain = thought.get("reward"), information_gain_of(thought)
    color = "" if reward is None else "green" if reward > 0 else "red"
    advantage = thought.get("advantage")
    unmeasured = (
        "reward not measured"
        if advantage is None
        else f"reward not measured, advantage {advantage:+.4f}"
    )
    told = (
        unmeasured
        if reward is None
        else f"reward {reward:+.4f}"
        if gain != reward
        else f"reward {reward:+.4f} nats"
    )
    told += "" if gain is None or gain == reward else f", information gain {gain:+.4f} nats"
    logprobs = [
        f"{thought[key]:.3f} {words}"
        for key, words in (
            ("reasoned_logprob", "with the thought"),
            ("baseline_logprob", "without"),
        )
        if thought.get(key) is not None
    ]
    truncated = ", truncated" if thought["truncated"] else ""
    return Text.assemble(
        (told, f"bold {color}".strip()),
        (
            (
                f"  step {thought['step']}, document {thought['document']}, position"
                f" {thought['position']}, {thought['thought_tokens']} tokens{truncated}"
            ),
            "bold",
        ),
        f"\nlog p(next) {', '.join(logprobs)}" if logprobs else "",
    )


def report_runs(arguments: argparse.Namespace) -> int:
    """`rlp report`."""
    folders = [open_run_folder(path) for path in arguments.runs]
    if arguments.out is None and len(folders) > 1:
        raise ConfigError(
            f"a report on {len(folders)} runs belongs to none of their folders. Write --out FILE."
        )
    out = arguments.out or folders[0].report_html
    _refuse_to_overwrite(out, folders)
    write_report(arguments.runs, out)
    print(out)
    return 0


def _refuse_to_overwrite(out: Path, folders: list[RunFolder]) -> None:
    """A report replaces reports; anything else that has its name stays."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.parent}. Make it, or write another path."
        )
    if out.is_dir():
        raise ConfigError(
            f"--out {out} is a folder. Write the path of a file, such as {out / 'report.html'}."
        )
    own = {folder.report_html.resolve() for folder in folders}
    if out.exists() and out.resolve() not in own and not is_report(out):
        raise ConfigError(
            f"--out {out} exists and is no report, so it is not written over. Write another path."
        )
