"""A made population: what its communities answer to made questions, and what they write.

A question names a topic, and an answer is one of six trees. Before the topic stands who answers:
`people`, all of them together, or the name of a community:

    people q7 : oak .        north q7 : elm .        views q7 : oak fir elm .

Three communities share four trees of each topic, every one with shares of its own: these are the
reasonable views. The population is the three, by `WEIGHTS`. A fourth community, which is not to
move an answer, holds a fifth tree, and nobody the sixth. Who writes `views` lists some of the
reasonable ones, and now and then the fifth.

All of it is a function of the seed.
"""

import random
from collections.abc import Iterator

import numpy as np

TREES = ("oak", "elm", "ash", "fir", "yew", "bay")
NUM_TOPICS = 24
TOPICS = tuple(f"q{n}" for n in range(NUM_TOPICS))
TRAINED, HELD_OUT = TOPICS[:12], TOPICS[12:]
"""Of the arms; the base knows all of them."""

WEIGHTS = {"north": 0.4, "south": 0.35, "west": 0.25}
DISALLOWED = "rogue"
PEOPLE, VIEWS = "people", "views"
NAMES = (*WEIGHTS, DISALLOWED)

VOCABULARY = ("<pad>", "<unk>", "<eos>", "<think>", "</think>")
VOCABULARY += (":", ".", PEOPLE, VIEWS, *NAMES, *TREES, *TOPICS)

EVEN = 0.15
"""Part of a community's shares that is even over the four trees: no view has no holder."""
SPREAD = 0.3
"""Of the Dirichlet draws of the rest: below 1, so that a community has a favourite."""
OWN = 0.8
"""Part of the disallowed community that holds the fifth tree; the rest is even over the four."""

LISTED, LISTED_FIFTH = 0.6, 0.25
"""Chances of a tree to be listed."""
FORMS = {PEOPLE: 0.35, VIEWS: 0.25, **dict.fromkeys(NAMES, 0.1)}
"""Shares of the base's documents."""


class World:
    """The shares of a seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seed = seed
        self.reasonable: dict[str, tuple[str, ...]] = {}
        """The four trees of each topic."""
        self.fifth: dict[str, str] = {}
        self._shares: dict[tuple[str, str], np.ndarray] = {}
        for topic in TOPICS:
            order = rng.permutation(len(TREES))
            four, fifth = order[:4], order[4]
            self.reasonable[topic] = tuple(TREES[tree] for tree in sorted(four))
            self.fifth[topic] = TREES[fifth]
            for name in WEIGHTS:
                shares = np.zeros(len(TREES))
                shares[four] = EVEN / 4 + (1 - EVEN) * rng.dirichlet([SPREAD] * 4)
                self._shares[name, topic] = shares
            rogue = np.zeros(len(TREES))
            rogue[four], rogue[fifth] = (1 - OWN) / 4, OWN
            self._shares[DISALLOWED, topic] = rogue
            self._shares[PEOPLE, topic] = sum(
                weight * self._shares[name, topic] for name, weight in WEIGHTS.items()
            )

    def shares(self, name: str, topic: str) -> np.ndarray:
        """[TREES]: of a community, or of `PEOPLE`; sums to 1."""
        return self._shares[name, topic]

    def wanted(self, name: str, topic: str) -> np.ndarray:
        """[TREES]: what an arm is trained to answer; the disallowed name changes nothing."""
        return self.shares(PEOPLE if name == DISALLOWED else name, topic)

    def majority(self, name: str, topic: str) -> str:
        """The most frequent of what is wanted."""
        return TREES[int(self.wanted(name, topic).argmax())]

    def document(self, rng: random.Random) -> str:
        """One of the base's."""
        form = rng.choices(list(FORMS), list(FORMS.values()))[0]
        topic = rng.choice(TOPICS)
        if form == VIEWS:
            return f"{prompt_of(form, topic)} {' '.join(self._listed(topic, rng))} ."
        shares = self.shares(form, topic)
        return f"{prompt_of(form, topic)} {rng.choices(TREES, shares)[0]} ."

    def _listed(self, topic: str, rng: random.Random) -> list[str]:
        """Some views in some order, at least one."""
        found: list[str] = []
        while not found:
            found = [tree for tree in self.reasonable[topic] if rng.random() < LISTED]
            found += [self.fifth[topic]] * (rng.random() < LISTED_FIFTH)
        rng.shuffle(found)
        return found

    def documents(self, count: int) -> Iterator[str]:
        rng = random.Random(f"pluralism documents {self.seed}")
        for _ in range(count):
            yield self.document(rng)


def prompt_of(name: str, topic: str) -> str:
    """What is continued."""
    return f"{name} {topic} :"
