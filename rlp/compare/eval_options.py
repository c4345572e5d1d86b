"""The command line of `rlp eval`, which has more options than the others together."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError

if TYPE_CHECKING:
    from rlp.compare.tasks import Benchmark


def add_eval(commands: argparse._SubParsersAction) -> None:
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
    _add_questions(command)
    _add_decoding(command)
    _add_machine_and_files(command)
    command.set_defaults(command=_evaluate, modes=("think", "no_think"))


def _add_questions(command: argparse.ArgumentParser) -> None:
    """What is asked."""
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


def _add_decoding(command: argparse.ArgumentParser) -> None:
    """How it is answered."""
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


def _add_machine_and_files(command: argparse.ArgumentParser) -> None:
    """Where it runs, and what is written."""
    command.add_argument("--seed", type=int, default=0, help="of all noise (0)")
    command.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help=(
            "sequences decoded side by side (32); changes memory, speed, and in float32 no answer"
        ),
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


def _evaluate(arguments: argparse.Namespace) -> int:
    from rlp.compare.evaluate import evaluate_checkpoint, refuse_output

    for name, least in (("batch_size", 1), ("seed", 0), ("limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")
    refuse_output("--json", arguments.json)
    refuse_output("--rows", arguments.rows)

    evaluate_checkpoint(
        arguments.checkpoint,
        _benchmarks(arguments),
        modes=arguments.modes,
        limit=arguments.limit,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
        results_file=arguments.json,
        rows_file=arguments.rows,
    )
    return 0


def _benchmarks(arguments: argparse.Namespace) -> dict[str, "Benchmark"]:
    """What the command line asks for; a flag given there counts for every benchmark."""
    from rlp.compare.evaluate import benchmarks_by_name
    from rlp.compare.tasks import load_benchmarks

    if arguments.config is not None:
        benchmarks = load_benchmarks(arguments.config)
    else:
        benchmarks = benchmarks_by_name(
            arguments.tasks,
            question_field=arguments.question_field,
            answer_field=arguments.answer_field,
            examples=arguments.examples,
        )
    given = {
        "shots": arguments.shots,
        "samples": arguments.samples,
        "thought_tokens": arguments.thought_budget,
        "thought_temperature": arguments.thought_temperature,
        "answer_tokens": arguments.answer_tokens,
        "answer_temperature": arguments.answer_temperature,
    }
    given = {key: value for key, value in given.items() if value is not None}
    return {name: replace(benchmark, **given) for name, benchmark in benchmarks.items()}
