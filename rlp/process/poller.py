"""A thread that looks again and again, for what must go on while the main thread waits.

    def watch(polls):
        for woken in polls:
            ...

    poller = Poller("watchdog", 1.0, watch)

Standard library only: a rank has one before anything that takes seconds to import.
"""

import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress


class Poller:
    """Runs `watch` in a thread of its own, until that returns or the poller is closed."""

    def __init__(
        self, name: str, every_s: float, watch: Callable[[Iterator[bytes]], object]
    ) -> None:
        """
        Args:
            watch: is given an iterator that goes on every `every_s` seconds, and at once where
                something wakes it. What it yields is what has: numbers of signals, 0 for `wake`,
                nothing where the time had come.
        """
        self._every_s = every_s
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=watch, args=(self._polls(),), name=name, daemon=True)
        self._thread.start()

    def _polls(self) -> Iterator[bytes]:
        with self._receiver:
            while True:
                ready, _, _ = select.select([self._receiver], [], [], self._every_s)
                woken = self._receiver.recv(64) if ready else b""
                if ready and not woken:
                    return  # the other end is closed
                yield woken

    def hear_signals(self) -> int:
        """Be woken by signals too. Python runs their handlers between bytecodes of the main thread,
        which may be waiting in a collective; this tells the thread at once.

        Returns:
            what was woken before, for `signal.set_wakeup_fd`.
        """
        return signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def wake(self) -> None:
        """Look now."""
        with suppress(OSError):  # it is closed, or has been woken often and not looked yet
            self._sender.send(b"\0")

    def close(self, timeout_s: float) -> None:
        """Look no more, and wait so long for a look that is under way."""
        self._closed.set()
        self._sender.close()
        self._thread.join(timeout_s)

    def closes_within(self, seconds: float) -> bool:
        """For the thread itself: wait, and whether it was closed meanwhile."""
        return self._closed.wait(seconds)
