"""The heading world: documents whose next word needs a thought, from one seed.

A traveller faces north and makes six turns. A problem names the turns and asks for the last
heading:

    one right two left three around four straight five right six left faces south .

A thought, between `<think>` and `</think>`, writes the heading after every turn:

    <think> one east two north three south four south five west six south </think>

With right = 1, around = 2, left = 3 the headings are running sums modulo 4,

    heading_u = heading_{u-1} + turn_u  (mod 4),      heading_0 = north = 0,

so each word of the thought is one addition away from the words before it, while the word after
`faces` without a thought is a sum of six.

There are 4^6 = 4096 questions. One permutation of them, keyed by the seed, is cut into three
disjoint blocks: 2560 for `base_train`, 1024 for `train`, 512 for `held_out`. A document holds
questions of one block only, so no question of one file is in another.
"""

import random
from collections.abc import Iterator, Sequence

MARKS = ("one", "two", "three", "four", "five", "six")
TURNS = ("straight", "right", "around", "left")
HEADINGS = ("north", "east", "south", "west")
CUE = "faces"
OPEN, CLOSE = "<think>", "</think>"
VOCABULARY = ("<pad>", "<unk>", "<eos>", OPEN, CLOSE, ".", CUE, *MARKS, *TURNS, *HEADINGS)

PROBLEMS_PER_DOCUMENT = 2
BLOCKS = {"base_train": 2560, "train": 1024, "held_out": 512}
"""Questions per split; the sum is every question there is."""

CLEAN_DOCUMENTS = 22_400
"""First part of base_train: 700 steps of 32. Right thoughts only; the model learns them after 250
to 500 steps."""
CLEAN_THOUGHT_FRAC = 0.8
"""Problems with a thought in the first part. The rest keeps the prediction without a thought in
training."""
SLIPPING_DOCUMENTS = 9_600
"""Second part of base_train: 300 steps of 32."""
SLIPPING_THOUGHT_FRAC = 0.5
SLIP = 0.1
"""Chance that a step of a thought in the second part takes a wrong turn; 0.9^6 = 0.53 of thoughts
are then right."""
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


def slipped(turns: Sequence[int], slip: float, rng: random.Random) -> list[int]:
    """The turns as a careless traveller takes them: each is replaced with probability `slip` by a
    wrong one.

    A thought written from these goes on from its mistake, as a sampled thought does.
    """
    return [(turn + rng.randrange(1, 4)) % 4 if rng.random() < slip else turn for turn in turns]


def problem_text(turns: Sequence[int], thought_turns: Sequence[int] | None = None) -> str:
    """One problem with its true answer, and the thought that `thought_turns` lead to if there is
    one."""
    question = [word for mark, turn in zip(MARKS, turns) for word in (mark, TURNS[turn])]
    thought: list[str] = []
    if thought_turns is not None:
        steps = zip(MARKS, headings_after(thought_turns))
        thought = [
            OPEN,
            *(word for mark, heading in steps for word in (mark, HEADINGS[heading])),
            CLOSE,
        ]
    return " ".join([*question, CUE, *thought, HEADINGS[headings_after(turns)[-1]], "."])


def split_questions(seed: int) -> dict[str, list[int]]:
    """The question indices of every split: disjoint blocks of one permutation."""
    questions = list(range(4 ** len(MARKS)))
    random.Random(f"split {seed}").shuffle(questions)
    blocks, start = {}, 0
    for name, size in BLOCKS.items():
        blocks[name] = questions[start : start + size]
        start += size
    return blocks


def documents_with_thoughts(
    questions: Sequence[int], count: int, thought_frac: float, slip: float, rng: random.Random
) -> Iterator[str]:
    """`count` documents of random problems, a fraction `thought_frac` of them with a thought."""
    for _ in range(count):
        problems = []
        for _ in range(PROBLEMS_PER_DOCUMENT):
            turns = turns_of(rng.choice(questions))
            thinks = rng.random() < thought_frac
            problems.append(problem_text(turns, slipped(turns, slip, rng) if thinks else None))
        yield " ".join(problems)


def plain_documents(questions: Sequence[int], epochs: int, rng: random.Random) -> Iterator[str]:
    """Documents without thoughts in which every question appears `epochs` times."""
    for _ in range(epochs):
        order = rng.sample(questions, len(questions))
        for start in range(0, len(order), PROBLEMS_PER_DOCUMENT):
            group = order[start : start + PROBLEMS_PER_DOCUMENT]
            yield " ".join(problem_text(turns_of(question)) for question in group)


def make_documents(seed: int) -> dict[str, list[str]]:
    """The documents of every split, in the order of their file."""
    questions = split_questions(seed)
    rng = {name: random.Random(f"{name} {seed}") for name in BLOCKS}
    base, base_rng = questions["base_train"], rng["base_train"]
    return {
        "base_train": [
            *documents_with_thoughts(base, CLEAN_DOCUMENTS, CLEAN_THOUGHT_FRAC, 0.0, base_rng),
            *documents_with_thoughts(
                base, SLIPPING_DOCUMENTS, SLIPPING_THOUGHT_FRAC, SLIP, base_rng
            ),
        ],
        "train": list(plain_documents(questions["train"], TRAIN_EPOCHS, rng["train"])),
        "held_out": list(plain_documents(questions["held_out"], 1, rng["held_out"])),
    }
