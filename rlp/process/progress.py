"""How far a piece of work is, how long the rest takes, and where the time went."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from tqdm import tqdm

from rlp.process.console import format_bytes, format_duration, say_line

LINE_EVERY_S = 30.0
"""Where nobody watches a terminal, long work is told of this often."""

PACE_STEPS = 20
"""Steps that `perf/left_s` looks back on."""


class Pace:
    """How long the rest takes, by the last steps."""

    def __init__(self, num_steps: int = PACE_STEPS) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=num_steps)

    def left_s(self, advanced: float, seconds: float, left: float) -> float | None:
        """Take one more step into account; seconds until all is done, or None before anything has
        moved.

            left x (seconds of the last steps) / (what they advanced)

        Args:
            advanced: of the whole, by this step, in any unit.
            seconds: that the step took.
            left: what is to be done, in the same unit.
        """
        self._steps.append((advanced, seconds))
        done, taken = (sum(column) for column in zip(*self._steps))
        return max(0.0, left) * taken / done if done > 0 else None


class Progress:
    """How far a long piece of work is: a bar on a terminal; elsewhere a line every `LINE_EVERY_S`
    seconds, and none before.

        with Progress("thinking on the panel", total=64, unit="documents") as progress:
            for batch in batches:
                ...
                progress.advance(len(batch))
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        shown: bool = True,
        say: Callable[[str], None] | None = None,
        on_advance: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            total: how much there is to do, in `unit`; None where nobody knows.
            unit: a word in the plural. `bytes` are told in MB and GB.
            shown: False says nothing, for ranks that do not speak.
            say: takes a line where there is no terminal; by default it goes to stderr.
            on_advance: called where something moves, shown or not.
        """
        self._on_advance = on_advance
        self._what, self._total, self._unit = what, total, unit
        self._shown, self._say = shown, say or (lambda text: say_line(text, sys.stderr))
        self._done, self._bar = 0, None

    def __enter__(self) -> "Progress":
        self._began = self._told = time.monotonic()
        if self._shown and sys.stderr.isatty():
            in_bytes = self._unit == "bytes"
            # Work that is done within a second shows no bar at all.
            self._bar = tqdm(
                desc=self._what,
                total=self._total,
                unit="B" if in_bytes else f" {self._unit}",
                unit_scale=in_bytes,
                leave=False,
                delay=1,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int = 1) -> None:
        """So much more is done; 0: something moves, and there is nothing to count."""
        self._done += amount
        self._on_advance()
        if self._bar is not None:
            self._bar.update(amount)
        elif self._shown and time.monotonic() - self._told >= LINE_EVERY_S:
            self._told = time.monotonic()
            self._say(self._line())

    def _line(self) -> str:
        taken = self._told - self._began
        line = f"{self._what}: {self._amount(self._done)}"
        if self._total is not None:
            line += f" of {self._amount(self._total)}"
        if self._unit != "bytes":
            line += f" {self._unit}"
        line += f" in {format_duration(taken)}"
        if self._total is not None and self._done:
            left = taken * (self._total - self._done) / self._done
            line += f", about {format_duration(left)} left"
        return line

    def _amount(self, value: int) -> str:
        return format_bytes(value) if self._unit == "bytes" else f"{value:,}"


Tell = Callable[[str, int | None, str], Progress]
"""What makes a `Progress` of (what, total, unit), and with it says who speaks, and where."""


class WallTime:
    """Where the time of a process goes, from its start: each moment belongs to one part."""

    def __init__(self) -> None:
        """The time until now belongs to the part `start`."""
        age = max(0.0, time.time() - psutil.Process().create_time())
        self._parts: dict[str, float] = {"start": age}
        self._part, self._since = "start", time.monotonic()

    def enter(self, part: str) -> str:
        """What is done from now on; returns what was done until now."""
        before, now = self._part, time.monotonic()
        self._parts[before] = self._parts.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The block belongs to a part; what comes after it to the part from before."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def so_far(self) -> dict[str, float]:
        """Seconds of each part."""
        self.enter(self._part)
        return dict(self._parts)

    def told(self) -> str:
        """The sum, and its parts of at least half a second, the largest first."""
        parts = sorted(self.so_far().items(), key=lambda part: part[1], reverse=True)
        told = [f"{part} {format_duration(taken)}" for part, taken in parts if taken >= 0.5]
        total = format_duration(sum(self._parts.values()))
        return f"{total}: {', '.join(told)}" if told else total
