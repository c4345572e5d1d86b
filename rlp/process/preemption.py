"""Asked to stop: by a signal, by the death of the launcher, by a time limit. All ranks stop at one
place, together.

    who asks                                        who notices
    SIGTERM, SIGINT, SIGHUP, SIGUSR1, to any rank   the handler of that rank
    the launcher is gone                            a thread of each rank that it started;
                                                    `deepspeed` dies of a signal and leaves its
                                                    ranks
    checkpoint.save_by is reached                   the same thread
    another rank was asked                          the same thread; a launcher may signal its ranks
                                                    one after another

Who notices only takes note. Ranks agree by a collective where none of them is in the middle of
something (`safe_point`); those that do a long thing apart, which is sampling, leave it early and
wait for the others there (`leaving_early`).
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from rlp.config import ConfigError, parse_duration, parse_moment
from rlp.process.exit_codes import INTERRUPTED
from rlp.process.files import FolderLostError
from rlp.process.launcher import POLL_S, launchers
from rlp.process.poller import Poller
from rlp.process.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

SAME_KEYPRESS_S = 1.0
"""A launcher may pass on the SIGINT that its ranks have had from the terminal: within this time it
counts once."""

HEARSAY = "another rank was asked to stop"
"""Reason of a rank that only heard of it."""


class StopRequested(Exception):
    """Raised on all ranks at the same safe point; says who asked."""


class _Leave(Exception):
    """This rank leaves off sampling."""


def steady_time() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps, where there
    is such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Deadline:
    """`checkpoint.save_by`. The clock on the wall may be set while the run lasts.

    A duration runs on the steady clock alone. So does a date, from how far away it is at the start;
    it has come as well when the wall says so.
    """

    def __init__(self, text: str) -> None:
        """
        Raises:
            ConfigError: it is past.
        """
        now, seconds = time.time(), parse_duration(text)
        self._on_the_wall = float("inf") if seconds is not None else parse_moment(text, now)
        left = seconds if seconds is not None else self._on_the_wall - now
        if left <= 0:
            raise ConfigError(
                f"checkpoint.save_by {text} is past: it is {time.strftime('%Y-%m-%dT%H:%M:%S')}"
                " here. Write a later time, or null."
            )
        self._steady = steady_time() + left

    def has_come(self) -> bool:
        """Whether it is reached."""
        return steady_time() >= self._steady or time.time() >= self._on_the_wall


class Preemption:
    """Watches while it is entered; outside, `request` is the only one who asks."""

    def __init__(self, ranks: Ranks, save_by: str | None = None) -> None:
        """
        Args:
            save_by: `checkpoint.save_by`.
        """
        self._ranks, self._save_by = ranks, save_by
        self._deadline: Deadline | None = None
        self._launchers = launchers()
        self.on_poll: Callable[[], None] = lambda: None
        """What else the thread does each time; a FolderLostError of it is a reason to stop."""
        self.reason: str | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank knows that the run is to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Take note, the first time."""
        if self.reason is None:
            self.reason = reason

    def safe_point(self) -> None:
        """Leave here, on every rank, where any was asked to stop. A collective.

        Raises:
            StopRequested: on all ranks.
        """
        if self._ranks.any(self.requested):
            reasons = self._ranks.gather(self.reason)
            raise StopRequested(next(reason for reason in reasons if reason not in (None, HEARSAY)))

    @contextmanager
    def leaving_early(self) -> Iterator[None]:
        """Around what ranks do apart from each other: `look` leaves it, and a safe point is at its
        end."""
        with suppress(_Leave):
            yield
        self.safe_point()

    def look(self) -> None:
        """Leave `leaving_early` where this rank is to stop."""
        if self.requested:
            self.leave()

    def vote(self, number: int) -> int:
        """The largest of the ranks' numbers, below 2 ** 62. Where any rank is to stop, all leave
        `leaving_early` together. A collective."""
        stop = 2**62
        answer = self._ranks.largest(stop if self.requested else number)
        if answer == stop:
            self.leave()
        return answer

    def leave(self) -> None:
        """Leave `leaving_early`; some rank is to stop."""
        raise _Leave

    def __enter__(self) -> "Preemption":
        self._deadline = Deadline(self._save_by) if self._save_by is not None else None
        self._others = self._ranks.words("stop")
        self._launchers.handed_over = True
        self._poller = Poller("preemption", POLL_S, self._watch)
        self._woken_before = self._poller.hear_signals()

        self._handlers_before = {}
        for number in SIGNALS:
            # nohup has SIGHUP ignored
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            # A launcher signals its ranks when the first of them has ended: on its way out a
            # process needs no telling.
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        signal.set_wakeup_fd(self._woken_before)
        self._poller.close(2 * POLL_S)
        self._others.close()

    def _on_signal(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.reason is None and number == signal.SIGINT and self._ranks.is_first:
            print(
                "interrupted: the run stops and saves; Ctrl-C again ends it at once",
                file=sys.stderr,
                flush=True,
            )
        self.request(name)

    def _watch(self, polls: Iterator[bytes]) -> None:
        """The thread."""
        interrupted_at = None
        for woken in polls:
            if signal.SIGINT in woken:
                now = time.monotonic()
                interrupted_at = interrupted_at or now
                if now - interrupted_at > SAME_KEYPRESS_S:
                    self._end_at_once()

            if (gone := self._launchers.gone()) is not None:
                self.request(f"the launcher ({gone}) is gone")
            if self._deadline is not None and self._deadline.has_come():
                self.request(f"checkpoint.save_by {self._save_by} is reached")
            self._beat()

            if self.requested:
                self._others.leave()
            elif self._others.heard:
                self.request(HEARSAY)

    def _beat(self) -> None:
        try:
            self.on_poll()
        except FolderLostError:
            self.request("the run folder is lost")

    def _end_at_once(self) -> None:
        print(
            f"rank {self._ranks.rank}: interrupted twice, ended at once; nothing was saved after"
            " the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(INTERRUPTED)
