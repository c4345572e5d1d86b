"""A small process beside a rank that watches it from outside: a library that stalls while it holds
Python's lock stops every thread of the rank that runs Python, the watchdog's own too.

    python watchdog_process.py PID LIMIT_S POLL_S

It reads one byte on stdin for each sign of life; the end of stdin ends it.

After LIMIT_S without a sign it asks for the stacks of the rank (`SHOW`), and kills it. Time in
which the rank or this process itself is stopped does not count. Standard library only; it runs as a
file, without the rest of `rlp`.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SHOW = signal.SIGUSR2
"""At this signal a watched rank writes the stacks of its threads, without Python's lock
(`faulthandler.register`)."""

SHOW_S = 1.0
"""How long it may take for that."""


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger; False where the system does not
    tell."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def watch(pid: int, limit_s: float, poll_s: float) -> None:
    """Until the rank has ended, or is ended."""
    silent, looked = 0.0, time.monotonic()
    while silent <= limit_s:
        told = select.select([0], [], [], poll_s)[0]
        now = time.monotonic()
        if told:
            if not os.read(0, 4096):
                return
            silent = 0.0
        elif not is_stopped(pid):
            silent += min(now - looked, 2 * poll_s)  # more: this process has not run itself
        looked = now
    os.write(
        2,
        f"process {pid}: no thread of it has run Python for {silent:.0f} s, so a library stalls and"
        " holds Python's lock; it is killed. Its threads:\n".encode(),
    )
    os.kill(pid, SHOW)
    time.sleep(SHOW_S)
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
