"""Rows of files, globs and Hub data sets, each of which can be read at once.

    jsonl, text    lines, read from the file where they stand
    csv, tsv       records below a header, likewise; a record ends at a line end that no quotes hold
    gz, zst        unpacked once into `UNPACKED`, whole or not at all, and read there
    parquet        written once into `UNPACKED` as an Arrow file, which is memory-mapped
    hub:OWNER/NAME prepared by `datasets`, in its own cache

Memory does not grow with a corpus but by 8 bytes a line. What a row must hold is not known here.
"""

import codecs
import csv
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow
from filelock import AcquireReturnProxy, FileLock, Timeout
from huggingface_hub import constants
from pyarrow import parquet

from rlp.config import DataConfig
from rlp.data.hub import settle_hub
from rlp.process.files import give_name, make_folder, new_file
from rlp.process.progress import Progress, Tell

if TYPE_CHECKING:
    from datasets import Dataset


UNPACKED = Path(constants.HF_HOME) / "rlp" / "unpacked"
"""Where unpacked files are kept (`HF_HOME` moves it); deleting it costs unpacking them again."""

LOOK_S = 1.0
"""How often a rank looks how far another one is that unpacks a file."""

MAX_EXPANSION, EXPANSION_MARGIN_BYTES = 200, 2**27
"""A compressed file may unpack to so many times its size, plus the margin. Text shrinks to a third
or a twentieth; a file made to fill a disk, to a thousandth."""

SAMPLED_BYTES = 2**20
"""Of a file, evenly spread, that say whether it is the same file."""


class DataError(Exception):
    """Data that can not be used. The message says where, what came, what was expected and what to
    write."""


class BadDocument(Exception):
    """One row that can not become a document: (reason, detail)."""


@dataclass(frozen=True, slots=True)
class Table:
    """A file, or a Hub data set."""

    name: str
    rows: Sequence
    """Reading one gives a mapping from field to value, or raises BadDocument."""
    identity: str
    """Differs where the content does."""
    line_of: Callable[[int], int] = lambda row: row + 1
    """Where a row begins, for messages: its line in the file, or its number where there are no
    lines."""


class Rows:
    """Rows of all tables, numbered from 0."""

    def __init__(self, sources: list[list[Table]]) -> None:
        """
        Args:
            sources: the tables of each entry of `data.train`.
        """
        self.tables = [table for tables in sources for table in tables]
        self.source_sizes = [sum(len(table.rows) for table in tables) for tables in sources]
        self._starts = np.cumsum([0, *(len(table.rows) for table in self.tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        """File and line of a row."""
        table, row = self._locate(index)
        return f"{self.tables[table].name}:{self.tables[table].line_of(row)}"

    def read(self, index: int) -> dict:
        """A row as a mapping from field to value."""
        table, line = self._locate(index)
        return self.tables[table].rows[line]

    def _locate(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._starts, index, side="right")) - 1
        return table, index - int(self._starts[table])


def open_rows(
    sources: list[str], config: DataConfig, split: str, key: str, progress: Tell = Progress
) -> Rows:
    """Open files, globs or a Hub data set.

    Args:
        sources: as `data.train`.
        split: split of a Hub data set.
        key: the config key, for messages.
        progress: makes a `Progress`, for files that take long to unpack or to find the lines of.

    Raises:
        DataError: nothing there, unreadable, or no row at all.
    """
    tables = []
    for source in sources:
        if source.startswith("hub:"):
            tables.append([_hub_table(source, split, key)])
        else:
            tables.append(
                [
                    _file_table(
                        path, _format_of(path, config.format, key), config.delimiter, key, progress
                    )
                    for path in _expand(source, key)
                ]
            )
    rows = Rows(tables)
    for source, size in zip(sources, rows.source_sizes):
        if size == 0:
            raise DataError(f"{key}: {source!r} holds no row. Expected at least one document.")
    return rows


def _expand(source: str, key: str) -> list[str]:
    if "\0" in source:
        raise DataError(f"{key}: {source!r} is no path: it holds a NUL.")
    paths = (
        sorted(glob(source, recursive=True))
        if has_magic(source) and not os.path.exists(source)
        else [source]
    )
    files = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) > 0]
    if not files:
        found = (
            "an empty file" if any(os.path.isfile(path) for path in paths) else _what_else(source)
        )
        raise DataError(
            f"{key}: {found} at {source!r} (looked from {Path.cwd()}). Write the path of a {KINDS}"
            " file, a glob that matches some, or hub:OWNER/NAME."
        )
    return files


