"""Position selectors: which K of the positions that may be chosen are predicted after a thought.

A selector is a callable of one `Choice`, which is about one document, and returns positions out of
its candidates. It sees no other document and no rank, and its random numbers are keyed by the
document, so what it chooses does not depend on micro-batches, ranks or resumes.

Dimensions
    P  tokens of the document;  C  candidates;  K  positions wanted
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlp.data.documents import Document
from rlp.process.outside import Part, open_part

STATISTICS = ("entropy", "surprisal")
"""What a selector may need: fields of `Choice`."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One document, and what a selector chooses from."""

    document: Document
    candidates: np.ndarray
    """[C] int64, ascending: the positions that may be chosen, more than K of them."""
    count: int
    """K, the most that may be chosen."""
    noise: np.random.Generator
    """Random numbers of this document in this step."""
    entropy: np.ndarray | None = None
    """[P] float32, nats: entropy of the policy's no-think prediction of the token at each index;
    index 0, which has no context, is 0. None unless the selector needs it."""
    surprisal: np.ndarray | None = None
    """[P] float32, nats: -log p(x_t | x_<t) under the policy, likewise."""


class Selector(Protocol):
    """Chooses positions of one document.

    `needs` names the statistics that it reads, `entropy` or `surprisal`; each costs a forward pass
    of the documents.
    """

    needs: tuple[str, ...] = ()

    def __call__(self, choice: Choice) -> np.ndarray:
        """1 to K different candidates, in any order."""


class Uniform:
    """K candidates at random, all alike (paper, section 3)."""

    needs: tuple[str, ...] = ()

    def __call__(self, choice: Choice) -> np.ndarray:
        return choice.noise.choice(choice.candidates, size=choice.count, replace=False)


class MostUncertain:
    """The K candidates whose token the policy is least sure of, the earlier one of equals."""

    needs = ("entropy",)

    def __call__(self, choice: Choice) -> np.ndarray:
        return largest(choice.entropy, choice)


class MostSurprising:
    """The K candidates whose token the policy thinks least probable, the earlier one of equals."""

    needs = ("surprisal",)

    def __call__(self, choice: Choice) -> np.ndarray:
        return largest(choice.surprisal, choice)


def largest(score: np.ndarray, choice: Choice) -> np.ndarray:
    """The K candidates with the largest score [P], the earlier one of equals."""
    ranked = choice.candidates[np.argsort(-score[choice.candidates], kind="stable")]
    return ranked[: choice.count]


SELECTORS = {
    "uniform": Uniform,
    "marker": Uniform,  # the candidates already stand right after the marker
    "entropy": MostUncertain,
    "surprisal": MostSurprising,
}
"""By `position.selector`."""


def open_selector(name: str, given: Selector | None = None) -> Part:
    """The selector that a config names (`open_part`)."""
    return open_part("position.selector", name, SELECTORS, STATISTICS, given)


def chosen_by(selector: Part, choice: Choice) -> np.ndarray:
    """Positions [<= K] that a selector chooses, ascending.

    Raises:
        PartError: a selector from outside chose what may not be chosen.
    """
    positions = selector(choice)
    if selector.is_outside:
        refuse_choice(selector, choice, positions)
    return np.sort(np.asarray(positions, dtype=np.int64))


def refuse_choice(selector: Part, choice: Choice, positions: object) -> None:
    """Refuse a choice of anything but 1 to K different candidates."""
    expected = (
        f"1 to {choice.count} different whole numbers out of the {len(choice.candidates)} of"
        " `choice.candidates`, in one dimension"
    )
    found = np.asarray(positions)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise selector.refuse(f"{found.dtype} of shape {list(found.shape)}", expected)
    if not 1 <= len(found) <= choice.count or len(set(found.tolist())) < len(found):
        raise selector.refuse(f"{found.tolist()[:8]}", expected)
    beyond = sorted(set(found.tolist()) - set(choice.candidates.tolist()))
    if beyond:
        raise selector.refuse(f"position {beyond[0]}, which is no candidate", expected)
