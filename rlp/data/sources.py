"""Rows of files, globs and Hub data sets, each of which can be read at once.

    jsonl, text    lines, read from the file where they stand (`lines`)
    csv, tsv       records below a header, likewise (`records`)
    gz, zst        unpacked once, and read there (`unpacked`)
    parquet        written once as an Arrow file, which is memory-mapped (`unpacked`)
    hub:OWNER/NAME prepared by `datasets`, in its own cache

Memory does not grow with a corpus but by 8 bytes a line. What a row must hold is not known here.
"""

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow

from rlp.config import DataConfig
from rlp.data import unpacked
from rlp.data.errors import BadDocument, DataError
from rlp.data.hub import settle_hub
from rlp.data.lines import Lines, parse_json
from rlp.data.records import Records
from rlp.data.unpacked import UNPACKERS, converted, parquet_to_arrow
from rlp.process.progress import Progress, Tell

if TYPE_CHECKING:
    from datasets import Dataset


SAMPLED_BYTES = 2**20
"""Of a file, evenly spread, that say whether it is the same file."""


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
            paths = _expand(source, key)
            tables.append([_file_table(path, config, key, progress) for path in paths])

    rows = Rows(tables)
    for source, size in zip(sources, rows.source_sizes):
        if size == 0:
            raise DataError(f"{key}: {source!r} holds no row. Expected at least one document.")
    return rows


def _expand(source: str, key: str) -> list[str]:
    """The files that a path or a glob names."""
    if "\0" in source:
        raise DataError(f"{key}: {source!r} is no path: it holds a NUL.")
    paths = [source]
    if has_magic(source) and not os.path.exists(source):
        paths = sorted(glob(source, recursive=True))

    files = [path for path in paths if os.path.isfile(path) and os.path.getsize(path) > 0]
    if not files:
        empty = any(os.path.isfile(path) for path in paths)
        found = "an empty file" if empty else _what_else(source)
        raise DataError(
            f"{key}: {found} at {source!r} (looked from {Path.cwd()}). Write the path of a {KINDS}"
            " file, a glob that matches some, or hub:OWNER/NAME."
        )
    return files


def _what_else(source: str) -> str:
    """What is there in place of files."""
    if not os.path.isdir(source):
        return "something that is no file" if os.path.exists(source) else "no file"
    endings = Counter(map(_plain_ending, os.listdir(source)))
    known = [ending for ending, _ in endings.most_common() if ending in FORMATS]
    if not known:
        return "a folder, and no file,"
    example = os.path.join(source, "*" + known[0])
    return f"a folder, and no file (its files are named by a glob: {example!r}),"


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
    """`data.format`, or what the ending says."""
    if wanted != "auto":
        return wanted
    kind = FORMATS.get(_plain_ending(path))
    if kind is None:
        raise DataError(
            f"{key}: can not tell the format of {path!r} by its ending. Write data.format=jsonl,"
            " parquet, csv, tsv or text."
        )
    return kind


DELIMITERS = {"csv": ",", "tsv": "\t"}

PARSERS = {"jsonl": parse_json, "text": lambda line: {"text": line}}

UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    pyarrow.ArrowException,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
)
"""What a damaged file makes its readers raise."""


def _file_table(path: str, config: DataConfig, key: str, progress: Tell) -> Table:
    """A file of a format that is read here.

    Raises:
        DataError: its format is not told by its ending, or it can not be read.
    """
    kind = _format_of(path, config.format, key)
    try:
        plain = Path(path)
        if plain.suffix in UNPACKERS:
            plain = converted(plain, UNPACKERS[plain.suffix], progress)

        if kind in DELIMITERS:
            records = Records(plain, config.delimiter or DELIMITERS[kind], progress)
            return Table(path, records, identity(Path(path)), records.line_of)
        if kind == "parquet":
            rows = ArrowRows(converted(plain, parquet_to_arrow, progress))
        else:
            rows = Lines(plain, PARSERS[kind], progress)
        return Table(path, rows, identity(Path(path)))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise DataError(
            f"{key}: {path!r} can not be read: {reason}. Expected a readable {KINDS} file, whole,"
            f" and plain, gz or zst; what is unpacked goes to {unpacked.UNPACKED} (HF_HOME moves"
            " it)."
        ) from error


def identity(path: Path) -> str:
    """Of a file: its size and a checksum of `SAMPLED_BYTES` of it, of the whole where it is
    smaller."""
    size, block = path.stat().st_size, 2**16
    starts = range(0, size, block)
    if size > SAMPLED_BYTES:
        count = SAMPLED_BYTES // block
        starts = [(size - block) * i // (count - 1) for i in range(count)]
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            checksum.update(file.read(block))
    return f"{size} bytes, sha256 {checksum.hexdigest()[:16]}"


class ArrowRows:
    """Rows of an Arrow file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = map(self._reader.get_batch, range(self._reader.num_record_batches))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

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
        found = datasets.load_dataset(name, *filter(None, [subset]), split=split)
        rows = HubRows(found.with_format("arrow"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        said = str(cause).strip().splitlines()
        reason = said[0].rstrip(".") if said else type(cause).__name__
        raise DataError(
            f"{key}: {source!r} can not be read: {reason}. Expected a Hub data set that this"
            f" machine can reach, or has in its cache {datasets.config.HF_DATASETS_CACHE}."
        ) from error
    return Table(source, rows, f"{len(rows)} rows")
