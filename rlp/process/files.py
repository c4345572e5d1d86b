"""Files: how each one is written, and how those of a folder that may be a stranger's are opened.

Nothing else in `rlp` makes, names or changes a file. What is new is written under a random name
that nobody can have prepared, brought to disk, and then given its name: whoever looks meets the old
file, the new one, or none. Every write takes the name of a fault point (`rlp.process.faults`) and
passes it while half of the content is on disk.

In place of a file that is opened here a symbolic link, a FIFO, a device, a socket or a folder is
refused by name: a link leads out of the folder, and the others block, or never end.
"""

import errno
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from rlp.config import ConfigError
from rlp.process.faults import fault

_GUARDED = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Follow no link as the last part of a path, wait for no FIFO, leave nothing open to a child."""

_ODD_ERRORS = {errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EOPNOTSUPP, errno.ENODEV}
"""Of an `open` as guarded: a link; a FIFO or socket at whose other end nobody is; a folder; a
device without a driver."""

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
}


class NotWrittenError(Exception):
    """What must be on disk before the run goes on could not be written. The message says what, why,
    and what is safe."""


class FolderLostError(Exception):
    """The folder that this process writes to is no longer its own, or is gone: nothing more may be
    written."""


# Who may write: a process that holds a folder asks before each write whether it still does

_holds: dict[Path, Callable[[], None]] = {}


def hold(folder: Path, check: Callable[[], None]) -> None:
    """From now on `check` is called before each write of this process into a folder; an exception
    of it stops the write."""
    _holds[Path(os.path.abspath(folder))] = check


def let_go(folder: Path) -> None:
    """Writes into the folder are no longer checked."""
    _holds.pop(Path(os.path.abspath(folder)), None)


def _check(path: Path) -> None:
    absolute = Path(os.path.abspath(path))
    for folder, check in list(_holds.items()):
        if absolute.is_relative_to(folder):
            check()


# Opening


def open_to_read(path: Path) -> BinaryIO:
    """A regular file, for its bytes.

    Raises:
        ConfigError: the path is something else.
        OSError: as `open`.
    """
    return os.fdopen(_open(path, os.O_RDONLY), "rb")


def read_bytes(path: Path) -> bytes:
    """All of a regular file."""
    with open_to_read(path) as file:
        return file.read()


def _open(path: Path, flags: int) -> int:
    try:
        handle = os.open(path, flags | _GUARDED, 0o666)
    except OSError as error:
        if error.errno in _ODD_ERRORS and (kind := _kind(path)) != "a file":
            raise _refusal(path, kind, "a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _refusal(path, _kind(path), "a file")
    return handle


def _kind(path: Path) -> str:
    try:
        return _KINDS[stat.S_IFMT(os.lstat(path).st_mode)]
    except OSError:
        return "nothing"


def _refusal(path: Path, kind: str, expected: str) -> ConfigError:
    advice = "Remove it"
    if kind == "a symbolic link":
        advice = "Remove it, or put a copy of what it stands for in its place"
    return ConfigError(
        f"{path} is {kind}; expected {expected}. {advice}: what leads elsewhere is neither read nor"
        " written here."
    )


def refuse_odd_entries(
    folder: Path,
    *,
    files: tuple[str, ...] = (),
    folders: tuple[str, ...] = (),
    leave_out: tuple[str, ...] = (),
) -> None:
    """Refuse a folder in which, at any depth, something is neither a file nor a folder. Nothing is
    opened.

    Args:
        files, folders: names in it that have to be that, where they are there.
        leave_out: paths below it that are not looked into.

    Raises:
        ConfigError: names the first such entry.
    """
    expected = dict.fromkeys(files, "a file") | dict.fromkeys(folders, "a folder")
    for name, wanted in expected.items():
        if (kind := _kind(folder / name)) not in (wanted, "nothing"):
            raise _refusal(folder / name, kind, wanted)

    waiting = _entries(folder)
    while waiting:
        entry = waiting.pop()
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if str(path.relative_to(folder)) in leave_out:
                continue
            # Another rank or job may have renamed or removed it since it was listed.
            with suppress(FileNotFoundError):
                waiting += _entries(path)
        elif not entry.is_file(follow_symlinks=False):
            raise _refusal(path, _kind(path), "a file or a folder")


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, the last name first."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


def refuse_existing(path: Path, option: str = "--out") -> None:
    """Refuse to write what a command line names over something that is there.

    Raises:
        ConfigError: it is.
    """
    if path.exists():
        raise ConfigError(f"{option}: {path} exists and is never written over. Write another path.")


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder, at any depth; what goes meanwhile does not count, nor what a
    link leads to."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                total += status.st_size
    return total


# Writing


@contextmanager
def new_file(path: Path, *, point: str) -> Iterator[BinaryIO]:
    """A file that did not exist, to be written to; on disk at the end, and gone where something
    fails.

    Raises:
        FileExistsError: the path is there, as whatever.
    """
    with _created(path) as file:
        yield file
        fault(point, file.flush)


def write_new(path: Path, content: bytes, *, point: str) -> None:
    """A file that did not exist, with its content on disk."""
    with _created(path) as file:
        _write(file, content, point)


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    _check(path)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _GUARDED, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        remove(path)
        raise


def _write(file: BinaryIO, content: bytes, point: str) -> None:
    """Write bytes; where the fault point is asked for something, half of them are there when it
    happens."""
    written = 0

    def tear() -> None:
        nonlocal written
        written = len(content) // 2
        file.write(content[:written])
        file.flush()

    fault(point, tear)
    file.write(content[written:])


def write_atomically(path: Path, content: bytes, *, point: str) -> None:
    """Replace a file by its next version: a reader, or a crash, meets the old one or the new one,
    whole."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    write_new(partial, content, point=point)
    give_name(partial, path)


