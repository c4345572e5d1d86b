"""Thoughts put into the tokens of a document, and where they and their targets then stand.

Pure arrays: which thoughts are put where is not known here.

Dimensions
    P  document tokens;  I  tokens that are put in;  H  target tokens
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Insert:
    """A thought with its markers, to be put before a position."""

    position: int
    """Index t of the document's token that it stands before."""
    opening: np.ndarray
    """int64, the open marker."""
    sampled: np.ndarray
    """int64, what the model has written: the thought, with its close marker where it ended by
    itself."""
    forced: np.ndarray
    """int64, the close marker of a thought that reached its budget; else nothing."""

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([self.opening, self.sampled, self.forced]).astype(np.int64)

    @property
    def is_sampled(self) -> np.ndarray:
        """bool, of its tokens: which the model has written."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        mask[len(self.opening) : len(self.opening) + len(self.sampled)] = True
        return mask


@dataclass(frozen=True, slots=True)
class Spliced:
    """A document with thoughts in it."""

    tokens: np.ndarray
    """[P + I] int64."""
    is_thought: np.ndarray
    """[P + I] bool, tokens of a thought that the model has written. A marker that is put there by
    force is none: no run trains it."""
    is_target: np.ndarray
    """[P + I] bool, the H tokens of the document behind each thought."""


def splice_in(document: np.ndarray, inserts: list[Insert], horizon: int) -> Spliced:
    """Put thoughts into a document.

    Args:
        document: [P] int64.
        inserts: in the order of their positions, no two at one.
        horizon: H. Where another thought stands among the targets of one, they go on behind it.
    """
    targets = np.zeros(len(document), dtype=bool)
    for insert in inserts:
        targets[insert.position : insert.position + horizon] = True

    edges = [0, *(insert.position for insert in inserts), len(document)]
    tokens, is_thought, is_target = [], [], []
    for index, (start, stop) in enumerate(zip(edges, edges[1:])):
        put = [inserts[index]] if index < len(inserts) else []
        nothing = [np.zeros(len(insert.tokens), dtype=bool) for insert in put]
        tokens += [document[start:stop], *(insert.tokens for insert in put)]
        is_thought += [np.zeros(stop - start, dtype=bool), *(insert.is_sampled for insert in put)]
        is_target += [targets[start:stop], *nothing]
    return Spliced(*(np.concatenate(parts) for parts in (tokens, is_thought, is_target)))


def spans_of(mask: np.ndarray) -> list[list[int]]:
    """[start, stop] of each run of True."""
    edges = np.diff(np.pad(mask.astype(np.int8), 1))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1).tolist()
