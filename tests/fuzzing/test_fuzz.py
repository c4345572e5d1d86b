"""Readers of files that a stranger may have made, on inputs that nobody meant; `tests/fuzzing` says
how, and searches longer."""

import pytest

from rlp.data import unpacked
from tests.fuzzing.search import READERS, search

INPUTS = {
    "config": 120,
    "data": 300,
    "checkpoint": 300,
    "resume": 60,
    "run folder": 30,
    "figures": 4,
    "thought format": 80,
    "benchmarks": 60,
}
"""Seconds each on one core; the same inputs in every run."""


@pytest.mark.parametrize("name", READERS)
def test_no_input_breaks_a_reader(name: str, monkeypatch: pytest.MonkeyPatch):
    """A value, an error of our own, or a counted skip: never another exception, never a change of
    the input. Each end is reached."""
    monkeypatch.setattr(unpacked, "UNPACKED", None)  # put back afterwards; `search` has its own
    ends = search(name, INPUTS[name])
    assert (
        sum(ends.values()) >= INPUTS[name]
        and ends.total() > ends["read"] + ends["read by all"] > 0
        or name == "figures"
    ), ends
