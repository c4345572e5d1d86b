"""Lines of a file, read where they stand. What a line holds is for a parser to say.

Memory: 8 bytes a line, for where it ends.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rlp.data.errors import BadDocument, DataError
from rlp.process.progress import Progress, Tell


class Lines:
    """Lines of a plain file, found by where they end: 8 bytes of memory each."""

    def __init__(
        self,
        path: Path,
        parse: Callable[[str], object],
        progress: Tell = Progress,
        find_ends: Callable[[BinaryIO, Progress], np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            parse: text of a line -> the row, or BadDocument.
            progress: as in `open_rows`.
            find_ends: where lines end, if at other places than line ends.
        """
        self._path = path
        self._parse = parse
        with open(path, "rb") as file:
            self._stamp = _stamp(file.fileno())
            with progress(f"finding the lines of {path}", self._stamp[0], "bytes") as found:
                self._ends = (find_ends or line_ends)(file, found)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> object:
        start = int(self._ends[index - 1]) if index else 0
        try:
            with open(self._path, "rb") as file:
                changed = _stamp(file.fileno()) != self._stamp
                file.seek(start)
                line = file.read(int(self._ends[index]) - start)
        except OSError as error:
            raise DataError(
                f"{self._path} can not be read any more: {error}. Put it back, and continue with"
                " run.resume=auto."
            ) from error
        if changed:
            raise DataError(
                f"{self._path} has changed since this run opened it, so its lines are no longer"
                " where they were. Leave files alone that a run reads; put it back, and continue"
                " with run.resume=auto."
            )

        try:
            text = line.decode().removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise BadDocument("not UTF-8", f"{error}; expected text in UTF-8") from error
        if not text.strip():
            raise BadDocument("empty line", "expected a document on each line")
        return self._parse(text)


def _stamp(file: int) -> tuple[int, int]:
    """(bytes, time of the last change) of an open file."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def line_ends(file: BinaryIO, found: Progress) -> np.ndarray:
    """[rows] int64: offset right after each line; a last line needs no line end."""
    ends, offset = [], 0
    while chunk := file.read(2**24):
        ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + offset + 1)
        offset += len(chunk)
        found.advance(len(chunk))
    ends = np.concatenate([np.zeros(0, dtype=np.int64), *ends])
    return ends if offset == (ends[-1] if len(ends) else 0) else np.append(ends, offset)


def parse_json(line: str) -> dict:
    """A line of a .jsonl file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument(
            "broken JSON", f"{error}; expected one JSON object on the line"
        ) from error
    if not isinstance(value, dict):
        raise BadDocument(
            "not a JSON object",
            f'got {type(value).__name__}; expected an object such as {{"text": ...}}',
        )
    return value
