"""Whether a written answer is the right one, by math-verify in processes that can be killed.

Symbolic comparison of what a model wrote may take for ever, inside C code too. Each answer is
therefore checked in a worker process with an alarm whose default action ends the process, wherever
it hangs; the pool starts another worker and the answer counts as wrong. Nothing here imports torch,
so workers start fast.
"""

import importlib
import importlib.util
import logging
import multiprocessing
import os
import queue
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass

from rlp.config import ConfigError

Check = Callable[[str, str], bool | None]
"""(answer, reference) to right, wrong, or None: nothing in the answer can be read."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer."""

    right: bool
    outcome: str
    """`checked`; or why it counts as wrong: `unparseable` (nothing in it reads as mathematics),
    `timeout`, `crash`."""


def final_part(text: str) -> str:
    """What stands after the last `####`, the mark of GSM8K's answers; the whole text where there is
    none."""
    return text.rpartition("####")[2].strip()


def same_answer(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same mathematics (`1/2`, `0.5` and `\\frac{1}{2}` are), as
    `Check`."""
    from math_verify import parse, verify

    answer, reference = final_part(answer), final_part(reference)
    if answer == reference:
        return True
    given = parse(answer, parsing_timeout=None)
    if not given:
        return None
    return bool(verify(_read_reference(reference), given, timeout_seconds=None))


def _read_reference(text: str) -> list:
    """The reference is one expression: as LaTeX it is boxed, so that no part of it is taken for the
    whole."""
    import sympy
    from math_verify import parse

    if "e" in text.lower():
        with suppress(ValueError):
            if float(text):
                return [sympy.Float(text)]
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None)


def _prepare_worker(memory_bytes: int) -> None:
    """Import what checks need, so that no answer's time pays for it, and bound memory: a power
    tower is soon gigabytes."""
    importlib.import_module("math_verify")
    # Ctrl-C is for the command, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _check_in_time(check: Check, answer: str, reference: str, timeout_s: float) -> bool | None:
    """In a worker: the check, or the end of this process."""
    # The default action of SIGALRM ends the process from the kernel; a handler in Python would wait
    # for C code to return.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        return check(answer, reference)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class AnswerPool:
    """Checks answers side by side. A context manager: the workers end with it."""

    def __init__(
        self,
        *,
        workers: int | None = None,
        timeout_s: float = 10.0,
        memory_bytes: int = 4 << 30,
        check: Check = same_answer,
    ) -> None:
        """
        Args:
            workers: processes; None is one per core, at most 8.
            timeout_s: seconds for one answer.
            memory_bytes: address space of one worker; an answer that needs more is a crash.
            check: what compares, importable by name in another process.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "math-verify is not installed, and answers are checked with it. Write: pip install"
                " 'rlp-pretraining[eval]'."
            )
        self._timeout_s, self._memory_bytes, self._check = timeout_s, memory_bytes, check

        # Each lane is a pool of one process, so that a death names its answer.
        self._lanes: queue.Queue[ProcessPoolExecutor | None] = queue.Queue()
        self._num_lanes = workers or min(8, os.cpu_count() or 1)
        for _ in range(self._num_lanes):
            self._lanes.put(None)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["math_verify"])

    def __enter__(self) -> "AnswerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(self._num_lanes):
            lane = self._lanes.get()
            if lane is not None:
                lane.shutdown()

    def verdicts(self, answers: list[tuple[str, str]]) -> list[Verdict]:
        """The verdict on each (answer, reference), in order."""
        with ThreadPoolExecutor(self._num_lanes) as threads:
            return list(threads.map(self._verdict, answers))

    def _verdict(self, pair: tuple[str, str]) -> Verdict:
        lane = self._lanes.get() or self._open_lane()
        start = time.monotonic()
        try:
            right = lane.submit(_check_in_time, self._check, *pair, self._timeout_s).result()
            return Verdict(bool(right), "unparseable" if right is None else "checked")
        except BrokenProcessPool:
            lane.shutdown()
            lane = None
            late = time.monotonic() - start >= self._timeout_s
            return Verdict(False, "timeout" if late else "crash")
        # What a symbolic library raises on a model's text can not be listed.
        except Exception as error:
            logging.getLogger(__name__).debug("a check raised %r", error)
            return Verdict(False, "crash")
        finally:
            self._lanes.put(lane)

    def _open_lane(self) -> ProcessPoolExecutor:
        lane = ProcessPoolExecutor(
            1, mp_context=self._context, initializer=_prepare_worker, initargs=(self._memory_bytes,)
        )
        lane.submit(os.getpid).result()  # it is ready: starting is not counted as checking
        return lane
