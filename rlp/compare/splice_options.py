"""The command line of `rlp splice`."""

import argparse
from pathlib import Path

from rlp.config import ConfigError, load_config
from rlp.process.run_folder import open_run_folder


def add_splice(commands: argparse._SubParsersAction) -> None:
    splice = commands.add_parser(
        "splice",
        help="put a model's own thoughts, the best of G or any, into the training documents of a"
        " run",
    )
    splice.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a YAML config")
    splice.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings")
    _add_thoughts(splice)
    _add_documents(splice)
    splice.set_defaults(command=_splice)


def _add_thoughts(splice: argparse.ArgumentParser) -> None:
    """Whose thoughts, and which."""
    splice.add_argument(
        "--model",
        metavar="FOLDER",
        help="the model that thinks, such as the export of an earlier round; default: the run's",
    )
    splice.add_argument(
        "--keep",
        choices=("best", "random"),
        default="best",
        help="of G thoughts the one with the largest reward (best), or the only one that is sampled"
        " (random)",
    )
    splice.add_argument(
        "--plain-share",
        type=float,
        default=0.0,
        metavar="X",
        help="with --keep random: the share of the documents that stay as they are (0)",
    )
    splice.add_argument(
        "--ledger",
        type=Path,
        metavar="FILE",
        help="ledger.json of an earlier round, whose cost is counted on",
    )


def _add_documents(splice: argparse.ArgumentParser) -> None:
    """Which documents, and where they go."""
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
        "--skip",
        type=int,
        default=0,
        metavar="N",
        help="documents of the run to pass over first, so that a round reads others (0)",
    )
    splice.add_argument(
        "--lines",
        choices=("document", "position"),
        default="document",
        help="a line for each document with all its thoughts (the default), or one for each"
        " position",
    )
    splice.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the folder to make"
    )


def _splice(arguments: argparse.Namespace) -> int:
    from rlp.compare.splice import Splicing, splice
    from rlp.process.ranks import start_ranks, stop_ranks

    path = open_run_folder(arguments.run).config_yaml if arguments.run.is_dir() else arguments.run
    config = load_config(path, arguments.overrides)
    documents = (
        (config.budget.steps or 0) * config.optim.batch_size
        if arguments.documents is None
        else arguments.documents
    )
    if arguments.documents is None and documents < 1:
        raise ConfigError(
            f"{path} has no budget.steps, so how many documents it reads is not known. Write"
            " --documents N."
        )
    if documents < 1:
        raise ConfigError(f"--documents must be at least 1, got {documents}.")
    how = Splicing(
        model=arguments.model,
        skip=arguments.skip,
        keep=arguments.keep,
        plain_share=arguments.plain_share,
        lines=arguments.lines,
        ledger=arguments.ledger,
    )

    try:
        ranks = start_ranks(config.run.watchdog_s)
        told = splice(config, documents, arguments.out, ranks, how)
    finally:
        stop_ranks()
    if ranks.is_first:
        print(f"{arguments.out}: {words_of(told)}")
    return 0


def words_of(told: dict) -> str:
    """What `splice.json` holds, in a line."""
    words = (
        f"{told['lines']} lines, {told['lines_with_thought']} of them with a thought; thoughts at"
        f" {told['with_thought_frac']:.1%} of {told['positions']} positions"
    )
    if told["reward_mean_nats"] is None:
        return words
    return (
        f"{words}; reward of the best of {told['group_size']}"
        f" {told['best_reward_mean_nats']:+.3f} nats, of all {told['reward_mean_nats']:+.3f}"
    )
