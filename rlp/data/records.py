"""Records of a CSV file (RFC 4180), read where they stand.

A record ends at a line end that no quotes hold, so ends are found by following the quotes from the
first byte on.
"""

import codecs
import csv
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rlp.data.errors import BadDocument
from rlp.data.lines import Lines
from rlp.process.progress import Progress, Tell


class Records:
    """Rows of a CSV file (RFC 4180), found by where they end: 8 bytes of memory each, 16 where
    quotes hold line ends. Every field is text.

    The first record names the fields. A record of another number of fields is a bad document.
    """

    def __init__(self, path: Path, delimiter: str, progress: Tell = Progress) -> None:
        """
        Raises:
            ValueError: the header is no list of different names, or a quote is never closed.
        """
        self._delimiter = delimiter
        self._first_lines: np.ndarray | None = None
        self._records = Lines(path, self._fields, progress, self._find_ends)
        self._names = self._header() if len(self._records) else []

    def __len__(self) -> int:
        return max(0, len(self._records) - 1)

    def __getitem__(self, index: int) -> dict:
        fields = self._records[index + 1]
        if len(fields) != len(self._names):
            lines = self.line_of(index + 1) - self.line_of(index)
            span = f" in {lines} lines, held together by quotes" if lines > 1 else ""
            raise BadDocument(
                "broken CSV",
                f"{len(fields)} fields{span}; the header names {len(self._names)}:"
                f" {', '.join(self._names)}",
            )
        return dict(zip(self._names, fields))

    def line_of(self, index: int) -> int:
        """The line of the file in which a row begins, 1 for the first."""
        return index + 2 if self._first_lines is None else int(self._first_lines[index + 1])

    def _header(self) -> list[str]:
        try:
            names = self._records[0]
        except BadDocument as error:
            raise ValueError(
                f"the header, its first line: {error.args[0]} ({error.args[1]})"
            ) from error
        if len(set(names)) < len(names) or not all(name.strip() for name in names):
            raise ValueError(f"the header, its first line, must name each field once, got {names}")
        return names

    def _fields(self, record: str) -> list[str]:
        csv.field_size_limit(2**31 - 1)
        try:
            rows = list(csv.reader([record], delimiter=self._delimiter))
        except csv.Error as error:
            raise BadDocument(
                "broken CSV",
                f"{error}; expected fields with {self._delimiter!r} between them, in double quotes"
                " where they hold it, a quote or a line end",
            ) from error
        return rows[0]

    def _find_ends(self, file: BinaryIO, found: Progress) -> np.ndarray:
        """[records] int64: offset right after each record; and where a record has several lines,
        the line that each begins with."""
        scan, ends, lines = QuoteScan(self._delimiter), [], []
        while chunk := file.read(2**20):
            here, newlines = scan.ends(chunk)
            ends.append(here)
            lines.append(newlines)
            found.advance(len(chunk))
        nothing = np.zeros(0, dtype=np.int64)
        ends, lines = np.concatenate([nothing, *ends]), np.concatenate([nothing, *lines])

        if scan.is_open:
            line = 1 + (int(lines[-1]) if len(lines) else 0)
            raise ValueError(
                f"the quote in the record that begins in line {line} is never closed, so it may"
                " be cut off"
            )
        if scan.offset > (ends[-1] if len(ends) else 0):
            ends, lines = np.append(ends, scan.offset), np.append(lines, scan.lines + 1)
        if len(lines) and lines[-1] > len(lines):
            self._first_lines = np.concatenate([[0], lines]) + 1
        return ends


class QuoteScan:
    """Finds the ends of records in pieces of a file. A quote opens at the start of a field only;
    inside, two of them are one of the text."""

    def __init__(self, delimiter: str) -> None:
        self.quoted = False
        self.offset = self.lines = 0
        """Bytes and line ends seen so far."""
        self._delimiter = delimiter.encode()
        self._event = re.compile(rb"\n|(?<=[\n" + re.escape(self._delimiter) + rb'])"')
        self._previous = b"\n"
        self._undecided = False
        """The last byte was a quote in quotes, which ends them or not."""

    @property
    def is_open(self) -> bool:
        """Whether a quote is still to be closed, were this the end."""
        return self.quoted and not self._undecided

    def ends(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Offsets right after the records that end in the next piece, and how many line ends there
        are up to each."""
        newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
        newlines = newlines + self.offset + 1
        ends = newlines
        if self.quoted or b'"' in chunk:
            ends = np.array(self._walk(chunk), dtype=np.int64)
        lines = np.searchsorted(newlines, ends, side="right") + self.lines

        self.offset += len(chunk)
        self.lines += len(newlines)
        self._previous = chunk[-1:]
        return ends, lines

    def _walk(self, chunk: bytes) -> list[int]:
        """Offsets right after the records that end in the next piece, quote by quote."""
        if self.offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            # A quote behind it is at the start of a field.
            chunk = chunk.replace(codecs.BOM_UTF8, 3 * self._delimiter, 1)
        data, place, ends = self._previous + chunk, 1, []
        if self._undecided:
            self.quoted, self._undecided = data[1:2] == b'"', False
            place += self.quoted

        while True:
            if self.quoted:
                place = data.find(b'"', place) + 1
                self._undecided = place == len(data)
                if place == 0 or self._undecided:
                    break
                self.quoted = data[place : place + 1] == b'"'
                place += self.quoted
            elif (event := self._event.search(data, place)) is None:
                break
            else:
                place = event.end()
                self.quoted = event[0] == b'"'
                if not self.quoted:
                    ends.append(self.offset + place - 1)
        return ends
