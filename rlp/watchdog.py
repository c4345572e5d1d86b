"""When a rank falls silent: a stall is found and shown on every rank, a lost peer is said in one line.

Whatever makes progress marks it (`mark`). Without a mark for `run.watchdog_s` seconds, a rank writes the stack of each of its
threads, with what it was doing, to stderr and to `logs/rank_N.log`, leaves word for the other ranks, which do the same,
and the processes end with `STALLED`. A stalled rank's peers wait in a collective, and their stacks name it.
"""

import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from rlp.config import RunConfig
from rlp.distributed import Ranks

STALLED = 70
"""Exit code of a run whose watchdog has barked."""

_LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused|socket closed|connection was likely closed", re.IGNORECASE)
"""What gloo and NCCL say where the process at the other end has ended."""


class PeerLost(Exception):
    """Another rank ended, and this one can not go on."""


class Watchdog:
    """Watches while it is entered; outside, marks are for nobody."""

    def __init__(self, ranks: Ranks, config: RunConfig) -> None:
        self._ranks, self._limit_s = ranks, config.watchdog_s
        self._log = Path(config.dir) / "logs" / f"rank_{ranks.rank}.log"
        self.phase = "start"
        """What the rank is doing."""
        self._marked = time.monotonic()

    def mark(self, phase: str | None = None) -> None:
        """Progress: something was done, and what is done next, where that is another thing."""
        self._marked = time.monotonic()
        self.phase = phase or self.phase

    def __enter__(self) -> "Watchdog":
        self.mark()
        self._ended = threading.Event()
        if self._limit_s > 0:
            self._poll_s = min(1.0, self._limit_s / 4)
            self._key = self._ranks.word("stalled")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._limit_s > 0:
            self._thread.join(timeout=2 * self._poll_s)
            faulthandler.cancel_dump_traceback_later()
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _LOST_PEER.search(str(error))):
            self._write("".join(traceback.format_exception(error)), stderr=False)
            cause = " ".join(str(error).split())[:160]
            raise PeerLost(f"rank {self._ranks.rank} of {self._ranks.world_size} lost another rank while in {self.phase} ({cause}). "
                           f"The rank that ended first says why. Continue with run.resume=auto.") from error

    def _watch(self) -> None:
        others = self._ranks.words()
        while not self._ended.wait(self._poll_s):
            silent = time.monotonic() - self._marked
            if silent > self._limit_s:
                self._bark(f"no progress for {silent:.0f} s in {self.phase}")
                others.leave(self._key)
                break
            if others.has(self._key):
                self._bark(f"another rank has stalled; this one is in {self.phase} for {silent:.0f} s")
                break
            # Where a library stalls and holds Python's lock, this thread does not run either: shows the stacks, and exits with code 1.
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=2)
        else:
            return
        faulthandler.cancel_dump_traceback_later()
        self._ended.wait(3 * self._poll_s)  # for the others to hear, and to show theirs
        os._exit(STALLED)

    def _bark(self, what: str) -> None:
        self._write(f"rank {self._ranks.rank} of {self._ranks.world_size}: {what} (run.watchdog_s={self._limit_s:g}); its threads:\n", stderr=True, threads=True)
        self._write(f"rank {self._ranks.rank}: ended with exit code {STALLED}\n", stderr=True)

    def _write(self, text: str, *, stderr: bool, threads: bool = False) -> None:
        with ExitStack() as opened:
            files = [sys.__stderr__] if stderr else []
            if self._log.parent.is_dir():
                files.append(opened.enter_context(open(self._log, "a", encoding="utf-8")))
            for file in files:
                file.write(text)
                file.flush()
                if threads:
                    faulthandler.dump_traceback(file=file, all_threads=True)
