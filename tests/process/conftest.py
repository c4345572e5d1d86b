"""Fixtures of the tests of `rlp/process`."""

import signal

import pytest

from rlp.process.preemption import SIGNALS


@pytest.fixture(autouse=True)
def handlers():
    """A run that was asked to stop ignores signals on its way out; the tests have their own
    back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
