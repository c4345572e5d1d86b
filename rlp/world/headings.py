"""The heading world: right thoughts with slips, which a lower temperature leaves out.

The base's thoughts all compute; a step of them slips with probability 0.1, so the right step is
the most probable one everywhere, and reading the untrained base at temperature 0.3 makes it right
every time. What is trained here is sharpened, not found: the world stays as the example of that.
"""

import random
from collections.abc import Iterator, Sequence

from rlp.world.problems import PROBLEMS_PER_DOCUMENT, computed, problem_text, turns_of

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


def slipped(turns: Sequence[int], slip: float, rng: random.Random) -> list[int]:
    """The turns as a careless traveller takes them: each is replaced with probability `slip` by a
    wrong one.

    A thought written from these goes on from its mistake, as a sampled thought does.
    """
    return [(turn + rng.randrange(1, 4)) % 4 if rng.random() < slip else turn for turn in turns]


def base_documents(questions: Sequence[int], rng: random.Random) -> Iterator[str]:
    """base_train.jsonl, in order: clean thoughts, then thoughts with slips."""
    yield from _documents(questions, CLEAN_DOCUMENTS, CLEAN_THOUGHT_FRAC, 0.0, rng)
    yield from _documents(questions, SLIPPING_DOCUMENTS, SLIPPING_THOUGHT_FRAC, SLIP, rng)


def _documents(
    questions: Sequence[int], count: int, thought_frac: float, slip: float, rng: random.Random
) -> Iterator[str]:
    """`count` documents of random problems, a fraction `thought_frac` of them with a thought."""
    for _ in range(count):
        problems = []
        for _ in range(PROBLEMS_PER_DOCUMENT):
            turns = turns_of(rng.choice(questions))
            thinks = rng.random() < thought_frac
            problems.append(
                problem_text(turns, computed(slipped(turns, slip, rng)) if thinks else None)
            )
        yield " ".join(problems)
