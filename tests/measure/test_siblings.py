"""Siblings that are alike: two numbers by hand, and the alarm."""

import pytest
import torch

from rlp.measure.monitor import Watch
from rlp.measure.siblings import watch_siblings
from rlp.process.ranks import start_ranks
from rlp.process.tally import Tally


def watched(groups: list[list[list[int]]]) -> dict[str, float]:
    """What is said of thoughts [M, G] of token lists; the padding behind them is a token too."""
    lengths = torch.tensor([[len(thought) for thought in group] for group in groups])
    tokens = torch.full((*lengths.shape, int(lengths.max()) + 2), 20)
    for m, group in enumerate(groups):
        for g, thought in enumerate(group):
            tokens[m, g, : len(thought)] = torch.tensor(thought)
    runs = tokens[..., :-1] * 1000 + tokens[..., 1:]
    inside = torch.arange(runs.shape[2]) + 2 <= lengths[..., None]
    tally = Tally()
    watch_siblings(tally, tokens, lengths, runs, inside)
    return tally.reduce(start_ranks())


def test_duplicates_are_pairs_of_siblings_that_are_the_same_thought():
    """Of three thoughts two are the same: one pair of three. A thought is not the same as its
    beginning, nor as the same tokens in another order, nor as another position's; two that closed
    at once are."""
    groups = [
        [[20, 21], [20, 21], [20, 21, 22]],
        [[20, 21], [21, 20], [20, 21, 0]],
        [[], [], [0]],
    ]
    assert [watched([group])["thought/duplicates_frac"] for group in groups] == [
        pytest.approx(1 / 3),
        0,
        pytest.approx(1 / 3),
    ]
    assert watched(groups)["thought/duplicates_frac"] == pytest.approx(2 / 9)


def test_overlap_is_the_share_of_pairs_that_a_sibling_has_too():
    """Of the first thought's pairs 20-21 and 21-22 its siblings have one and none; a pair that a
    thought has twice counts once; thoughts without a pair are left out, but are siblings."""
    one = [[20, 21, 22], [20, 21, 20, 21], [23]]
    # First: (1/2 + 0) / 2. Second, whose pairs are 20-21 and 21-20: the same. Third: none.
    assert watched([one])["thought/sibling_overlap_frac"] == pytest.approx(1 / 4)
    same, apart, nothing = (
        [[20, 21, 22]] * 2,
        [[20, 21], [21, 20]],
        [[20], []],
    )
    found = [watched([group]).get("thought/sibling_overlap_frac") for group in (same, apart)]
    assert found == [1, 0]
    assert "thought/sibling_overlap_frac" not in watched([nothing])


@pytest.mark.parametrize("helping", [None, 0.0, 0.89])
def test_siblings_that_collapse_onto_one_another_are_said_once(helping):
    """At the fifth step in a row, where they are not known to help; a lower step begins the count
    again."""
    watch = Watch()
    known = {} if helping is None else {"gain/positive_frac": helping}
    steps = [0.95] * 4 + [0.94] + [0.99] * 9
    said = [watch.see({"thought/duplicates_frac": value} | known) for value in steps]
    assert [index for index, alarms in enumerate(said) if alarms] == [9]
    assert "99% of the pairs of thoughts of a position in the last 5 steps" in said[9][0]
    assert "thought.temperature" in said[9][0]


def test_siblings_that_agree_on_what_helps_are_not_alarming():
    """A task with one right thought, which all have found."""
    step = {"thought/duplicates_frac": 1.0, "gain/positive_frac": 0.9}
    watch = Watch()
    assert not any(watch.see(step) for _ in range(20))
