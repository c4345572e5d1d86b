"""When a rank falls silent: a stall is found and shown on every rank, a lost peer is said in one
line.

Whatever makes progress marks it (`mark`), and while a library does a long thing that marks nothing,
what the process computes, reads or writes is progress (`working`). Without a mark for
`run.watchdog_s` seconds, a rank writes the stack of each of its threads, with what it was doing, to
stderr and to `logs/rank_N.log`, leaves word for the other ranks, which do the same, and the
processes end with `STALLED`. A stalled rank's peers wait in a collective, and their stacks name it.

Time in which the process itself stands still (SIGSTOP, Ctrl-Z, a machine without a free moment) is
no stall of its own: only its peers, which wait for it, count that. A rank that wakes up and finds
them gone says how long it stood still.
"""

import faulthandler
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

import psutil
import torch.distributed as dist

from rlp.config import ConfigError, RunConfig
from rlp.process import watchdog_process
from rlp.process.exit_codes import STALLED
from rlp.process.files import FolderLostError, open_log
from rlp.process.poller import Poller
from rlp.process.ranks import LISTEN_S, PeerLost, Ranks, short_cause

WAKE_S = 10.0
"""A rank that was stopped has so long to find its peers gone by itself."""

WORK_FRAC, WORK_BYTES = 0.02, 2**16
"""From so much of a core, or of reads and writes between two looks on, a process works; its own
watching takes less."""

_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused|socket"
    r" closed|connection was likely closed",
    re.IGNORECASE,
)
"""What gloo and NCCL say where the process at the other end has ended."""


def _moved_bytes() -> int:
    """Read and written so far by this process; 0 where the system does not tell."""
    try:
        counters = psutil.Process().io_counters()
    except (psutil.Error, AttributeError):
        return 0
    return counters.read_chars + counters.write_chars


