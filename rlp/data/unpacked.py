"""Packed files in the plain form that rows are read from: made once, kept, and whole or not there.

gz, zst    what they hold
parquet    an Arrow file, which is memory-mapped
"""

import gzip
import hashlib
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow
from filelock import AcquireReturnProxy, FileLock, Timeout
from huggingface_hub import constants
from pyarrow import parquet

from rlp.process.files import give_name, make_folder, new_file
from rlp.process.progress import Progress, Tell

UNPACKED = Path(constants.HF_HOME) / "rlp" / "unpacked"
"""Where unpacked files are kept (`HF_HOME` moves it); deleting it costs unpacking them again."""

LOOK_S = 1.0
"""How often a rank looks how far another one is that unpacks a file."""

MAX_EXPANSION, EXPANSION_MARGIN_BYTES = 200, 2**27
"""A compressed file may unpack to so many times its size, plus the margin. Text shrinks to a third
or a twentieth; a file made to fill a disk, to a thousandth."""


def converted(path: Path, convert: Callable[[Path, BinaryIO], None], progress: Tell) -> Path:
    """The plain form of a file, made the first time and kept; ranks wait for the one that makes
    it."""
    status = path.stat()
    source = f"{convert.__name__} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.sha256(source.encode()).hexdigest()
    bound = MAX_EXPANSION * status.st_size + EXPANSION_MARGIN_BYTES
    make_folder(UNPACKED, exist_ok=True)
    plain = UNPACKED / name
    with waited_for(FileLock(UNPACKED / f"{name}.lock"), path, f"{name}.*.partial", progress):
        if not plain.exists():
            with progress(f"unpacking {path}", None, "bytes") as unpacked:
                write_whole(plain, path, convert, bound, unpacked)
    return plain


def waited_for(lock: FileLock, path: Path, partial: str, progress: Tell) -> AcquireReturnProxy:
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


def write_whole(
    plain: Path,
    path: Path,
    convert: Callable[[Path, BinaryIO], None],
    bound: int,
    unpacked: Progress,
) -> None:
    """Make the plain file, all of it or nothing."""
    partial = plain.with_name(f"{plain.name}.{secrets.token_hex(8)}.partial")
    with new_file(partial, point="unpack.torn_file") as file:
        bounded = BoundedFile(file, bound, unpacked)
        convert(path, bounded)
        if file.tell() == 0:
            raise OSError("it holds nothing")
    give_name(partial, plain)


class BoundedFile:
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


def parquet_to_arrow(path: Path, plain: BinaryIO) -> None:
    """The same rows as an Arrow file. What the file says of itself besides its columns is left
    behind."""
    with parquet.ParquetFile(path) as file:
        writer = None
        for batch in file.iter_batches(batch_size=256):
            columns = list(batch.columns)
            for index, column in enumerate(columns):
                if isinstance(column, pyarrow.DictionaryArray):
                    columns[index] = column.dictionary_decode()
            batch = pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
            writer = writer or pyarrow.ipc.new_file(plain, batch.schema)
            writer.write_batch(batch)
        if writer is not None:
            writer.close()
    pyarrow.default_memory_pool().release_unused()
