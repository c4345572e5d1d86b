"""The batches of a run, shared by its ranks: each reads and tokenizes its own documents, and those
of the next batch while a step is made.

Which rows a batch holds depends on which are bad, in the order of the stream, and nobody but who
reads a row knows that. So all ranks expect the same rows, each reads those of its own share, and
they tell each other which of these are bad: words, not tokens. Where none is, one exchange makes
the batch. What is read ahead is only tokens of rows: the stream moves on when its step comes.
"""

from typing import TYPE_CHECKING

import numpy as np

from rlp.data.documents import Document
from rlp.data.reader import Found, ReadAhead
from rlp.data.stream import DocumentStream, share_of_rank

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks


class Batches:
    """This rank's share of batch after batch."""

    def __init__(self, stream: DocumentStream, size: int, ranks: "Ranks") -> None:
        """
        Args:
            size: documents of a batch, all ranks together.
        """
        self._stream, self._size, self._ranks = stream, size, ranks
        self._share = share_of_rank(size, ranks.rank, ranks.world_size)
        self._first = 0
        """Number of the batch's first document, since the beginning of the stream."""
        self._judged: dict[int, Exception | None] = {}
        """Rows of this batch, and what is wrong with them: the same on all ranks."""
        self._read: dict[int, Found] = {}
        """Rows that this rank has read for this batch."""
        self._ahead: ReadAhead | None = None

    def next_share(self) -> list[Document]:
        """This rank's documents of the next batch. A collective.

        Raises:
            DataError: on all ranks; as `DocumentStream.take`.
        """
        self._first = self._stream.given
        self._judged, self._read = {}, self._ahead.found() if self._ahead else {}

        mine = self._stream.take(self._size, self._judge)[self._share]
        documents = [Document(row, self._tokens(row), times) for row, times in mine]

        self._first, self._judged, self._read = self._stream.given, {}, {}
        self._ahead = ReadAhead(self._stream.reader, self._expected()[1])
        return documents

    def close(self) -> None:
        """Read no further ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _judge(self, row: int) -> Exception | None:
        if row not in self._judged:
            self._exchange()
        return self._judged[row]

    def _exchange(self) -> None:
        """All ranks learn of the rows that they expect which are bad. A collective."""
        rows, mine = self._expected()
        found = {row: self._find(row) for row in mine}
        bad = {row: what for row, what in found.items() if isinstance(what, Exception)}

        self._judged = dict.fromkeys(rows) | self._judged
        for of_rank in self._ranks.gather(bad):
            self._judged |= of_rank

    def _expected(self) -> tuple[list[int], list[int]]:
        """Rows of the documents that the batch still lacks, if none is bad; those among them that
        fall to this rank."""
        taken = self._stream.given - self._first
        rows = self._stream.expected(self._size - taken)
        first, last = self._share.start - taken, self._share.stop - taken
        return rows, rows[max(0, first) : max(0, last)]

    def _find(self, row: int) -> Found:
        if row not in self._read:
            self._read[row] = self._stream.reader.read(row)
        return self._read[row]

    def _tokens(self, row: int) -> np.ndarray:
        """Of a row that some rank has found good."""
        found = self._find(row)
        if isinstance(found, Exception):
            raise found
        return found
