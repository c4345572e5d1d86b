"""The command `rlp diversity`: answers drawn, measured, told as tables and written as JSON."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlp.post.diversity import HEADLINE, measure
from rlp.post.diversity_drawing import Drawing, draw_answers
from rlp.post.diversity_measures import VERBATIM_WORDS, Embedding
from rlp.post.diversity_samples import (
    KINDS,
    Kind,
    Prompt,
    committed_panel,
    how_drawn,
    read_prompts,
    read_samples,
)
from rlp.process.console import visible_text
from rlp.process.files import write_new
from rlp.process.json_files import json_bytes

TABLE_COLUMNS = 110
"""Of the terminal at least: a folded table can not be read."""

MATRIX_MODELS = 8
"""Models whose matrix is printed; of more it is in the JSON."""

COLUMNS = {
    "intra": "intra",
    "floor_within": "its floor",
    "duplicates": "duplicates",
    "verbatim_within": "verbatim",
    "vendi": "Vendi",
    "distinct_2": "distinct-2",
    "answer_entropy": "entropy",
    "words": "words",
    "empty_frac": "empty",
}
"""Figures of a model, by the words of the table."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line names."""

    checkpoints: list[tuple[str, str | None]]
    """Each with the name that it has in the samples file; None: its path."""
    samples: Path
    prompts: Path | None
    """None: the committed panel."""
    field: str
    """What is measured of a line."""
    first_words: int | None
    embedding_name: str
    json: Path | None


def tell_diversity(asked: Asked, drawing: Drawing | None, embedding: Embedding | None) -> None:
    """Draw what is missing, measure all that the samples file has, print it and write it.

    Args:
        drawing: None where no checkpoint is asked.
        embedding: None: TF-IDF.

    Raises:
        ConfigError, DataError: something that is named is not there or can not be used.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.width = max(console.width, TABLE_COLUMNS)
    if drawing is not None:
        prompts = committed_panel() if asked.prompts is None else read_prompts(asked.prompts)
        draw_all(asked.checkpoints, prompts, drawing, asked.samples, console)

    samples = read_samples(asked.samples, field=asked.field)
    found = measure(samples, embedding=embedding, first_words=asked.first_words)
    drawn = how_drawn(samples)
    _print(console, found, drawn, asked)
    if asked.json is not None:
        settings = {
            "samples": str(asked.samples),
            "of": asked.field,
            "embedding": asked.embedding_name,
            "first_words": asked.first_words,
            "verbatim_words": VERBATIM_WORDS,
            "drawn": drawn,
        }
        content = found | {"settings": settings}
        write_new(asked.json, json_bytes(content, asked.json.name), point="diversity.torn_json")
        console.print(visible_text(str(asked.json)))


def draw_all(
    checkpoints: list[tuple[str, str | None]],
    prompts: list[Prompt],
    drawing: Drawing,
    samples: Path,
    console: Console,
) -> None:
    """Add the answers of checkpoints, each with the name that it has there, to a samples file."""
    for checkpoint, name in checkpoints:
        draw_answers(
            checkpoint,
            prompts,
            drawing,
            samples,
            name=name,
            tell=lambda text: console.print(visible_text(text)),
        )


def _print(console: Console, found: dict, drawn: dict[str, dict], asked: Asked) -> None:
    console.print(visible_text(f"{asked.samples}, its {asked.field}s, by {asked.embedding_name}"))
    for name, how in drawn.items():
        told = ", ".join(f"{key} {value}" for key, value in how.items()) or "not said in the file"
        console.print(visible_text(f"  {name}: drawn with {told!s}".replace("\n", "\\n")))
    for kind in KINDS:
        if found[kind] is not None:
            console.print()
            console.print(visible_text(headline(kind, found[kind])))
            console.print(_table(kind, found[kind]))
            names = list(found[kind]["models"])
            if 1 < len(names) <= MATRIX_MODELS:
                console.print(_matrix(found[kind], names))
    if found["notes"]:
        console.print()
    for note in found["notes"]:
        console.print(visible_text(note))


def headline(kind: Kind, figures: dict) -> str:
    """What a kind of prompts says, in a sentence or two."""
    meaning = "variety is good" if kind == "open" else "answers should agree, and be right"
    start = f"{kind} ({figures['prompts']} prompts, {figures['texts']} texts; {meaning}): "
    floor = _number(figures["floor"])
    if figures["inter"] is None:
        return f"{start}intra {_number(figures['intra'])}, floor {floor}; no inter."
    low, high = figures["intervals"][HEADLINE] or (None, None)
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    above = figures[HEADLINE]
    sign = "not measured" if above is None else f"{above:+.3f}{interval}"
    return (
        f"{start}inter above the floor {sign} (inter {_number(figures['inter'])}, floor {floor});"
        f" intra {_number(figures['intra'])}, verbatim {_number(figures['verbatim'])}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(kind: Kind, figures: dict) -> Table:
    """Figures of each model alone."""
    columns = COLUMNS | ({"accuracy": "right"} if kind == "closed" else {})
    table = Table("model", "texts", *columns.values(), box=None, pad_edge=False)
    for name, own in figures["models"].items():
        numbers = (_number(own.get(column)) for column in columns)
        table.add_row(visible_text(name), str(own["texts"]), *numbers)
    return table


def _matrix(figures: dict, names: list[str]) -> Table:
    """Model x model: intra of each, inter of each two."""
    table = Table("inter (and intra)", *map(visible_text, names), box=None, pad_edge=False)
    for one in names:
        row = (_number(figures["matrix"][one][other]) for other in names)
        table.add_row(visible_text(one), *row)
    return table
