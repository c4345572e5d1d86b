"""One job at a time in a run folder, on this machine or on any that shares the disk.

    lock/N/owner.json      who holds the folder, as its N-th holder; `released.json` when it has let
                           go

The highest N counts. A claim is a folder that is renamed to the next number, which succeeds for one
job only, and a number is not used twice: who was stopped while others took over finds a higher one.
No lock of the system is used: not all disks that machines share have one, and none tells who holds
it.

    the last holder                                      the next job
    has let go                                           claims
    ran on this machine and is dead (`kill -9`, too)     claims at once, and says so
    runs on this machine                                 is refused, at once
    ran elsewhere, and its file's time moves             is refused, after some `BEAT_S`
    ran elsewhere, and its file's time stands still      waits `STALE_S`, claims, and says so

Clocks of two machines are never compared: a heartbeat is a change, seen from here. Before each
write the holder looks whether it still is (`files.hold`); only a process that is stopped between
that look and its write can write once more.
"""

import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from rlp.config import ConfigError
from rlp.process import files
from rlp.process.files import FolderLostError, NotWrittenError
from rlp.process.ranks import Ranks

BEAT_S, LOOK_S = 5.0, 1.0
"""How often a holder sets the time of its file, and how often a job that waits looks at it."""

STALE_S = 60.0
"""How long the file of a holder elsewhere has to stand still."""


def this_machine() -> list[str]:
    """What makes process ids comparable: host, boot and, in a container, the space of its
    processes."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"
    return [
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(space) if os.path.lexists(space) else "",
    ]


def started(pid: int) -> str | None:
    """When a process was started, in a form that no setting of a clock changes; None where there is
    none, or a dead one."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    with suppress(psutil.Error):
        return None if Path("/proc/self").exists() else str(psutil.Process(pid).create_time())
    return None


