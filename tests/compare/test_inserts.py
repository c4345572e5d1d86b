"""Thoughts put into a document, by hand."""

import numpy as np

from rlp.compare.inserts import Insert, spans_of, splice_in

NOTHING, CLOSE = np.array([], dtype=np.int64), np.array([3])


def insert(position: int, sampled: list[int], forced: np.ndarray = NOTHING) -> Insert:
    return Insert(position, np.array([2]), np.array(sampled), forced)


def test_thoughts_stand_before_their_positions_and_losses_where_the_model_writes():
    """Two in one document: the first ended by itself, with its close marker 3; the second was cut,
    and its close marker is nobody's."""
    document = np.array([10, 11, 12, 13, 14])
    spliced = splice_in(document, [insert(1, [20, 3]), insert(3, [21, 22], CLOSE)], horizon=1)
    assert spliced.tokens.tolist() == [10, 2, 20, 3, 11, 12, 2, 21, 22, 3, 13, 14]
    assert spans_of(spliced.is_thought) == [[2, 4], [7, 9]]
    assert spans_of(spliced.is_target) == [[4, 5], [10, 11]]
    assert spans_of(spliced.is_thought | spliced.is_target) == [[2, 5], [7, 9], [10, 11]]


def test_targets_go_on_behind_the_next_thought():
    """Horizon 3 with thoughts one token apart: the targets of the first are tokens 1 to 3, and the
    second stands among them."""
    document = np.array([10, 11, 12, 13, 14])
    spliced = splice_in(document, [insert(1, [3]), insert(2, [3])], horizon=3)
    assert spliced.tokens.tolist() == [10, 2, 3, 11, 2, 3, 12, 13, 14]
    assert spans_of(spliced.is_target) == [[3, 4], [6, 9]]


def test_a_document_without_thoughts_is_itself():
    spliced = splice_in(np.array([10, 11]), [], horizon=1)
    assert spliced.tokens.tolist() == [10, 11]
    assert spans_of(spliced.is_thought | spliced.is_target) == []
