"""The command `rlp pipeline`."""

import argparse
from pathlib import Path


def add_pipeline(commands: argparse._SubParsersAction) -> None:
    """Its parser."""
    pipeline = commands.add_parser(
        "pipeline",
        help="run stages (cpt, rlp, mixed SFT, SFT, RLVR) of arms over seeds, and read every model",
        epilog="Killed and started again it goes on where it was. rlp report DIR makes its page.",
    )
    pipeline.add_argument("config", type=Path, metavar="CONFIG", help="the YAML of a pipeline")
    pipeline.add_argument(
        "--workers", type=int, default=1, metavar="N", help="stages side by side (1)"
    )
    pipeline.add_argument(
        "--dry-run",
        action="store_true",
        help="say stages, FLOPs, time and disk, and what is refused; nothing is written",
    )
    pipeline.set_defaults(command=_pipeline)


def _pipeline(arguments: argparse.Namespace) -> int:
    from rlp.config import require
    from rlp.post.pipeline_config import load_pipeline
    from rlp.post.pipeline_run import plan_pipeline, run_pipeline
    from rlp.process.console import say_line
    from rlp.process.files import read_bytes

    require(arguments.workers >= 1, "--workers", arguments.workers, "must be at least 1")
    pipeline = load_pipeline(arguments.config)
    if arguments.dry_run:
        say_line(plan_pipeline(pipeline))
        return 0
    text = read_bytes(arguments.config.resolve())
    return run_pipeline(pipeline, text, say_line, arguments.workers)
