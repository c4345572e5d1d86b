"""What both worlds have: a traveller's turns, and where they lead.

A traveller faces north and makes six turns. A problem names the turns and asks for the last
heading:

    one right two left three around four straight five right six left faces south .

With right = 1, around = 2, left = 3 the headings are running sums modulo 4,

    heading_u = heading_{u-1} + turn_u  (mod 4),      heading_0 = north = 0,

so the word after `faces` is a sum of six, of which any five say nothing, while in a thought,
between `<think>` and `</think>`, that writes the heading after every turn,

    <think> one east two north three south four south five west six south </think>

each word is one addition away from the words before it.

There are 4^6 = 4096 questions. One permutation of them, keyed by the seed, is cut into three
disjoint blocks: 2560 for `base_train`, 1024 for `train`, 512 for `held_out`. A document holds
questions of one block only, so no question of one file is in another.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

MARKS = ("one", "two", "three", "four", "five", "six")
TURNS = ("straight", "right", "around", "left")
HEADINGS = ("north", "east", "south", "west")
CUE = "faces"
OPEN, CLOSE = "<think>", "</think>"
VOCABULARY = ("<pad>", "<unk>", "<eos>", OPEN, CLOSE, ".", CUE, *MARKS, *TURNS, *HEADINGS)

PROBLEMS_PER_DOCUMENT = 2
BLOCKS = {"base_train": 2560, "train": 1024, "held_out": 512}
"""Questions per split; the sum is every question there is."""
TRAIN_EPOCHS = 4
"""Times that each question of the train block appears in train.jsonl, in different company."""


def turns_of(question: int) -> list[int]:
    """The six turns of a question: its index written in base 4, lowest digit first."""
    return [question // 4**u % 4 for u in range(len(MARKS))]


def headings_after(turns: Sequence[int]) -> list[int]:
    """The heading after every turn: running sums modulo 4, from north."""
    headings, heading = [], 0
    for turn in turns:
        heading = (heading + turn) % 4
        headings.append(heading)
    return headings


def marked(words: Sequence[str]) -> list[str]:
    """Six words, each after its mark."""
    return [word for pair in zip(MARKS, words) for word in pair]


def echo(turns: Sequence[int]) -> list[str]:
    """The turns, as the question has them."""
    return marked([TURNS[turn] for turn in turns])


def computed(turns: Sequence[int]) -> list[str]:
    """The heading after every turn."""
    return marked([HEADINGS[heading] for heading in headings_after(turns)])


def problem_text(turns: Sequence[int], thought: Sequence[str] | None = None) -> str:
    """One problem with its true answer, and the words of a thought if there is one."""
    thinking = [] if thought is None else [OPEN, *thought, CLOSE]
    answer = HEADINGS[headings_after(turns)[-1]]
    return " ".join([*echo(turns), CUE, *thinking, answer, "."])


def split_questions(seed: int) -> dict[str, list[int]]:
    """The question indices of every split: disjoint blocks of one permutation."""
    return disjoint_blocks(4 ** len(MARKS), BLOCKS, f"split {seed}")


def disjoint_blocks(count: int, sizes: Mapping[str, int], key: str) -> dict[str, list[int]]:
    """Blocks of so many indices each, cut from one permutation of `count`, keyed by a text."""
    indices = list(range(count))
    random.Random(key).shuffle(indices)
    blocks, start = {}, 0
    for name, size in sizes.items():
        blocks[name] = indices[start : start + size]
        start += size
    return blocks


def plain_documents(questions: Sequence[int], epochs: int, rng: random.Random) -> Iterator[str]:
    """Documents without thoughts in which every question appears `epochs` times."""
    for _ in range(epochs):
        order = rng.sample(questions, len(questions))
        for start in range(0, len(order), PROBLEMS_PER_DOCUMENT):
            group = order[start : start + PROBLEMS_PER_DOCUMENT]
            yield " ".join(problem_text(turns_of(question)) for question in group)
