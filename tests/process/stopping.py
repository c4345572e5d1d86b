"""Runs that stop, and are continued."""

import threading
import time

from rlp.process.exit_codes import DONE, PREEMPTED
from rlp.process.preemption import steady_time
from tests.faults.harness import LIMIT_S, SAME_BYTES


def stops(harness, name: str, fault: str, *, ranks: int = 1, settings: dict | None = None) -> dict:
    """The answer of a run that ends with exit code 75 on every rank."""
    answer = harness.start(harness.folder / name, ranks=ranks, fault=fault, settings=settings)
    assert answer["codes"] == [PREEMPTED] * ranks, answer["text"]
    assert "run.resume=auto" in answer["text"]
    return answer


def assert_continues_as_if_nothing_had_been(harness, name: str, *, ranks: int = 1) -> None:
    """Continued, the run leaves what an uninterrupted one leaves, byte for byte."""
    answer = harness.start(harness.folder / name, ranks=ranks)
    assert answer["codes"] == [DONE] * ranks, answer["text"]
    for file in SAME_BYTES:
        assert (harness.folder / name / file).read_bytes() == (
            harness.reference(ranks, {}) / file
        ).read_bytes(), file


class Looks:
    """In place of launchers: how often the thread has looked for them."""

    handed_over = True

    def __init__(self) -> None:
        self._seen = threading.Semaphore(0)

    def gone(self) -> None:
        self._seen.release()

    def wait(self) -> None:
        """Until all that was sent to the thread before has been dealt with: the look that goes on
        meanwhile, and a whole one."""
        while self._seen.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._seen.acquire(timeout=LIMIT_S)


def wait_for(holds, limit_s: float = LIMIT_S) -> None:
    """Until it holds."""
    end = steady_time() + limit_s
    while not holds():
        assert steady_time() < end, "waited in vain"
        time.sleep(0.05)
