"""The logs of a run: JSON lines that a crash can tear at the end only, and that a resume cuts
back."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rlp.process.faults import fault
from rlp.process.files import append, cut, open_to_read, remove, sync
from rlp.process.json_files import DamagedFileError, refuse_non_finite
from rlp.process.run_folder import RunFolder
from rlp.process.schemas import RUN_FILES


class Log:
    """A JSONL file that this process adds lines to: what it should hold, in numbers, and what the
    disk has refused so far."""

    def __init__(
        self, path: Path, size: int = 0, lines: int = 0, digest: "hashlib._Hash | None" = None
    ) -> None:
        self.path = path
        self.size, self.lines, self._digest = size, lines, digest or hashlib.sha256()
        self._torn = False
        """Whether a failed attempt may have left something behind the good part of the file."""
        self.waiting = b""
        """Lines that the disk has refused; they count in `size`, `lines` and the digest."""
        self._step = -1
        self._before = self._state()
        """As it was before the first line of the newest step."""

    @classmethod
    def of(cls, path: Path) -> "Log":
        """Of a file that is there, or is not."""
        log = cls(path)
        with suppress(FileNotFoundError), open_to_read(path) as file:
            for line in _lines(file, path):
                log.count(line)
        return log

    def add(self, step: int, line: bytes) -> None:
        """Count a line and try to write it, with all that waits."""
        if step > self._step:
            self._step, self._before = step, self._state()
        self.count(line)
        self.waiting += line
        with suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: it waits on.
        """
        if self.waiting:
            fault("append.before_line")
            good = self.size - len(self.waiting) if self._torn else None
            self._torn = True
            append(self.path, self.waiting, point="append.torn_line", size=good)
            self.waiting, self._torn = b"", False
            fault("append.after_line")

    def mark(self, step: int) -> dict:
        """What a checkpoint of a step says of the log: size, lines and checksum up to that step. A
        step that was given up after it may have lines; those do not count."""
        size, lines, digest = self._before if self._step > step else self._state()
        return {"bytes": size, "lines": lines, "sha256": digest.hexdigest()}

    def _state(self) -> tuple[int, int, "hashlib._Hash"]:
        return self.size, self.lines, self._digest.copy()

    def count(self, line: bytes) -> None:
        """Take a line for one that the file holds."""
        self.size, self.lines = self.size + len(line), self.lines + 1
        self._digest.update(line)


_logs: dict[Path, Log] = {}
"""Of this process, by path."""


def append_json_line(path: Path, value: dict) -> None:
    """Add one object to a log of the run, in one write; a crash can tear the last line and no
    other.

    Where the disk refuses, lines wait in memory and go with the next one: each is written once, in
    order, or, where the process ends first, belongs to steps after the newest checkpoint
    (`settle_logs`).

    Raises:
        ValueError: a number in it is not finite.
    """
    refuse_non_finite(value, path.name)
    if path not in _logs:
        _logs[path] = Log.of(path)
    _logs[path].add(value.get("step", 0), (json.dumps(value, allow_nan=False) + "\n").encode())


def forget_logs(folder: RunFolder) -> None:
    """Take nothing for known of a folder that is new: an earlier one of this process may have had
    its name."""
    for path in folder.logs_of_steps:
        _logs.pop(path, None)


def settle_logs(folder: RunFolder) -> None:
    """Write what was refused so far, and wait until all logs are on disk: a checkpoint of a step is
    good only with the logs up to it.

    Raises:
        OSError: a log can still not be written.
    """
    for path in folder.logs_of_steps:
        if path in _logs:
            _logs[path].flush()
        if path.exists():
            sync(path)
    sync(folder.path)


def mark_logs(folder: RunFolder, step: int) -> dict[str, dict]:
    """What the logs hold up to a step, by file name, for `cut_logs` of a run that continues from
    there."""
    return {path.name: _logs[path].mark(step) for path in folder.logs_of_steps if path in _logs}


def refused_logs(folder: RunFolder) -> list[str]:
    """Names of the logs whose last lines wait in memory, because the disk is full or broken."""
    return [path.name for path in folder.logs_of_steps if path in _logs and _logs[path].waiting]


