"""A world whose skills and surface are independent of each other.

A document names a skill, gives it a symbol and says what comes out, with filler words between:

    f17 k203 s4 f90 f2 gives s6 .

A skill is a permutation of eight symbols. It has 16 names that no letter connects: which names mean
the same is known only to who has read what they do. So sets of documents can differ in how many
skills they have while they have the same number of different words, and the reverse.

The base has read all skills under all names in an old edition, where half of the entries of every
permutation are others; the sets teach the present one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlp.data.documents import Document

SKILLS, NAMES, SYMBOLS, FILLERS = 16, 16, 8, 128
"""NAMES of each skill."""

VOCABULARY = (
    "<pad>",
    "<unk>",
    "<eos>",
    "<think>",
    "</think>",
    ".",
    "gives",
    *(f"s{i}" for i in range(SYMBOLS)),
    *(f"k{i}" for i in range(SKILLS * NAMES)),
    *(f"f{i}" for i in range(FILLERS)),
)
ID = {word: index for index, word in enumerate(VOCABULARY)}
ANSWER = 6
"""Place of the answer in a document's tokens."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked, and what is said to come out."""

    skill: int
    symbol: int
    words: tuple[str, ...]
    """All before the answer."""
    answer: str

    @property
    def prompt(self) -> str:
        return " ".join(self.words)

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer} ."

    def document(self) -> Document:
        """Its tokens; only the answer is predicted."""
        tokens = np.array([ID[word] for word in self.text.split()])
        mask = np.zeros(len(tokens), dtype=bool)
        mask[ANSWER] = True
        return Document(0, tokens, loss_mask=mask)


class World:
    """Skills and names of a seed."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"prismatic world {seed}")
        names = [f"k{i}" for i in range(SKILLS * NAMES)]
        rng.shuffle(names)
        self.names = [names[s * NAMES : (s + 1) * NAMES] for s in range(SKILLS)]
        self.skill_of = {name: s for s, own in enumerate(self.names) for name in own}
        self.tables = [rng.sample(range(SYMBOLS), SYMBOLS) for _ in range(SKILLS)]
        self.old = [self._older(table, rng) for table in self.tables]

    @staticmethod
    def _older(table: list[int], rng: random.Random) -> list[int]:
        """The same permutation with half of its entries moved on by one among themselves."""
        moved = rng.sample(range(SYMBOLS), SYMBOLS // 2)
        old = list(table)
        for place, source in zip(moved, moved[1:] + moved[:1]):
            old[place] = table[source]
        return old

    def right(self, words: Sequence[str]) -> str:
        """The answer to a problem's words."""
        return f"s{self.tables[self.skill_of[words[1]]][int(words[2][1:])]}"

    def problem(
        self,
        rng: random.Random,
        *,
        names: Sequence[str],
        fillers: Sequence[str],
        old: bool = False,
    ) -> Problem:
        """One of these names, any symbol, any of these fillers."""
        name, symbol = rng.choice(names), rng.randrange(SYMBOLS)
        skill = self.skill_of[name]
        one, two, three = (rng.choice(fillers) for _ in range(3))
        answer = (self.old if old else self.tables)[skill][symbol]
        words = (one, name, f"s{symbol}", two, three, "gives")
        return Problem(skill, symbol, words, f"s{answer}")

    def any_problem(self, rng: random.Random, *, old: bool = False) -> Problem:
        """Every name is as likely."""
        names = self.names[rng.randrange(SKILLS)]
        return self.problem(rng, names=names, fillers=ALL_FILLERS, old=old)

    def held_out(self, seed: int, each: int = 4) -> list[Problem]:
        """Every entry of every skill, under any of its names, `each` times."""
        rng = random.Random(f"prismatic held out {seed}")
        found = []
        for skill in range(SKILLS):
            for symbol in range(SYMBOLS):
                for _ in range(each):
                    name = rng.choice(self.names[skill])
                    one, two, three = (rng.choice(ALL_FILLERS) for _ in range(3))
                    words = (one, name, f"s{symbol}", two, three, "gives")
                    found.append(Problem(skill, symbol, words, self.right(words)))
        return found


ALL_FILLERS = [f"f{i}" for i in range(FILLERS)]
