"""The pulse of a run: where a step may be left, and how others learn that it goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlp.process.preemption import Preemption
from rlp.process.watchdog import Watchdog

VOTE_EVERY_S = 5.0
"""Ranks whose passes are collectives ask each other so often whether to stop: a small part of the
30 s that launchers leave; and a vote, which waits for the device, takes nothing beside it."""


class Pulse:
    """Beats whenever the host looks at what was sampled, and once for each micro-batch and each
    phase."""

    def __init__(
        self,
        preemption: Preemption,
        watchdog: Watchdog,
        still: Callable[[int, str, float], None],
    ) -> None:
        """
        Args:
            still: is told the step that goes on, its phase, and its seconds so far.
        """
        self._preemption, self._watchdog = preemption, watchdog
        self._still = still
        self._weights_moved = False
        self._passes, self._passes_to_a_vote, self._voted = 0, 1, 0.0
        self.begin(0)

    def begin(self, step: int) -> None:
        """A step begins, which is `self.step` from here on: until its weights move it can be given
        up."""
        self.step, self._began = step, time.perf_counter()
        self._weights_moved = False

    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._began

    def safe_point(self) -> None:
        """Between steps: the run is left here where any rank was asked to stop. A collective.

        Raises:
            StopRequested: on all ranks.
        """
        self._watchdog.mark()
        self.beat()
        self._preemption.safe_point()

    @contextmanager
    def may_be_left(self) -> Iterator[None]:
        """Around passes of a step: while nothing has moved from it, it is given up `between_passes`
        or at the end, where any rank was asked to stop. A collective at the end, as long as nothing
        has moved.

        Raises:
            StopRequested: on all ranks.
        """
        self._watchdog.mark()
        self.beat()
        self._passes, self._voted = 0, time.perf_counter()
        if self._weights_moved:
            yield
            return
        with self._preemption.leaving_early():
            yield

    def between_passes(self, collective: bool) -> None:
        """Inside `may_be_left`.

        Args:
            collective: whether a pass is, so that ranks can leave only together. They vote about
                every `VOTE_EVERY_S` seconds, after as many passes on each rank; else a rank leaves
                by itself, and waits for the others.
        """
        self._watchdog.mark()
        self.beat()
        if self._weights_moved:
            return
        if not collective:
            self._preemption.look()
            return

        self._passes += 1
        if self._passes >= self._passes_to_a_vote:
            now = time.perf_counter()
            slowest_ms = self._preemption.vote(round(1000 * (now - self._voted)))
            wanted = self._passes * 1000 * VOTE_EVERY_S / max(slowest_ms, 1)
            self._passes, self._voted, self._passes_to_a_vote = 0, now, max(1, int(wanted))

    def weights_move(self) -> None:
        """The update comes: the step is made to its end from here on."""
        self._watchdog.mark("optimizer")
        self._weights_moved = True

    def end(self) -> None:
        """The step is made, and the next may be given up."""
        self._watchdog.mark("log")
        self._weights_moved = False

    def beat(self) -> None:
        """Tell that the step goes on."""
        self._still(self.step, self._watchdog.phase, self.seconds())