class Watchdog:
    """Watches while it is entered; outside, marks are for nobody."""

    def __init__(self, ranks: Ranks, config: RunConfig) -> None:
        self._ranks, self._limit_s = ranks, config.watchdog_s
        self._poll_s = min(1.0, self._limit_s / 4)
        self._log = Path(config.dir) / "logs" / f"rank_{ranks.rank}.log"
        self.phase = "start"
        """What the rank is doing."""
        self._marks = self._marks_seen = 0
        self._silent_s = self._stood_still_s = 0.0
        """Without a mark, so far; and the longest time in which the process did not run."""
        self._work_counts = False
        self._looked, self._cpu_s = time.monotonic(), time.process_time()
        self._moved_bytes = _moved_bytes()

    def mark(self, phase: str | None = None) -> None:
        """Progress: something was done, and what is done next, where that is another thing."""
        self._marks += 1
        self.phase = phase or self.phase

    @contextmanager
    def working(self, phase: str) -> Iterator[None]:
        """Around a long thing that a library does and marks nothing: what the process computes,
        reads or writes is progress."""
        self.mark(phase)
        before, self._work_counts = self._work_counts, True
        try:
            yield
        finally:
            self._work_counts = before
            self.mark()

    def __enter__(self) -> "Watchdog":
        self.mark()
        self._look()
        if self._limit_s > 0:
            self._outside = self._start_outside()
            self._others = self._ranks.words("stalled")
            self._poller = Poller("watchdog", self._poll_s, self._watch)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._limit_s > 0:
            self._poller.close(2 * self._poll_s)
            self._look()
            self._others.close()
            self._dismiss()

        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and _LOST_PEER.search(str(error))
        ):
            self._write("".join(traceback.format_exception(error)), stderr=False)
            why = "The rank that ended first says why."
            if self._has_overslept():
                why = f"{self._woken()}: the others have waited for it so long, and ended."
            raise PeerLost(
                f"rank {self._ranks.rank} of {self._ranks.world_size} lost another rank while in"
                f" {self.phase} ({short_cause(error)}). {why} Continue with run.resume=auto."
            ) from error

    def _start_outside(self) -> subprocess.Popen:
        """The process that watches this one from outside."""
        faulthandler.register(watchdog_process.SHOW, file=2, all_threads=True)
        command = [sys.executable, "-I", "-S", watchdog_process.__file__]
        numbers = [str(os.getpid()), str(self._limit_s), str(self._poll_s)]
        # In a session of its own: what a terminal sends to its processes is for the rank alone.
        return subprocess.Popen(
            [*command, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _dismiss(self) -> None:
        """End the process outside."""
        with suppress(OSError):
            self._outside.stdin.close()
        try:
            self._outside.wait(timeout=self._poll_s)
        except subprocess.TimeoutExpired:
            self._outside.kill()
            self._outside.wait()

    def _has_overslept(self) -> bool:
        """Whether the process has stood still for longer than its peers wait."""
        return self._stood_still_s > self._limit_s

    def _woken(self) -> str:
        return (
            f"This process stood still for {self._stood_still_s:.0f} s (it was stopped, or got no"
            f" time of a processor), longer than run.watchdog_s={self._limit_s:g}"
        )

    def _watch(self, polls: Iterator[bytes]) -> None:
        """The thread: until there is something to bark at."""
        for _ in polls:
            with suppress(OSError):  # somebody has killed the process outside; this one watches on
                os.write(self._outside.stdin.fileno(), b".")
            self._look()

            if self._silent_s > self._limit_s:
                self._bark(f"no progress for {self._silent_s:.0f} s in {self.phase}")
                self._others.leave()
                self._end()
                return
            if self._others.heard:
                # Whoever wakes up from being stopped meets the word that its peers left of it; the
                # main thread meets that they are gone.
                if self._has_overslept() and self._poller.closes_within(WAKE_S):
                    return
                self._bark(self._heard())
                self._end()
                return

    def _heard(self) -> str:
        """What a rank that did not stall itself has to say."""
        if self._has_overslept():
            return f"{self._woken()}: the others have given it up; it is in {self.phase}"
        return f"another rank has stalled; this one is in {self.phase} for {self._silent_s:.0f} s"

    def _end(self) -> None:
        """End the process, when the others have had the time to hear of it and to show theirs."""
        self._dismiss()
        self._poller.closes_within(3 * max(self._poll_s, LISTEN_S))
        os._exit(STALLED)

    def _look(self) -> None:
        """Count the time since the last look as silence, but not that in which the process did not
        run."""
        now, cpu_s = time.monotonic(), time.process_time()
        passed, used = now - self._looked, cpu_s - self._cpu_s
        self._looked, self._cpu_s = now, cpu_s
        if passed > 2 * self._poll_s and used < passed / 2:
            # This thread, which sleeps for `_poll_s`, was not woken: nothing of the process ran.
            self._stood_still_s = max(self._stood_still_s, passed - self._poll_s)
            passed = self._poll_s

        worked = False
        if self._work_counts:
            moved, before = _moved_bytes(), self._moved_bytes
            self._moved_bytes = moved
            worked = used > WORK_FRAC * passed or moved - before > WORK_BYTES

        marks, seen = self._marks, self._marks_seen
        self._marks_seen = marks
        if marks != seen or worked:
            self._silent_s = 0.0
        else:
            self._silent_s += passed

    def _bark(self, what: str) -> None:
        self._write(
            f"rank {self._ranks.rank} of {self._ranks.world_size}: {what}"
            f" (run.watchdog_s={self._limit_s:g}); its threads:\n",
            stderr=True,
            threads=True,
        )
        self._write(f"rank {self._ranks.rank}: ended with exit code {STALLED}\n", stderr=True)

    def _write(self, text: str, *, stderr: bool, threads: bool = False) -> None:
        if stderr:
            _show(text, sys.__stderr__, threads)
        # A disk that is full, or a folder that is gone, keeps nobody from ending.
        with suppress(OSError, ConfigError, FolderLostError), open_log(self._log) as file:
            _show(text, file, threads)


def _show(text: str, file: TextIO, threads: bool) -> None:
    file.write(text)
    file.flush()
    if threads:
        faulthandler.dump_traceback(file=file, all_threads=True)
