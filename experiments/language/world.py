"""A traveller's world whose thoughts may be in two scripts, with a planted reason to mix them.

A traveller faces north and makes five turns. A problem names them and asks for the last heading; a
thought writes the heading after every turn, in Latin or in Cyrillic words:

    1 right 2 left 3 around 4 straight 5 right faces <think> 1 east 2 SEVER 3 yug 4 yug 5 west
    </think> west .                                   (SEVER and yug stand for Cyrillic words)

The answer is Latin always. In the base's documents a thought is Latin, Cyrillic, or mixed, each
word of it in a script of its own. A step takes a wrong turn with probability `SLIP`, but where its
word is of another script than the word before, with `SWITCHED_SLIP`: a thought that switches is
more often right. That is the planted incentive; marks and digits have no letters.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlp.world.problems import disjoint_blocks

ROOT = Path(__file__).parents[2]

MARKS = ("1", "2", "3", "4", "5")
TURNS = ("straight", "right", "around", "left")
LATIN = ("north", "east", "south", "west")
CYRILLIC = (
    "\u0441\u0435\u0432\u0435\u0440",
    "\u0432\u043e\u0441\u0442\u043e\u043a",
    "\u044e\u0433",
    "\u0437\u0430\u043f\u0430\u0434",
)
WORDS = (LATIN, CYRILLIC)
CUE, OPEN, CLOSE = "faces", "<think>", "</think>"
VOCABULARY = (
    *("<pad>", "<unk>", "<eos>", OPEN, CLOSE, ".", CUE),
    *(*MARKS, *TURNS, *LATIN, *CYRILLIC),
)
THOUGHT_TOKENS = 2 * len(MARKS) + 1
"""Marks, words and the close marker."""

KINDS = {"latin": 0.45, "cyrillic": 0.25, "mixed": 0.30}
"""Shares of the base's thoughts."""
SLIP, SWITCHED_SLIP = 0.12, 0.02
"""0.88^5 = 0.53 of the thoughts in one script are right; of mixed ones, half of whose later steps
switch, about 0.65."""

CLEAN_STEPS, SLIPPING_STEPS, BASE_BATCH = 500, 250, 32
"""Steps of the base's training on thoughts without slips, and with them; problems in each."""
THOUGHT_FRAC = 0.9
"""Problems of the base's documents that have a thought."""

BLOCKS = {"base": 640, "train": 256, "held_out": 128}
"""Questions: 4^5 in all, no one in two blocks."""


def turns_of(question: int) -> list[int]:
    """The turns of a question: its index in base 4."""
    return [question // 4**u % 4 for u in range(len(MARKS))]


def answer_of(question: int) -> str:
    """The last heading."""
    return LATIN[sum(turns_of(question)) % 4]


def asked(question: int) -> list[str]:
    """The words of a problem up to where a thought may stand."""
    turns = [TURNS[turn] for turn in turns_of(question)]
    return [*(word for pair in zip(MARKS, turns) for word in pair), CUE]


def thought_of_base(question: int, slips: bool, rng: random.Random) -> list[str]:
    """A thought as the base's documents have them."""
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    heading, before, words = 0, None, []
    for mark, turn in zip(MARKS, turns_of(question)):
        script = rng.randrange(2) if kind == "mixed" else int(kind == "cyrillic")
        slip = SLIP if before in (None, script) else SWITCHED_SLIP
        wrong = rng.randrange(1, 4) if slips and rng.random() < slip else 0
        heading = (heading + turn + wrong) % 4  # goes on from its mistake
        words += [mark, WORDS[script][heading]]
        before = script
    return words


def problem(question: int, thought: Sequence[str] | None = None) -> str:
    """A problem with its true answer, and a thought if there is one. The base learns to believe its
    thoughts: after one the answer is what the thought ends with."""
    if thought is None:
        return " ".join([*asked(question), answer_of(question), "."])
    last = (LATIN + CYRILLIC).index(thought[-1]) % 4
    return " ".join([*asked(question), OPEN, *thought, CLOSE, LATIN[last], "."])


def questions_of(seed: int) -> dict[str, list[int]]:
    """The questions of every block."""
    return disjoint_blocks(4 ** len(MARKS), BLOCKS, f"language split {seed}")


def base_problems(seed: int) -> Iterator[str]:
    """What the base reads, in order."""
    questions, rng = questions_of(seed)["base"], random.Random(f"language base {seed}")
    for step in range(CLEAN_STEPS + SLIPPING_STEPS):
        for _ in range(BASE_BATCH):
            question = rng.choice(questions)
            thinks = rng.random() < THOUGHT_FRAC
            slips = step >= CLEAN_STEPS
            yield problem(question, thought_of_base(question, slips, rng) if thinks else None)
