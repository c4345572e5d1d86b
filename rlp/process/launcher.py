"""Who started this process: a rank whose launcher has died must not train on, wherever in its life
that happens.

    the launcher dies               what the rank does
    before the rank's first line    the launcher left its marks in the environment, and is not among
                                    the ancestors: end
    while the rank imports          the ancestors are known from the first line on: end
    before the run is entered       a thread looks: end
    in the run                      `Preemption` looks: save, and end

Only a launcher counts: a shell, `nohup` or `systemd` that starts one process may go. This module
imports nothing that takes long, because it has to look before that; `torchrun` and `deepspeed` need
seconds to import what they launch with.
"""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress

import psutil

from rlp.process.exit_codes import INTERRUPTED, PEER_LOST
from rlp.process.poller import Poller

POLL_S = 0.5
"""How often a thread looks. `deepspeed` gives a rank 30 s after SIGTERM."""

RUNNERS, NODE_LAUNCHERS = {"deepspeed", "deepspeed.launcher.runner"}, {"deepspeed.launcher.launch"}
"""Of DeepSpeed: the first starts the second, on each node, which starts the ranks."""

OTHERS = {
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
    "accelerate.commands.launch",
}
"""All of these are programs or modules: one is among the first words of a launcher's command."""


class LauncherGone(Exception):
    """The process that launched this rank has ended, and there is nothing to save."""


class Launchers:
    """The processes above this one that launched it, as they are when it is made; none where nobody
    did."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        # deepspeed, its node launcher, a wrapper of the user's; further up is the user's shell,
        # which may go.
        ancestors = psutil.Process().parents()[:4]
        known = RUNNERS | NODE_LAUNCHERS | OTHERS
        self._watched = [process for process in ancestors if _is_one_of(process, known)]
        if "TORCHELASTIC_RUN_ID" in environment and not self._watched:
            # Programs of all kinds launch as torchrun does. They are written in Python; what adopts
            # an orphan seldom is. One that has ended, and that nobody has waited for yet, has no
            # command any more.
            likely = [
                process for process in ancestors if _is_python(process) or not _is_alive(process)
            ]
            self._watched = likely[:1]
        self._missing = _missing(ancestors, self._watched, environment)
        self.handed_over = False
        """Whether `Preemption` looks now."""

    def gone(self) -> str | None:
        """The one that has gone, or None while all are there."""
        if self._missing is not None:
            return self._missing
        for process in self._watched:
            if not _is_alive(process):
                return f"process {process.pid}"
        return None

    def require(self) -> None:
        """
        Raises:
            LauncherGone: some launcher has ended.
        """
        if (gone := self.gone()) is not None:
            raise LauncherGone(
                f"the launcher ({gone}) ended before the run began. This rank ends too, and nothing"
                " was written. Start the run again."
            )


def _missing(
    ancestors: list[psutil.Process], watched: list[psutil.Process], environment: Mapping[str, str]
) -> str | None:
    """The launcher that must have started this process by all signs, and is not there any more."""
    if "TORCHELASTIC_RUN_ID" in environment and not watched:
        return "torchrun"
    if not {"CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"} <= set(environment):
        return None

    for process, above in zip(ancestors, [*ancestors[1:], None]):
        if _is_one_of(process, NODE_LAUNCHERS):
            # On one node `deepspeed` itself starts the node launcher; on several, ssh or a
            # scheduler, with the node's number.
            if any(word.startswith("--node_rank") for word in _command(process)):
                return None
            return None if above and _is_one_of(above, RUNNERS) else "deepspeed"
    return "deepspeed.launcher.launch"


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _is_one_of(process: psutil.Process, names: set[str]) -> bool:
    return any(os.path.basename(word) in names for word in _command(process)[:4])


def _is_python(process: psutil.Process) -> bool:
    return os.path.basename((_command(process) or [""])[0]).startswith("python")


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


_recorded: Launchers | None = None


def launchers() -> Launchers:
    """Those of this process, as they were when it was asked first."""
    global _recorded
    _recorded = _recorded or Launchers()
    return _recorded


def watch_from_the_start() -> None:
    """The first line of a program that may be a rank: from here on it ends where its launcher does,
    and at a Ctrl-C without a traceback, whatever its main thread is busy with."""
    launchers()  # as they are now
    Poller("launcher", POLL_S, _watch).hear_signals()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)  # the thread is told


def _watch(polls: Iterator[bytes]) -> None:
    for woken in polls:
        if signal.SIGINT in woken:
            _end("interrupted", INTERRUPTED)
        if not launchers().handed_over:
            try:
                launchers().require()
            except LauncherGone as error:
                _end(f"error: {error}", PEER_LOST)


def _end(words: str, code: int) -> None:
    """End the process at once: its main thread may be in the middle of an import, or wait for a
    rank that never comes."""
    with suppress(OSError):
        os.write(sys.__stderr__.fileno(), f"{words}\n".encode())
    os._exit(code)
