"""The command line of `rlp traces`."""

import argparse
from pathlib import Path

from rlp.config import ConfigError


def add_traces(commands: argparse._SubParsersAction) -> None:
    """Its parser."""
    traces = commands.add_parser(
        "traces",
        help="keep what is right, in one language, short enough and unique, for fine-tuning",
        epilog=(
            "FOLDER gets kept.jsonl, which TRL reads as it is, and dropped.jsonl with the reasons"
            " of each; with --pairs also pairs.jsonl. A line of a file of rollouts has prompt and"
            " text, and right, or answer and expected."
        ),
    )
    traces.add_argument(
        "source", type=Path, metavar="RUN_OR_FILE", help="a run folder, or a file of rollouts"
    )
    traces.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )
    _add_language(traces)
    _add_others(traces)
    traces.set_defaults(command=_traces)


def _add_language(traces: argparse.ArgumentParser) -> None:
    """In which language a thought is to be."""
    traces.add_argument(
        "--script", metavar="NAME", help="such as latin; by default each thought's own"
    )
    traces.add_argument(
        "--least-share",
        type=float,
        default=0.95,
        metavar="X",
        help="of that script, in the letters of the thought (0.95)",
    )
    traces.add_argument(
        "--most-switches",
        type=int,
        default=2,
        metavar="N",
        help="between scripts: 2 let one foreign word stand (2)",
    )
    traces.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="words that are of the language, one a line"
    )
    traces.add_argument(
        "--most-outside",
        type=float,
        default=0.1,
        metavar="X",
        help="share of words that it may lack (0.1)",
    )
    traces.add_argument(
        "--classifier",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a text -> the name of its language; scripts do not tell languages apart",
    )
    traces.add_argument("--language", metavar="NAME", help="what the classifier has to say")


def _add_others(traces: argparse.ArgumentParser) -> None:
    traces.add_argument(
        "--most-characters", type=int, metavar="N", help="of a thought (any number)"
    )
    traces.add_argument(
        "--wrong-too", action="store_true", help="keep wrong ones as well, by language alone"
    )
    traces.add_argument(
        "--pairs",
        action="store_true",
        help="pairs.jsonl too: kept traces with wrong ones of the same prompt",
    )
    traces.add_argument(
        "--open", default="<think>", metavar="TEXT", help="the open marker in a file (<think>)"
    )
    traces.add_argument(
        "--close", default="</think>", metavar="TEXT", help="the close marker in a file (</think>)"
    )


def _traces(arguments: argparse.Namespace) -> int:
    from rlp.post.traces import TraceRule, filter_traces
    from rlp.process.outside import open_part

    classifier = None
    if arguments.classifier is not None:
        if ":" not in arguments.classifier:
            raise ConfigError(
                f"--classifier must be package.module:function, got {arguments.classifier!r}."
            )
        classifier = open_part("--classifier", arguments.classifier, {}, ())
    rule = TraceRule(
        script=arguments.script,
        least_share=arguments.least_share,
        most_switches=arguments.most_switches,
        most_characters=arguments.most_characters,
        vocabulary=None if arguments.vocabulary is None else _vocabulary(arguments.vocabulary),
        most_outside=arguments.most_outside,
        classifier=classifier,
        language=arguments.language,
        only_right=not arguments.wrong_too,
    )
    counts = filter_traces(
        arguments.source,
        arguments.out,
        rule,
        open_marker=arguments.open,
        close_marker=arguments.close,
        with_pairs=arguments.pairs,
    )
    print(f"{arguments.out}: {counts.in_words()}")
    return 0


def _vocabulary(path: Path) -> frozenset[str]:
    from rlp.measure.language import words_of
    from rlp.process.files import read_bytes

    try:
        words = frozenset(words_of(read_bytes(path).decode()))
    except UnicodeDecodeError as error:
        raise ConfigError(f"--vocabulary: {path} is not UTF-8: {error}.") from error
    if not words:
        raise ConfigError(f"--vocabulary: {path} holds no word. Write one a line.")
    return words