def give_name(temporary: Path, final: Path) -> None:
    """Rename a finished file or folder, which replaces a file, and no folder but an empty one;
    where that fails, remove it."""
    try:
        _check(final)
        os.rename(temporary, final)
    except BaseException:
        remove(temporary)
        raise
    sync(final.parent)


def temporary_of(final: Path) -> Path:
    """A name beside a folder, for what is to become it."""
    return final.with_name(f".tmp.{final.name}.{secrets.token_hex(8)}")


@contextmanager
def new_folder(final: Path, *, point: str) -> Iterator[Path]:
    """A folder under another name, which gets its own when all in it is on disk; where something
    fails nothing is left.

    Raises:
        OSError: there is a folder of that name that is not empty, or a file.
    """
    temporary = temporary_of(final)
    make_folder(temporary)
    try:
        yield temporary
        name_folder(temporary, final, point=point)
    except BaseException:
        remove(temporary)
        raise


def name_folder(temporary: Path, final: Path, *, point: str) -> None:
    """Bring all of a folder to disk, and give it its name."""
    for folder, _, names in os.walk(temporary):
        for path in (*(Path(folder) / name for name in names), Path(folder)):
            sync(path)
    fault(point)
    give_name(temporary, final)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what another program reads at once, in the machine's place for such things; it
    is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="rlp.") as name:
        yield Path(name)


def make_folder(path: Path, *, exist_ok: bool = False) -> None:
    """A folder, and those above it."""
    _check(path)
    path.mkdir(parents=True, exist_ok=exist_ok)


def append(path: Path, content: bytes, *, point: str, size: int | None = None) -> None:
    """Add bytes to the end of a file, which is made where there is none.

    Args:
        size: the length that the file had when all was well: what a failed attempt left beyond it
            goes first.
    """
    _check(path)
    with os.fdopen(_open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab", buffering=0) as file:
        if size is not None and file.tell() > size:
            file.truncate(size)
        _write(_Whole(file), content, point)


class _Whole:
    """Writes all of its bytes or raises; a file without a buffer may take a part of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.flush = file, file.flush

    def write(self, content: bytes) -> None:
        while content:
            content = content[self._file.write(content) :]


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    """A file to add text to, what is no Unicode spelled out; made where there is none."""
    _check(path)
    handle = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with open(handle, "a", encoding="utf-8", errors="backslashreplace") as file:
        yield file
        fault("append.torn_rank_log", file.flush)


def cut(path: Path, size: int, *, point: str) -> None:
    """Make a file end at a byte, in place: it takes no room, and a crash meets the old length or
    the new one."""
    _check(path)
    fault(point)
    handle = _open(path, os.O_RDWR)
    try:
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)


def touch(path: Path, *, point: str) -> None:
    """Set the time of a file to now; it takes no room on the disk."""
    fault(point)
    handle = _open(path, os.O_RDWR)
    try:
        os.utime(handle)
    finally:
        os.close(handle)


def set_aside(path: Path, name: str, *, point: str) -> Path:
    """Give a file or folder the name NAME.RANDOM; nothing is deleted."""
    aside = f"{name}.{secrets.token_hex(4)}"
    rename(path, aside, point=point)
    return path.with_name(aside)


def rename(path: Path, name: str, *, point: str) -> None:
    """Give a file or folder another name in its folder."""
    _check(path)
    fault(point)
    os.rename(path, path.with_name(name))


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it, as far as that is possible; nothing is said."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Delete what writes and new folders that were interrupted have left in a folder, at any depth.
    For who holds it: what is being written looks the same."""
    for pattern in (".tmp.*", ".*.partial"):
        for left in list(folder.rglob(pattern)):
            remove(left)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk. A folder may be reached by a link: what is waited
    for is the name that something in it was given."""
    flags = os.O_RDONLY | (os.O_DIRECTORY | os.O_CLOEXEC if path.is_dir() else _GUARDED)
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can not sync a folder
            raise
    finally:
        os.close(handle)


def disk_bytes_per_s(folder: Path, num_bytes: int, limit_s: float = 1.0) -> float | None:
    """How fast the disk of a folder takes what is written, measured with a file that never has a
    name and is gone with this call.

    Args:
        folder: or the nearest above it that is there.
        num_bytes: written at most; less where that would take longer than `limit_s`.

    Returns:
        None where it can not be written to, or knows no files without a name.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    block = os.urandom(4 * 2**20)
    try:
        file = os.open(parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        start, written = time.perf_counter(), 0
        while True:
            written += os.write(file, block)
            os.fsync(file)
            took = time.perf_counter() - start
            if written >= num_bytes or took >= limit_s:
                return written / took
    except OSError:
        return None
    finally:
        os.close(file)
