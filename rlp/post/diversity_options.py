"""The command line of `rlp diversity`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError

if TYPE_CHECKING:
    from rlp.post.diversity_drawing import Drawing


def add_diversity(commands: argparse._SubParsersAction) -> None:
    """Its parser."""
    diversity = commands.add_parser(
        "diversity",
        help="how alike answers are: of one model, of several, and above the floor",
        epilog=(
            "With checkpoints, answers are drawn and added to the samples file, which is continued"
            " where it stopped; without any, what is in the file is measured."
        ),
    )
    diversity.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="Hugging Face folders, run folders (their exports are meant), or Hub names",
    )
    diversity.add_argument(
        "--samples",
        type=Path,
        default=Path("samples.jsonl"),
        metavar="FILE",
        help='a line {"model", "prompt", "kind": "open"|"closed", "text", "answer"?} each'
        " (samples.jsonl)",
    )
    diversity.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    _add_measuring(diversity)
    diversity.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a panel of your own (the one that comes along)",
    )
    counts = {
        "--open-samples": (8, "answers to each open prompt"),
        "--closed-samples": (4, "answers to each closed one"),
    }
    add_drawing(diversity, counts, top_p=0.9)
    diversity.set_defaults(command=_diversity)


def _add_measuring(diversity: argparse.ArgumentParser) -> None:
    """What is measured of the samples."""
    diversity.add_argument(
        "--embedding",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="texts -> an array [n, D]; TF-IDF of words by default",
    )
    diversity.add_argument(
        "--words",
        type=int,
        metavar="N",
        help="measure the first N words of each text, so that lengths are alike (all)",
    )
    diversity.add_argument(
        "--of",
        choices=("text", "thought"),
        default="text",
        help="what is measured of a line: the answer, or the thought before it (text)",
    )


def add_drawing(
    command: argparse.ArgumentParser, counts: dict[str, tuple[int, str]], *, top_p: float
) -> None:
    """How answers are drawn, of every command that draws some; `drawing_of` reads it.

    Args:
        counts: options that say how many, with their defaults and what they are.
        top_p: by default.
    """
    drawing = command.add_argument_group("drawing answers of checkpoints")
    drawing.add_argument(
        "--names", metavar="NAME,...", help="of the models in the file (the paths)"
    )
    numbers = counts | {
        "--tokens": (32, "of an answer at most, where its prompt names none"),
        "--seed": (0, "of all noise"),
        "--batch-size": (64, "answers drawn side by side"),
    }
    for name, (default, what) in numbers.items():
        drawing.add_argument(
            name, type=int, default=default, metavar="N", help=f"{what} ({default})"
        )
    drawing.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: greedy (1)"
    )
    drawing.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help=f"1: the whole distribution ({top_p:g})",
    )
    drawing.add_argument(
        "--format",
        choices=("raw", "chat"),
        default="raw",
        help="chat: with the tokenizer's chat template (raw)",
    )
    drawing.add_argument(
        "--frame", metavar="TEXT", help="of raw: what is continued ('Question: {prompt}\\nAnswer:')"
    )
    drawing.add_argument(
        "--think", action="store_true", help="answer after a thought of the model's own"
    )
    drawing.add_argument("--thought-budget", type=int, metavar="L", help="its tokens (as trained)")
    drawing.add_argument("--device", default="auto", help="auto, cpu, cuda")
    drawing.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="in bfloat16 answers depend on the batch (float32)",
    )


def _diversity(arguments: argparse.Namespace) -> int:
    from rlp.compare.evaluate import refuse_output
    from rlp.post.diversity_command import Asked, tell_diversity
    from rlp.process.outside import open_part

    refuse_output("--json", arguments.json)
    if arguments.words is not None and arguments.words < 1:
        raise ConfigError(f"--words must be at least 1, got {arguments.words}.")
    embedding = None
    if arguments.embedding is not None:
        embedding = open_part("--embedding", arguments.embedding, {}, ()).call
    drawing = None
    if arguments.checkpoints:
        counts = {name: getattr(arguments, name) for name in ("open_samples", "closed_samples")}
        drawing = drawing_of(arguments, **counts)
    tell_diversity(
        Asked(
            checkpoints=models_of(arguments),
            samples=arguments.samples,
            prompts=arguments.prompts,
            field=arguments.of,
            first_words=arguments.words,
            embedding_name=arguments.embedding or "TF-IDF of words",
            json=arguments.json,
        ),
        drawing,
        embedding,
    )
    return 0


def models_of(arguments: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Each checkpoint with its name; None: its path.

    Raises:
        ConfigError: there is none of that name, or not one name for each.
    """
    from rlp.compare.evaluate import model_of

    names = arguments.names.split(",") if arguments.names else [None] * len(arguments.checkpoints)
    if len(names) != len(arguments.checkpoints):
        raise ConfigError(
            f"--names has {len(names)} names for {len(arguments.checkpoints)} checkpoints. Write"
            " one for each, with commas between them."
        )
    return list(zip(map(model_of, arguments.checkpoints), names))


def drawing_of(arguments: argparse.Namespace, **counts: int) -> "Drawing":
    """As the options of `add_drawing` say.

    Args:
        counts: `open_samples` and `closed_samples`, or one of them.
    """
    from rlp.compare.evaluate import device_of
    from rlp.post.diversity_drawing import FRAME, Drawing

    return Drawing(
        **counts,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        format=arguments.format,
        frame=FRAME if arguments.frame is None else arguments.frame.replace("\\n", "\n"),
        tokens=arguments.tokens,
        seed=arguments.seed,
        thinks=arguments.think,
        thought_tokens=arguments.thought_budget,
        rows=arguments.batch_size,
        dtype=arguments.dtype,
        device=str(device_of(arguments.device)),
    )