def _what_else(source: str) -> str:
    """What is there in place of files."""
    if os.path.isdir(source):
        endings = Counter(
            ending for name in os.listdir(source) if (ending := _plain_ending(name)) in FORMATS
        )
        example = (
            " (its files are named by a glob:"
            f" {os.path.join(source, '*' + endings.most_common(1)[0][0])!r})"
            if endings
            else ""
        )
        return f"a folder, and no file{example},"
    return "something that is no file" if os.path.exists(source) else "no file"


FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
"""What a file is, by its ending."""

KINDS = ".jsonl, .parquet, .csv, .tsv or .txt"
"""For messages."""


def _plain_ending(path: str) -> str:
    """The ending of a file before it was packed."""
    endings = [suffix for suffix in Path(path).suffixes if suffix not in UNPACKERS]
    return endings[-1] if endings else ""


def _format_of(path: str, wanted: str, key: str) -> str:
    if wanted != "auto":
        return wanted
    kind = FORMATS.get(_plain_ending(path))
    if kind is None:
        raise DataError(
            f"{key}: can not tell the format of {path!r} by its ending. Write data.format=jsonl,"
            " parquet, csv, tsv or text."
        )
    return kind


def _file_table(path: str, form: str, delimiter: str | None, key: str, progress: Tell) -> Table:
    try:
        plain = Path(path)
        if plain.suffix in UNPACKERS:
            plain = _converted(plain, UNPACKERS[plain.suffix], progress)
        if form == "parquet":
            rows = ArrowRows(_converted(plain, _parquet_to_arrow, progress))
        elif form in DELIMITERS:
            rows = Records(plain, delimiter or DELIMITERS[form], progress)
            return Table(path, rows, identity(Path(path)), rows.line_of)
        else:
            rows = Lines(
                plain, {"jsonl": _parse_json, "text": lambda text: {"text": text}}[form], progress
            )
        return Table(path, rows, identity(Path(path)))
    except (
        OSError,
        EOFError,
        zlib.error,
        pyarrow.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise DataError(
            f"{key}: {path!r} can not be read: {reason}. Expected a readable {KINDS} file, whole,"
            f" and plain, gz or zst; what is unpacked goes to {UNPACKED} (HF_HOME moves it)."
        ) from error


def identity(path: Path) -> str:
    """Of a file: its size and a checksum of `SAMPLED_BYTES` of it, of the whole where it is
    smaller."""
    size, block = path.stat().st_size, 2**16
    last = max(size - block, 0)
    starts = (
        range(0, size, block)
        if size <= SAMPLED_BYTES
        else (last * i // (SAMPLED_BYTES // block - 1) for i in range(SAMPLED_BYTES // block))
    )
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            checksum.update(file.read(block))
    return f"{size} bytes, sha256 {checksum.hexdigest()[:16]}"


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
                self._ends = (find_ends or _line_ends)(file, found)

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
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _line_ends(file: BinaryIO, found: Progress) -> np.ndarray:
    """[rows] int64: offset right after each line; a last line needs no line end."""
    ends, offset = [], 0
    while chunk := file.read(2**24):
        ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + offset + 1)
        offset += len(chunk)
        found.advance(len(chunk))
    ends = np.concatenate([np.zeros(0, dtype=np.int64), *ends])
    return ends if offset == (ends[-1] if len(ends) else 0) else np.append(ends, offset)


DELIMITERS = {"csv": ",", "tsv": "\t"}


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
            lines = (
                int(self._first_lines[index + 2] - self._first_lines[index + 1])
                if self._first_lines is not None
                else 1
            )
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
        scan, ends, lines = _QuoteScan(self._delimiter), [], []
        while chunk := file.read(2**20):
            here, newlines = scan.ends(chunk)
            ends.append(here)
            lines.append(newlines)
            found.advance(len(chunk))
        ends, lines = (
            np.concatenate([np.zeros(0, dtype=np.int64), *parts]) for parts in (ends, lines)
        )
        if scan.is_open:
            raise ValueError(
                "the quote in the record that begins in line"
                f" {1 + (int(lines[-1]) if len(lines) else 0)} is never closed, so it may be"
                " cut off"
            )
        if scan.offset > (ends[-1] if len(ends) else 0):
            ends, lines = np.append(ends, scan.offset), np.append(lines, scan.lines + 1)
        if len(lines) and lines[-1] > len(lines):
            self._first_lines = np.concatenate([[0], lines]) + 1
        return ends


class _QuoteScan:
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
        newlines = (
            np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + self.offset + 1
        )
        ends = (
            newlines
            if not self.quoted and b'"' not in chunk
            else np.array(self._walk(chunk), dtype=np.int64)
        )
        lines = np.searchsorted(newlines, ends, side="right") + self.lines
        self.offset, self.lines, self._previous = (
            self.offset + len(chunk),
            self.lines + len(newlines),
            chunk[-1:],
        )
        return ends, lines

    def _walk(self, chunk: bytes) -> list[int]:
        if self.offset == 0 and chunk.startswith(codecs.BOM_UTF8):
            chunk = chunk.replace(
                codecs.BOM_UTF8, 3 * self._delimiter, 1
            )  # a quote behind it is at the start of a field
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


def _parse_json(line: str) -> dict:
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


class ArrowRows:
    """Rows of an Arrow file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._starts = np.cumsum(
            [
                0,
                *(
                    self._reader.get_batch(index).num_rows
                    for index in range(self._reader.num_record_batches)
                ),
            ]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict:
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return _plain_row(self._reader.get_batch(batch).slice(index - int(self._starts[batch]), 1))


class HubRows:
    """Rows of a data set in the format `arrow`."""

    def __init__(self, tables: "Dataset") -> None:
        self._tables = tables

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, index: int) -> dict:
        return _plain_row(self._tables[index])


def _plain_row(table: pyarrow.Table | pyarrow.RecordBatch) -> dict:
    """The single row of a table, as plain values."""
    try:
        return table.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        raise BadDocument("unreadable cell", f"{error}; expected text in UTF-8") from error


def _converted(path: Path, convert: Callable[[Path, BinaryIO], None], progress: Tell) -> Path:
    """The plain form of a file, made the first time and kept; ranks wait for the one that makes
    it."""
    status = path.stat()
    name = hashlib.sha256(
        f"{convert.__name__} {path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
    ).hexdigest()
    make_folder(UNPACKED, exist_ok=True)
    plain = UNPACKED / name
    with _waited_for(FileLock(UNPACKED / f"{name}.lock"), path, f"{name}.*.partial", progress):
        if not plain.exists():
            with progress(f"unpacking {path}", None, "bytes") as unpacked:
                _write_whole(
                    plain,
                    path,
                    convert,
                    MAX_EXPANSION * status.st_size + EXPANSION_MARGIN_BYTES,
                    unpacked,
                )
    return plain


def _waited_for(lock: FileLock, path: Path, partial: str, progress: Tell) -> AcquireReturnProxy:
    """The lock, held. While another process holds it, what that one writes is progress.

    Args:
        partial: matches the file that is being written.
    """
    with progress(f"waiting for another process to unpack {path}", None, "bytes") as waited:
        seen = 0
        while True:
            try:
                return lock.acquire(timeout=LOOK_S)
            except Timeout:
                written = sum(_size(file) for file in UNPACKED.glob(partial))
            if written != seen:
                waited.advance(max(0, written - seen))
                seen = written


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # it has its name


def _write_whole(
    plain: Path,
    path: Path,
    convert: Callable[[Path, BinaryIO], None],
    bound: int,
    unpacked: Progress,
) -> None:
    """Make the plain file, all of it or nothing."""
    partial = plain.with_name(f"{plain.name}.{secrets.token_hex(8)}.partial")
    with new_file(partial, point="unpack.torn_file") as file:
        bounded = _BoundedFile(file, bound, unpacked)
        convert(path, bounded)
        if file.tell() == 0:
            raise OSError("it holds nothing")
    give_name(partial, plain)


class _BoundedFile:
    """A file that refuses to grow beyond `bound` bytes, and tells how far it is. Whoever opened it
    closes it."""

    closed = False

    def __init__(self, file: BinaryIO, bound: int, unpacked: Progress) -> None:
        self._file, self._bound, self._unpacked = file, bound, unpacked
        self.tell, self.flush = file.tell, file.flush

    def close(self) -> None:
        pass

    def write(self, content: bytes) -> int:
        if self._file.tell() + len(content) > self._bound:
            raise OSError(
                f"it unpacks to more than {self._bound:,} bytes, {MAX_EXPANSION} times its size; "
                "if that is right, unpack it yourself"
            )
        self._unpacked.advance(len(content))
        return self._file.write(content)


def _gunzip(path: Path, plain: BinaryIO) -> None:
    with gzip.open(path) as file:
        shutil.copyfileobj(file, plain, 2**20)


def _unzstd(path: Path, plain: BinaryIO) -> None:
    """Frame by frame. The library takes a file that ends inside a frame for a whole one, so the end
    is looked for here."""
    try:
        import zstandard
    except ImportError as error:
        raise OSError(
            "the package zstandard is not installed; run pip install zstandard"
        ) from error
    decompressor, frame = zstandard.ZstdDecompressor(), None
    with open(path, "rb") as file:
        # Four bytes can stand for 128 KiB: what comes out of a small piece is small enough.
        while piece := file.read(2**12):
            while piece:
                frame = frame or decompressor.decompressobj()
                try:
                    plain.write(frame.decompress(piece))
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a frame")


UNPACKERS = {".gz": _gunzip, ".zst": _unzstd}


def _parquet_to_arrow(path: Path, plain: BinaryIO) -> None:
    """The same rows as an Arrow file. What the file says of itself besides its columns is left
    behind."""
    with parquet.ParquetFile(path) as file:
        writer = None
        for batch in file.iter_batches(batch_size=256):
            columns = [
                (
                    column.dictionary_decode()
                    if isinstance(column, pyarrow.DictionaryArray)
                    else column
                )
                for column in batch.columns
            ]
            batch = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
            writer = writer or pyarrow.ipc.new_file(plain, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
    pyarrow.default_memory_pool().release_unused()


_HUB_NAME = re.compile(r"(?!buckets/)\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""`datasets` takes a bare word for one of its own readers where it has one of that name, and then
reads what lies here."""


def _hub_table(source: str, split: str, key: str) -> Table:
    """A Hub data set through `datasets`, its errors turned into ours.

    Rows are read as Arrow holds them: what the data set says of its columns may have files and
    addresses opened.
    """
    name, _, subset = source.removeprefix("hub:").partition("@")
    if not _HUB_NAME.fullmatch(name) or name.endswith(".py") or os.path.exists(name):
        raise DataError(
            f"{key}: {source!r} is no name of a Hub data set. Write hub:OWNER/NAME or"
            " hub:OWNER/NAME@CONFIG; files are named without hub:."
        )
    settle_hub()
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = HubRows(
            datasets.load_dataset(name, *filter(None, [subset]), split=split).with_format("arrow")
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()
        raise DataError(
            f"{key}: {source!r} can not be read:"
            f" {reason[0].rstrip('.') if reason else type(cause).__name__}. Expected a Hub data set"
            " that this machine can reach, or has in its cache"
            f" {datasets.config.HF_DATASETS_CACHE}."
        ) from error
    return Table(source, rows, f"{len(rows)} rows")
