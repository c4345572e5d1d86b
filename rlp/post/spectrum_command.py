"""The command `rlp spectrum score`: figures as tables and as JSON."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlp.compare.asked_model import open_asked_model
from rlp.compare.evaluate import device_of
from rlp.post.spectrum_measures import DRAWS
from rlp.post.spectrum_rows import RowFormat
from rlp.post.spectrum_scoring import Asked, bayes, score_model, score_oracle, uniform
from rlp.process.console import visible_text
from rlp.process.files import write_new
from rlp.process.json_files import json_bytes

TABLE_COLUMNS = 110
"""Of the terminal at least: a folded table can not be read."""

ORACLES = {"Bayes": bayes, "uniform": uniform}


def tell_scores(
    checkpoint: str,
    asked: Asked,
    row_format: RowFormat,
    temperatures: Sequence[float],
    *,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Ask a checkpoint, print what it says beside the oracles, and write it.

    Raises:
        ConfigError: something that is named is not there or can not be used.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.width = max(console.width, TABLE_COLUMNS)
    model = open_asked_model(checkpoint, device=device_of(device), dtype="float32")
    found = score_model(model, asked, row_format, temperatures)
    told = {f"T {temperature:g}": figures for temperature, figures in found.items()}
    oracles = {name: score_oracle(scorer, asked) for name, scorer in ORACLES.items()}

    console.print(visible_text(f"{checkpoint}: {asked.tasks} tasks of each family and kind"))
    console.print()
    console.print(_told_table(told | oracles))
    console.print()
    console.print(_hidden_table(told | oracles, asked))
    undefined = sum(figures["all"]["undefined"] for figures in found.values())
    if undefined:
        console.print(f"{undefined} questions whose options have no mass are in mass alone.")
    if json is not None:
        settings = {name: getattr(asked, name) for name in Asked.__slots__}
        content = {
            "settings": settings | {"format": vars(row_format), "yield_draws": DRAWS},
            "temperatures": [{"temperature": t, "figures": own} for t, own in found.items()],
            "oracles": oracles,
        }
        write_new(json, json_bytes(content, json.name), point="spectrum.torn_json")
        console.print(visible_text(str(json)))


def _told_table(told: dict[str, dict]) -> Table:
    """Tasks whose description says the distribution: is it followed?"""
    table = Table(
        "told, no pair",
        "family",
        *("JSD, nats", "mass", f"yield of {DRAWS}", "accuracy"),
        box=None,
        pad_edge=False,
    )
    for name, families in told.items():
        for family, figures in families.items():
            numbers = (
                _number(figures.get(f"told_{key}")) for key in ("jsd", "mass", "yield", "accuracy")
            )
            table.add_row(name, family, *numbers)
    return table


def _hidden_table(told: dict[str, dict], asked: Asked) -> Table:
    """Tasks that pairs alone tell, all families: how near to Bayes' rule?"""
    table = Table(
        "hidden, all families",
        "pairs",
        *("JSD to Bayes, nats", "mass", "NLL", "above Bayes", "accuracy"),
        box=None,
        pad_edge=False,
    )
    for name, families in told.items():
        for shots in asked.shots:
            keys = (f"shots_{shots}_{key}" for key in ("jsd", "mass", "nll", "excess", "accuracy"))
            table.add_row(name, str(shots), *(_number(families["all"].get(key)) for key in keys))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
