"""The world of each seed, and a reader of models on its panel.

`experiments/world/make_bases.py` makes the worlds: documents, base and panel of a seed are drawn
anew, and two seeds share nothing but the rules.
"""

import json
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from lines import ROOT, figures_of

from rlp.config import Config, load_config
from rlp.measure.decomposition import Decomposition
from rlp.measure.frozen import load_frozen
from rlp.measure.panel import held_out_panel
from rlp.measure.panel_scoring import ThinkingModel, measure_panel, no_think_logprob
from rlp.model.setup import ModelSetup, PanelSetup
from rlp.process.ranks import Ranks

sys.path.append(str(ROOT / "experiments" / "world"))

from make_bases import KINDS, make_seed

PANEL = (256, 4)
"""Positions of the panel, one in every held-out document, and thoughts at each, for the numbers
that are compared."""
CURVE = (256, 1)
"""The same for what is read along a run."""


AT_PANEL = (
    "position.per_document=1",
    "position.selector=marker",
    "position.marker=faces",
)
"""Where the answers are: one position in a document."""


def world_folder(seed: int | str) -> Path:
    """Of a seed, or, with `{seed}`, of whichever it is."""
    return KINDS["rare"].out / str(seed)


def make_world(seed: int) -> bool:
    """Make the world of a seed, or find it made; whether its base counts."""
    return make_seed("rare", seed, KINDS["rare"].out)["counts"]


def computed_frac(seed: int) -> float:
    """How often the base of a seed has the right word first inside a computing thought."""
    return json.loads((world_folder(seed) / "base.json").read_text())["computed_frac"]


def quickstart(seed: int) -> str:
    """The config of RLP on the world of a seed."""
    return str(world_folder(seed) / "quickstart.yaml")


def panel_of(size: tuple[int, int]) -> list[str]:
    """Settings of a panel with one position in each document.

    Args:
        size: positions of the panel, and thoughts at each.
    """
    return [
        f"evaluation.panel_positions={size[0]}",
        f"evaluation.thoughts_per_position={size[1]}",
    ]


class Reader:
    """Reads models of one world at the answers of its panel, whatever they were trained with."""

    def __init__(self, seed: int, held_out: str, ranks: Ranks) -> None:
        """
        Args:
            held_out: the file of the world that the panel is drawn from.
        """
        self._ranks = ranks
        file = json.dumps([str(world_folder(seed) / held_out)])
        self._config = load_config(
            quickstart(seed),
            [
                f"model.path={world_folder(seed) / 'base'}",
                f"data.held_out={file}",
                *AT_PANEL,
                *panel_of(PANEL),
            ],
        )
        setup = PanelSetup(self._config, lambda text: None)
        self.tokenizer = setup.tokenizer
        self.panel = held_out_panel(setup)
        base = load_frozen(setup, ranks)
        self.start_logprob = no_think_logprob(base, self.panel, self._config, ranks)

    def load(self, model: Path, temperature: float, thoughts: int) -> tuple[Config, ThinkingModel]:
        """A model that thinks so many thoughts at a temperature, and the config that says so."""
        config = replace(
            self._config,
            model=replace(self._config.model, path=str(model)),
            thought=replace(self._config.thought, temperature=temperature),
            evaluation=replace(self._config.evaluation, thoughts_per_position=thoughts),
        )
        return config, load_frozen(ModelSetup(config), self._ranks)

    def measure(self, model: Path, temperature: float, thoughts: int) -> Decomposition:
        """The panel as a model sees it."""
        config, loaded = self.load(model, temperature, thoughts)
        return measure_panel(
            loaded, self.panel, config, self._ranks, start_logprob=self.start_logprob
        )

    def figures(self, model: Path, temperature: float, thoughts: int = PANEL[1]) -> dict:
        """What a line of results.jsonl says of a model at a temperature."""
        return figures_of(self.measure(model, temperature, thoughts).means, temperature, thoughts)


@lru_cache(maxsize=2)
def reader_of(seed: int, ranks: Ranks, held_out: str = "held_out.jsonl") -> Reader:
    """The reader of a seed's world, which a worker keeps."""
    return Reader(seed, held_out, ranks)