class RunLock:
    """The claim of a job on a run folder; released at the end of `with`."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.owner = {
            "machine": this_machine(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "id": secrets.token_hex(8),
        }
        self._folder: Path | None = None
        self._number, self._beaten = 0, 0.0
        self._watched: tuple[str, int, float] | None = None
        """Of a holder elsewhere: its id, the time of its file, and since when that stands still."""

    # Claiming

    def write_first(self, folder: Path) -> None:
        """Make the folder of a new run, which does not have its name yet, one that this job
        holds."""
        files.make_folder(folder / "lock" / "1")
        files.write_new(
            folder / "lock" / "1" / "owner.json", self._content(), point="lock.torn_owner"
        )

    def claim(self, folder: Path, say: Callable[[str], None], tick: Callable[[], None]) -> None:
        """Hold a run folder from now on. A collective.

        Args:
            tick: called while there is waiting.

        Raises:
            ConfigError: another job holds it; on every rank.
            NotWrittenError: the claim could not be written; on every rank.
        """
        told = None
        while True:
            mine = self._attempt(folder) if self._ranks.is_first else None
            verdict, words = self._ranks.broadcast(mine)
            if verdict in _REFUSALS:
                raise _REFUSALS[verdict](words)
            if words and words != told:
                say(words)
            if isinstance(verdict, tuple):
                break

            told = words
            tick()
            time.sleep(LOOK_S if verdict == "wait" else 0)
        self._follow(folder, *verdict)

    def _attempt(self, folder: Path) -> tuple[tuple[int, str] | str, str]:
        """Rank 0's: (number, id) of the claim, or what came instead of it, and what is to be
        said."""
        try:
            return self._look(folder)
        except FileNotFoundError:
            if folder.is_dir():
                return "again", ""
            return "gone", f"run.dir {folder} was removed a moment ago."
        except OSError as error:
            return "not written", (
                f"run.dir {folder} can not be written to: {error}. Nothing in it was changed. Make"
                " room, or mount the disk writable, and start the run again."
            )

    def _look(self, folder: Path) -> tuple[tuple[int, str] | str, str]:
        """Claim the folder where its last holder is none any more."""
        home = folder / "lock"
        newest = max(_numbers(home), default=0)
        if newest == 0 or (home / str(newest) / "released.json").exists():
            return self._take(home, newest), ""

        owner, moved = _read_owner(home / str(newest))
        if owner.get("id") == self.owner["id"] or (
            self._is_here(owner) and owner.get("pid") == os.getpid()
        ):
            return (newest, owner["id"]), ""

        who, alive = _who(owner), self._is_alive(owner, moved)
        if alive:
            return "held", (
                f"run.dir {folder} is held by {who}, which is alive: two jobs in one folder would"
                " delete each other's checkpoints. Nothing in it was changed. Wait for its end, or"
                " end it; for another run write run.dir=OTHER. If the folder is a copy of that"
                f" job's, remove {home}."
            )
        if alive is None:
            return "wait", (
                f"{folder} was held by {who}; waiting {STALE_S:.0f} s for a sign of life of it"
            )
        taken = self._take(home, newest)
        if taken == "again":
            return taken, ""
        return taken, (
            f"{folder} was held by {who}, which is dead or has given no sign of life: this job"
            " takes over"
        )

    def _take(self, home: Path, newest: int) -> tuple[int, str] | str:
        """Claim the number after the newest: (number, id), or `again` where another job did."""
        try:
            with files.new_folder(home / str(newest + 1), point="lock.before_rename") as new:
                files.write_new(new / "owner.json", self._content(), point="lock.torn_owner")
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return "again"
            raise

        numbers = _numbers(home)
        if max(numbers) > newest + 1:
            # The number was an old one: its holder has been followed since by another.
            files.remove(home / str(newest + 1))
            return "again"
        for number in numbers:
            if number <= newest:
                files.remove(home / str(number))
        return newest + 1, self.owner["id"]

    def _content(self) -> bytes:
        return (json.dumps(self.owner) + "\n").encode()

    def _is_here(self, owner: dict) -> bool:
        return owner.get("machine") == self.owner["machine"]

    def _is_alive(self, owner: dict, moved: int) -> bool | None:
        """Whether a holder lives; None where that is not known yet."""
        if self._is_here(owner) and isinstance(owner.get("pid"), int):
            return started(owner["pid"]) == owner.get("started")
        now, identity = time.monotonic(), str(owner.get("id"))
        if self._watched is None or self._watched[0] != identity:
            self._watched = (identity, moved, now)
        if self._watched[1] != moved:
            return True
        return False if now - self._watched[2] >= STALE_S else None

    def _follow(self, folder: Path, number: int, identity: str) -> None:
        """Every rank's part: from now on its writes ask `check`."""
        path = folder / "lock" / str(number) / "owner.json"
        deadline = time.monotonic() + STALE_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # other machines may see a new file late

        blind = [rank for rank, sees in enumerate(self._ranks.gather(path.exists())) if not sees]
        if blind:
            raise ConfigError(
                f"run.dir {folder}: rank {blind[0]} does not see it; it must be on a disk that all"
                " machines of the run share. Write run.dir=OTHER."
            )

        self.owner["id"] = identity
        self._folder, self._number = folder, number
        files.hold(folder, self.check)

    # Holding

    @property
    def _claim(self) -> Path:
        return self._folder / "lock" / str(self._number)

    def check(self) -> None:
        """
        Raises:
            FolderLostError: this job no longer holds the folder, or the folder has gone.
        """
        owner = {}
        with suppress(FileNotFoundError, NotADirectoryError):
            owner, _ = _read_owner(self._claim)

        newest = max(_numbers(self._claim.parent), default=0)
        if newest > self._number:
            with suppress(FileNotFoundError):
                owner, _ = _read_owner(self._claim.with_name(str(newest)))
            raise self._lost(
                f"was taken over by {_who(owner)}, because this job had given no sign of life for"
                f" more than {STALE_S:.0f} s"
            )
        if owner.get("id") != self.owner["id"]:
            raise self._lost("was renamed or removed, or its lock was, while the run went on")

    def _lost(self, what: str) -> FolderLostError:
        return FolderLostError(
            f"the run folder {self._folder} {what}. This job has written nothing since, and ends."
            " What it has saved is where that folder is now; continue there with run.resume=auto."
        )

    def beat(self) -> None:
        """Give a sign of life where one is due. For one thread, on any rank.

        Raises:
            FolderLostError: as `check`.
        """
        if self._folder is None or time.monotonic() - self._beaten < BEAT_S:
            return
        self._beaten = time.monotonic()
        # A disk that fails fails the writes, too, and they say so.
        with suppress(OSError, ConfigError):
            self.check()
            if self._ranks.is_first:
                files.touch(self._claim / "owner.json", point="lock.beat")

    def release(self) -> None:
        """Let go of the folder, where it is still held."""
        if self._folder is None:
            return
        with suppress(OSError, FolderLostError):
            if self._ranks.is_first:
                self.check()
                files.rename(
                    self._claim / "owner.json", "released.json", point="lock.before_release"
                )
        files.let_go(self._folder)
        self._folder = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_REFUSALS = {"held": ConfigError, "gone": ConfigError, "not written": NotWrittenError}


def _numbers(home: Path) -> list[int]:
    """Of all claims that are there."""
    names = os.listdir(home) if home.is_dir() else []
    return [int(name) for name in names if re.fullmatch(r"[1-9][0-9]{0,15}", name)]


def _read_owner(claim: Path) -> tuple[dict, int]:
    """What a claim says of its owner, empty where that can not be read, and the time of the
    file."""
    with files.open_to_read(claim / "owner.json") as file:
        moved = os.fstat(file.fileno()).st_mtime_ns
        try:
            owner = json.loads(file.read(2**16))
        except (ValueError, RecursionError):
            owner = None
    return (owner if isinstance(owner, dict) else {}), moved


def _who(owner: dict) -> str:
    machine = owner.get("machine")
    host = str(machine[0]) if isinstance(machine, list) and machine else "an unknown machine"
    pid, since = owner.get("pid", "of an unknown number"), owner.get("since", "an unknown time")
    return f"process {pid} on {host} (since {since})"[:200]
