"""The pulse of a run: where a step may be left, and how others learn that it goes on."""

import time
from collections.abc import Callable

from rlp.process.preemption import Preemption
from rlp.process.watchdog import Watchdog


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
        """Between micro-batches: a step from which nothing has moved is given up here where any
        rank was asked to stop.

        Raises:
            StopRequested: on all ranks.
        """
        self._watchdog.mark()
        self.beat()
        if not self._weights_moved:
            self._preemption.safe_point()

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
