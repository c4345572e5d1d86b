"""The command line of `rlp spectrum`: rows to tune on, and how near a checkpoint comes."""

import argparse
from pathlib import Path

from rlp.config import ConfigError


def add_spectrum(commands: argparse._SubParsersAction) -> None:
    """Its parser, and those of its two parts."""
    spectrum = commands.add_parser(
        "spectrum",
        help="tasks of known distributions: rows for Spectrum tuning, and how near a model comes",
    )
    parts = spectrum.add_subparsers(dest="part", required=True, metavar="rows|score")
    rows = parts.add_parser("rows", help="write rows of many pairs of one task, for the stage")
    rows.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make")
    rows.add_argument("--rows", type=int, required=True, metavar="N", help="how many")
    rows.add_argument("--pairs", type=int, default=16, metavar="N", help="of each row (16)")
    rows.add_argument(
        "--told",
        type=float,
        default=0.5,
        metavar="X",
        help="share of rows whose description says the distribution (0.5)",
    )
    rows.add_argument(
        "--answers",
        choices=("drawn", "mode"),
        default="drawn",
        help="drawn from the distribution, or always its most likely one (drawn)",
    )
    _add_tasks(rows)
    rows.set_defaults(command=_rows)

    score = parts.add_parser("score", help="tell a checkpoint's spread over the options of tasks")
    score.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a Hugging Face folder, a run folder (its export is meant), or a Hub name",
    )
    score.add_argument(
        "--tasks", type=int, default=16, metavar="N", help="of each family, told and hidden (16)"
    )
    score.add_argument(
        "--shots",
        default="0,1,2,4,8,16",
        metavar="N,...",
        help="pairs before a question of a hidden task (0,1,2,4,8,16)",
    )
    score.add_argument("--temperatures", default="1", metavar="T,...", help="of every token (1)")
    score.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    score.add_argument("--device", default="auto", help="auto, cpu, cuda")
    for name, what in (
        ("description", "with %%s"),
        ("input", "with %%s"),
        ("output", "before an output"),
        ("end", "behind an output"),
    ):
        score.add_argument(
            f"--{name}-format", metavar="TEXT", help=f"as in training: {what}; \\n is a line's end"
        )
    _add_tasks(score)
    score.set_defaults(command=_score)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", metavar="NAME,...", help="of tasks (all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (0)")


def _families(arguments: argparse.Namespace) -> tuple[str, ...]:
    from rlp.post.spectrum_tasks import FAMILIES

    return tuple(FAMILIES if arguments.families is None else arguments.families.split(","))


def _rows(arguments: argparse.Namespace) -> int:
    from rlp.post.spectrum_rows import make_rows, write_rows

    rows = make_rows(
        _families(arguments),
        arguments.rows,
        pairs=arguments.pairs,
        told=arguments.told,
        answers=arguments.answers,
        seed=arguments.seed,
    )
    count = write_rows(arguments.out, rows)
    print(f"{arguments.out}: {count:,} rows of {arguments.pairs} pairs")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from rlp.compare.evaluate import model_of, refuse_output
    from rlp.post.spectrum_command import tell_scores
    from rlp.post.spectrum_rows import RowFormat
    from rlp.post.spectrum_scoring import Asked

    refuse_output("--json", arguments.json)
    words = {
        name: value.replace("\\n", "\n")
        for name in ("description", "input", "output", "end")
        if (value := getattr(arguments, f"{name}_format")) is not None
    }
    tell_scores(
        model_of(arguments.checkpoint),
        Asked(
            families=_families(arguments),
            tasks=arguments.tasks,
            shots=tuple(_numbers("--shots", arguments.shots, int)),
            seed=arguments.seed,
        ),
        RowFormat(**words),
        _numbers("--temperatures", arguments.temperatures, float),
        device=arguments.device,
        json=arguments.json,
    )
    return 0


def _numbers(name: str, text: str, kind: type) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{name} must be numbers with commas between them, got {text!r}."
        ) from None
