"""What texts have in common with others, by runs of ten words: near-duplicates within a corpus, and
documents that a benchmark's file has too.

A run is a checksum of 8 bytes. Of a document that is compared with a corpus the `SAMPLE` least
checksums stand for all of its runs: two texts that are nearly the same share nearly the same ones.
A benchmark's runs are all held, and all of a document's are looked up.

Dimensions
    n  documents
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rlp.config import ConfigError, DataConfig
from rlp.data.errors import BadDocument
from rlp.data.sources import Rows, open_rows
from rlp.post.diversity_measures import runs

RUN_WORDS = 10
"""Words of a run, as in the paper; a text with fewer is one run."""

SAMPLE = 16
"""Runs that stand for a document."""

NONE = np.uint64(2**64 - 1)
"""In place of a run, where a document has fewer than `SAMPLE`."""

AT_ONCE_BYTES = 2**26
"""Of checksums that are sorted together."""


def run_checksums(text: str) -> np.ndarray:
    """[runs] uint64 of the different runs of a text, in rising order; none of a text without
    words."""
    (found,) = runs([text], RUN_WORDS)
    written = [" ".join(run).encode() for run in found if run]
    digests = [hashlib.blake2b(run, digest_size=8).digest() for run in written]
    return np.unique(np.frombuffer(b"".join(digests), dtype=np.uint64))


def sample_of(checksums: np.ndarray) -> np.ndarray:
    """[SAMPLE] uint64, the least ones."""
    sample = np.full(SAMPLE, NONE)
    sample[: len(checksums)] = checksums[:SAMPLE]
    return sample


def seen_before(samples: np.ndarray, pieces: int = 1024) -> np.ndarray:
    """[n] float32: of each document the share of its sampled runs that a document before it has
    among its own; NaN where it has none.

    Checksums are sorted in as many passes over the samples as keep each below `AT_ONCE_BYTES`.

    Args:
        samples: [n, SAMPLE] uint64, may be mapped from disk.
        pieces: documents that are read together.
    """
    count = len(samples)
    passes = max(1, -(-count * SAMPLE * 16 // AT_ONCE_BYTES))
    own, before = np.zeros(count, dtype=np.uint8), np.zeros(count, dtype=np.uint8)
    for one in range(passes):
        run, document = _of_pass(samples, one, passes, pieces)
        order = np.argsort(run, kind="stable")  # of equal runs the earliest document first
        run, document = run[order], document[order]
        begins = np.concatenate([[True], run[1:] != run[:-1]]) if len(run) else np.zeros(0, bool)
        np.add.at(own, document, 1)
        np.add.at(before, document[~begins], 1)
    with np.errstate(invalid="ignore"):
        return before.astype(np.float32) / own.astype(np.float32)


def _of_pass(
    samples: np.ndarray, one: int, passes: int, pieces: int
) -> tuple[np.ndarray, np.ndarray]:
    """(checksums, documents) of one of several equal parts of all checksums."""
    found, documents = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for start in range(0, len(samples), pieces):
        rows = np.asarray(samples[start : start + pieces])
        wanted = (rows % np.uint64(passes) == one) & (rows != NONE)
        found.append(rows[wanted])
        documents.append(start + np.nonzero(wanted)[0])
    return np.concatenate(found), np.concatenate(documents)


def is_duplicate(share: np.ndarray, same_share: float) -> np.ndarray:
    """[n] bool: at least `same_share` of the runs were seen before."""
    return np.nan_to_num(share) >= same_share


def texts_of(row: dict) -> str:
    """All texts of a row, one after the other."""
    return "\n".join(value for value in row.values() if isinstance(value, str))


def benchmark_runs(
    paths: Sequence[Path], on_row: Callable[[], None] = lambda: None
) -> frozenset[int]:
    """Checksums of every run of the texts in these files; all text fields of a row are one text.

    Raises:
        ConfigError: a row can not be read.
        DataError: a file is not there, or is empty.
    """
    found: set[int] = set()
    for path in paths:
        for text in _texts(open_rows([str(path)], DataConfig(train=[str(path)]), "test", OPTION)):
            found.update(run_checksums(text).tolist())
            on_row()
    return frozenset(found)


OPTION = "--decontaminate"


def _texts(rows: Rows) -> Iterator[str]:
    for index in range(len(rows)):
        try:
            yield texts_of(rows.read(index))
        except BadDocument as error:
            reason, detail = error.args
            raise ConfigError(f"{OPTION}: {rows.where(index)}: {reason}: {detail}.") from error


def new_texts(
    texts: Iterable[str], seen: set[int], same_share: float = 0.5
) -> Iterator[tuple[str, bool]]:
    """Each text, and whether it is new: less than `same_share` of its runs are among those seen,
    which a new one's join. For a pool in memory, where all runs of a text count."""
    for text in texts:
        own = run_checksums(text).tolist()
        is_new = bool(own) and sum(run in seen for run in own) < same_share * len(own)
        if is_new:
            seen.update(own)
        yield text, is_new
