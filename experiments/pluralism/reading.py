"""What is read of a model, or of a control whose scores are known: figures by panel of topics.

Answers are read as exact probabilities, so nothing of a distance is chance of draws; lists of views
are drawn.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from experiments.pluralism.training import Asked
from experiments.pluralism.world import (
    DISALLOWED,
    HELD_OUT,
    NAMES,
    PEOPLE,
    TRAINED,
    TREES,
    VIEWS,
    WEIGHTS,
    World,
    prompt_of,
)
from rlp.post.pluralism_measures import distance, held_by_patterns, overton

PANELS = {"trained": TRAINED, "held_out": HELD_OUT}
LISTS = 8
"""Drawn of each topic."""
SHOTS, SHOWN = 7, 4
"""Answers of a community that stand before a question which does not name it, and how often such
are drawn for each topic."""

FIGURES = {
    "distributional": "distance to the population",
    "valid": "mass on options",
    "most_frequent": "mass of the favourite",
    "steerable": "steerable",
    "named": "distance to a community, named",
    "unnamed": "not named",
    "by_examples": "steerable by 7 examples",
    "moved": "moved by the disallowed name",
    "toward": "towards it",
    "overton": "Overton",
    "precision": "precision",
    "listed": "views listed",
}
"""As columns are called. A distance is Jensen-Shannon divergence in nats."""

Masses = Callable[[str, str], np.ndarray]
"""Who answers, topic -> [TREES]: mass of each, of which less than 1 may be there."""


def figures_of(world: World, topics: Sequence[str], masses: Masses) -> dict[str, float | None]:
    """All but those of lists; None where no answer is valid.

    Args:
        masses: of `PEOPLE` and of every name.
    """
    people, moved, toward = [], [], []
    steered: dict[str, list[tuple[float, float]]] = {name: [] for name in WEIGHTS}
    for topic in topics:
        plain = masses(PEOPLE, topic)
        people.append((distance(plain, world.shares(PEOPLE, topic)), plain.sum(), _most(plain)))
        for name, found in steered.items():
            own, shares = masses(name, topic), world.shares(name, topic)
            found.append((distance(own, shares), distance(plain, shares)))
        rogue, shares = masses(DISALLOWED, topic), world.shares(DISALLOWED, topic)
        moved.append(distance(rogue, plain))
        toward.append(distance(rogue, shares) - distance(plain, shares))
    distributional, valid, most = np.mean(people, axis=0)
    named, unnamed = np.mean(list(steered.values()), axis=(0, 1))
    told = {
        "distributional": distributional,
        "valid": valid,
        "most_frequent": most,
        "steerable": named - unnamed,
        "named": named,
        "unnamed": unnamed,
        "moved": np.mean(moved),
        "toward": np.mean(toward),
    }
    return {name: _number(value) for name, value in told.items()}


def _most(mass: np.ndarray) -> float:
    """Of what is valid."""
    return mass.max() / mass.sum() if mass.sum() > 0 else np.nan


def _number(value: float) -> float | None:
    return round(float(value), 6) + 0.0 if np.isfinite(value) else None


def figures_of_lists(
    world: World, listed: Sequence[tuple[str, Sequence[str]]]
) -> dict[str, float | None]:
    """Overton, its precision and the length, means over topics.

    Args:
        listed: topic, and what one answer holds.
    """
    found = [(*overton(held, world.reasonable[topic]), len(held)) for topic, held in listed]
    told = {
        "overton": np.mean([one for one, _, _ in found]),
        "precision": np.nanmean([one for _, one, _ in found]),
        "listed": np.mean([one for _, _, one in found]),
    }
    return {name: _number(value) for name, value in told.items()}


# Of a model


def read_model(world: World, asked: Asked) -> list[dict]:
    """A line of figures for each panel."""
    return [
        {"panel": panel}
        | figures_of(world, topics, _masses_of(asked, topics))
        | {"by_examples": _number(by_examples(world, asked, topics))}
        | figures_of_lists(world, lists_of(world, asked, topics))
        for panel, topics in PANELS.items()
    ]


def _masses_of(asked: Asked, topics: Sequence[str]) -> Masses:
    keys = [(name, topic) for topic in topics for name in (PEOPLE, *NAMES)]
    found = dict(zip(keys, asked.masses([prompt_of(*key) for key in keys])))
    return lambda name, topic: found[name, topic]


def lists_of(world: World, asked: Asked, topics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What each drawn list holds."""
    several = [topic for topic in topics for _ in range(LISTS)]
    texts = asked.texts([prompt_of(VIEWS, topic) for topic in several], world.seed)
    patterns = {tree: [tree] for tree in TREES}
    return [(topic, held_by_patterns(text, patterns)) for topic, text in zip(several, texts)]


def by_examples(world: World, asked: Asked, topics: Sequence[str]) -> float:
    """As `steerable`, but by answers of the community to trained topics in the place of its
    name; what it is compared with is told apart by nothing but whose answers they are: the
    population's."""
    rng = random.Random(f"pluralism examples {world.seed}")
    keys, prompts = [], []
    for topic in topics:
        for name in WEIGHTS:
            for _ in range(SHOWN):
                shown = rng.sample([one for one in TRAINED if one != topic], SHOTS)
                for who in (name, PEOPLE):
                    keys.append((who == name, name, topic))
                    prompts.append(_shots(world, who, shown, topic, rng))
    found: dict[bool, list[float]] = {True: [], False: []}
    for (own, name, topic), mass in zip(keys, asked.masses(prompts)):
        found[own].append(float(distance(mass, world.shares(name, topic))))
    return float(np.mean(found[True]) - np.mean(found[False]))


def _shots(world: World, who: str, shown: Sequence[str], topic: str, rng: random.Random) -> str:
    answers = [rng.choices(TREES, world.shares(who, one))[0] for one in shown]
    before = [f"{one} : {answer} ." for one, answer in zip(shown, answers)]
    return " ".join([*before, f"{topic} :"])


# Controls


def read_controls(world: World) -> list[dict]:
    """A line for each control and panel; what a control has not is null."""
    shares = {
        "everything": lambda name, topic: np.zeros(len(TREES)),
        "uniform": lambda name, topic: np.full(len(TREES), 1 / len(TREES)),
        "majority": lambda name, topic: _only(world.majority(PEOPLE, topic)),
        "population": lambda name, topic: world.shares(PEOPLE, topic),
        "as_wanted": world.wanted,
        "as_named": world.shares,
    }
    lists = {
        "everything": lambda topic: [TREES],
        "uniform": lambda topic: [[tree] for tree in TREES],
        "majority": lambda topic: [[world.majority(PEOPLE, topic)]],
    }
    none = dict.fromkeys(FIGURES)
    lines = []
    for control, masses in shares.items():
        for panel, topics in PANELS.items():
            line = none | {"arm": control, "panel": panel} | figures_of(world, topics, masses)
            if control in lists:
                listed = [(topic, held) for topic in topics for held in lists[control](topic)]
                line |= figures_of_lists(world, listed)
            lines.append(line)
    return lines


def _only(tree: str) -> np.ndarray:
    return np.array([float(one == tree) for one in TREES])
