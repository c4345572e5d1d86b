"""The command line of `rlp pluralism`."""

import argparse
from pathlib import Path

from rlp.post.diversity_options import add_drawing, drawing_of, models_of


def add_pluralism(commands: argparse._SubParsersAction) -> None:
    """Its parser."""
    pluralism = commands.add_parser(
        "pluralism",
        help="how far answers are from a population: its views, its shares, its communities",
        epilog=(
            "With checkpoints, answers are drawn and added to the samples file, which is continued"
            " where it stopped; without any, what is in the file is measured."
        ),
    )
    pluralism.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="Hugging Face folders, run folders (their exports are meant), or Hub names",
    )
    pluralism.add_argument(
        "--population",
        type=Path,
        required=True,
        metavar="FILE",
        help='a line {"prompt", "options", "population", "communities"?, "disallowed"?, ...} each',
    )
    pluralism.add_argument(
        "--samples",
        type=Path,
        default=Path("samples.jsonl"),
        metavar="FILE",
        help="as of rlp diversity (samples.jsonl)",
    )
    pluralism.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    pluralism.add_argument(
        "--by",
        choices=("divergence", "distance"),
        default="divergence",
        help="Jensen-Shannon divergence in nats, or its square root (divergence)",
    )
    pluralism.add_argument(
        "--views",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="prompt, answer -> the names of what the answer holds; by the options' patterns by"
        " default",
    )
    counts = {"--answers": (32, "drawn to each prompt, with each name and without")}
    add_drawing(pluralism, counts, top_p=1.0)
    pluralism.set_defaults(command=_pluralism)


def _pluralism(arguments: argparse.Namespace) -> int:
    from rlp.compare.evaluate import refuse_output
    from rlp.post.pluralism_command import Asked, tell_pluralism
    from rlp.post.pluralism_measures import DISTANCES
    from rlp.process.outside import open_part

    refuse_output("--json", arguments.json)
    views = None
    if arguments.views is not None:
        views = open_part("--views", arguments.views, {}, ()).call
    drawing = None
    if arguments.checkpoints:
        drawing = drawing_of(arguments, open_samples=arguments.answers)
    tell_pluralism(
        Asked(
            checkpoints=models_of(arguments),
            population=arguments.population,
            samples=arguments.samples,
            by=DISTANCES[("divergence", "distance").index(arguments.by)],
            views_name=arguments.views or "the patterns of the options",
            json=arguments.json,
        ),
        drawing,
        views,
    )
    return 0
