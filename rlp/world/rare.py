"""The rare-thought world: a useful thought has to be found, and no temperature finds it.

Thoughts are of two kinds, of the same length. An *echo* repeats the turns and says nothing that
the question does not:

    <think> one right two left three around four straight five right six left </think>

A *computing* thought writes the heading after every turn:

    <think> one east two north three south four south five west six south </think>

A small share of the base's thoughts computes. The two part at the second word, and the echo is the
more probable one there, so a lower temperature gives it all the mass; a higher one gives the other
a little more, and noise with it.
"""

import random
from collections.abc import Iterator, Sequence

from rlp.world.problems import PROBLEMS_PER_DOCUMENT, computed, echo, problem_text, turns_of

CLEAN_DOCUMENTS = 19_200
"""First part of base_train: 600 steps of 32. Computing thoughts only; the model learns them after
200 to 500 steps."""
CLEAN_THOUGHT_FRAC = 0.9
"""Problems with a thought in the first part."""
MIXED_DOCUMENTS = 9_600
"""Second part: 300 steps of 32, in which most thoughts are echoes."""
MIXED_THOUGHT_FRAC = 0.4
"""Problems with a thought in the second part. With four headings and an open marker to choose from
the word after `faces` is less certain than a turn, one of four: 1.50 nats and 1.39."""
COMPUTING_SHARE = 0.03
"""Of the thoughts of the second part."""


def base_documents(
    questions: Sequence[int], rng: random.Random, share: float = COMPUTING_SHARE
) -> Iterator[str]:
    """base_train.jsonl, in order: computing thoughts, then the mixture in which they are rare."""
    yield from _documents(questions, CLEAN_DOCUMENTS, CLEAN_THOUGHT_FRAC, 1.0, rng)
    yield from _documents(questions, MIXED_DOCUMENTS, MIXED_THOUGHT_FRAC, share, rng)


def _documents(
    questions: Sequence[int], count: int, thought_frac: float, share: float, rng: random.Random
) -> Iterator[str]:
    """`count` documents of random problems, a fraction `thought_frac` of them with a thought, of
    which `share` compute."""
    for _ in range(count):
        problems = []
        for _ in range(PROBLEMS_PER_DOCUMENT):
            turns = turns_of(rng.choice(questions))
            thought = None
            if rng.random() < thought_frac:
                thought = (computed if rng.random() < share else echo)(turns)
            problems.append(problem_text(turns, thought))
        yield " ".join(problems)