def cut_logs(folder: RunFolder, step: int, marks: dict[str, dict]) -> list[str]:
    """Make every log end with a step, so that a run that continues says each step once; and remove
    what a crash left half written. Kept lines keep their bytes. Needs no room on the disk, and
    memory for one line.

    All logs are read before one is changed.

    Args:
        step: the last step that the checkpoint has applied; -1: nothing is kept.
        marks: of `mark_logs`, by the checkpoint; a log without one is read line by line.

    Returns:
        what has changed in logs since the checkpoint, in words: lines of them were lost, or edited.

    Raises:
        DamagedFileError: a line that has to be kept, and is not the last, is no JSON object with a
            step.
        OSError: a log can not be cut.
    """
    kept, found = {}, []
    for path in folder.logs_of_steps:
        mark = marks.get(path.name, _NOTHING)
        log = _kept(path, step, mark)
        if log is None:
            log = _kept(path, step, _NOTHING)
            found.append(
                f"{path.name} is not what it was when the checkpoint of step {step} was made: it"
                f" had {mark['lines']} lines ({mark['bytes']:,} bytes) then, and has {log.lines}"
                f" ({log.size:,} bytes) of those steps now; lines of it were lost or changed. The"
                " run does not need them, and goes on."
            )
        kept[path] = log

    for path, log in kept.items():
        if path.exists() and path.stat().st_size > log.size:
            cut(path, log.size, point="resume.before_truncate")
        _logs[path] = log
    remove_unfinished(folder)
    return found


def remove_unfinished(folder: RunFolder) -> None:
    """Remove what a crash left half written."""
    for left in (*folder.path.glob(".*.partial"), *folder.path.glob(".tmp.*")):
        remove(left)


_NOTHING = {"bytes": 0, "lines": 0, "sha256": hashlib.sha256().hexdigest()}
"""The mark of a log that has no line."""


def _kept(path: Path, step: int, mark: dict) -> Log | None:
    """What a log holds up to a step; None where it does not begin with what the mark says."""
    log, begins = Log(path), mark == _NOTHING
    with open_to_read(path) if path.exists() else io.BytesIO() as file:
        lines = _lines(file, path) if step >= 0 else ()
        for number, line in enumerate(lines, start=1):
            if not begins and log.size >= mark["bytes"]:
                begins = log.mark(step) == mark
                if not begins:
                    return None
            if begins and not _belongs(line, step, f"{path}, line {number}"):
                break
            log.count(line)
    return log if begins or log.mark(step) == mark else None


def _belongs(line: bytes, step: int, where: str) -> bool:
    """Whether a line is whole, and of a step up to this one.

    Raises:
        DamagedFileError: it has no step, and no crash can have torn it.
    """
    value, whole = _object(line), line.endswith(b"\n")
    if value is None and not whole:
        return False
    if value is None or type(value.get("step")) is not int:
        raise DamagedFileError(
            f'{where}: expected a JSON object with a whole number "step", got {line[:80]!r}. Only a'
            " last line can be torn by a crash, so something else has changed the file. Mend or"
            " remove the line."
        )
    return whole and value["step"] <= step


def read_json_lines(path: Path) -> list[dict]:
    """Every whole line of a JSONL file, in order. A torn last line, of a run that was killed, is
    left out.

    Raises:
        DamagedFileError: a line before the last is no JSON object, or a line has not the schema of
            the file (`RUN_FILES`).
    """
    return list(json_lines(path))


def json_lines(path: Path) -> Iterator[dict]:
    """`read_json_lines`, one at a time: in memory is one."""
    schema = RUN_FILES.get(path.name)
    with open_to_read(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            value = _object(line)
            if value is None and line.endswith(b"\n"):
                raise DamagedFileError(
                    f"{path}, line {number}: expected a JSON object, got {line[:80]!r}. Only a last"
                    " line can be torn by a crash, so something else has changed the file. Mend or"
                    " remove the line."
                )
            if value is None:
                continue
            if schema is not None and (said := schema.problem(value, "")):
                raise DamagedFileError(
                    f"{path}, line {number}: {said}. No run writes this, so something else has"
                    " changed the file."
                )
            yield value


MAX_LINE_BYTES = 2**26
"""Of a line of a log; a thought of a million tokens takes a tenth of it."""


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise DamagedFileError(
                f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes, which no run has"
                " written."
            )
        yield line


def _object(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
