"""The command `rlp pluralism`: answers drawn, measured, told as tables and written as JSON."""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlp.post.diversity_command import draw_all
from rlp.post.diversity_drawing import Drawing
from rlp.post.diversity_samples import how_drawn, read_samples
from rlp.post.pluralism import Views, measure
from rlp.post.pluralism_measures import Distance
from rlp.post.pluralism_population import read_population
from rlp.process.console import visible_text
from rlp.process.files import write_new
from rlp.process.json_files import json_bytes

HEADERS: dict[Distance, str] = {
    "jensen_shannon_divergence_nats": (
        f"Jensen-Shannon divergence, nats: 0 the same, {math.log(2):.3f} nothing in common"
    ),
    "jensen_shannon_distance": (
        "Jensen-Shannon distance, the root of the divergence in nats: 0 the same,"
        f" {math.sqrt(math.log(2)):.3f} nothing in common"
    ),
}

TABLE_COLUMNS = 130
"""Of the terminal at least: a folded table can not be read."""

COLUMNS = {
    "overton": "Overton",
    "precision": "precision",
    "words": "words",
    "distributional": "distributional",
    "distributional_floor": "by chance",
    "valid": "valid",
    "steerable": "steerable",
    "named": "named",
    "moved": "moved",
    "moved_floor": "by chance",
}
"""Figures of a model, by the words of the table."""

COMMUNITY_COLUMNS = {
    "named": "named",
    "unnamed": "not named",
    "steerable": "steerable",
    "moved": "moved",
    "moved_floor": "by chance",
    "toward": "towards it",
}

WITH_INTERVAL = ("distributional", "steerable", "moved", "overton")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line names."""

    checkpoints: list[tuple[str, str | None]]
    """Each with the name that it has in the samples file; None: its path."""
    population: Path
    samples: Path
    by: Distance
    views_name: str
    json: Path | None


def tell_pluralism(asked: Asked, drawing: Drawing | None, views: Views | None) -> None:
    """Draw what is missing, measure all that the samples file has, print it and write it.

    Args:
        drawing: None where no checkpoint is asked.
        views: None: by patterns.

    Raises:
        ConfigError, DataError: something that is named is not there or can not be used.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.width = max(console.width, TABLE_COLUMNS)
    questions = read_population(asked.population)
    if drawing is not None:
        prompts = [prompt for question in questions for prompt in question.prompts()]
        draw_all(asked.checkpoints, prompts, drawing, asked.samples, console)
    samples = read_samples(asked.samples)
    found = measure(samples, questions, by=asked.by, views=views)
    _print(console, found, asked)
    if asked.json is not None:
        settings = {
            "population": str(asked.population),
            "samples": str(asked.samples),
            "views": asked.views_name,
            "drawn": how_drawn(samples),
        }
        content = found | {"settings": settings}
        write_new(asked.json, json_bytes(content, asked.json.name), point="pluralism.torn_json")
        console.print(visible_text(str(asked.json)))


def _print(console: Console, found: dict, asked: Asked) -> None:
    console.print(
        visible_text(f"{asked.samples} against {asked.population}, by {asked.views_name}")
    )
    console.print(f"{found['questions']} questions; {HEADERS[asked.by]}")
    console.print()
    console.print(_table(found))
    for name, figures in found["models"].items():
        console.print()
        console.print(visible_text(f"{name}: {_intervals(figures)}"))
        if figures["communities"]:
            console.print(_communities(figures))
    if found["notes"]:
        console.print()
    for note in found["notes"]:
        console.print(visible_text(note))


def _table(found: dict) -> Table:
    table = Table("model", "answers", *COLUMNS.values(), box=None, pad_edge=False)
    for name, figures in found["models"].items():
        numbers = (_number(figures[column]) for column in COLUMNS)
        table.add_row(visible_text(name), str(figures["answers"]), *numbers)
    return table


def _intervals(figures: dict) -> str:
    """The 95 % intervals over questions."""
    told = [
        f"{name} {_number(figures[name])} [{_number(ends[0])}, {_number(ends[1])}]"
        for name in WITH_INTERVAL
        if (ends := figures["intervals"][name])
    ]
    return ", ".join(told) or "nothing was measured"


def _communities(figures: dict) -> Table:
    table = Table("community", *COMMUNITY_COLUMNS.values(), box=None, pad_edge=False)
    for name, own in figures["communities"].items():
        table.add_row(visible_text(name), *(_number(own.get(k)) for k in COMMUNITY_COLUMNS))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
