"""The batches of a run, shared by its ranks: each reads and tokenizes its own documents, and those
of the next batch while a step is made.

Which rows a batch holds depends on which are bad, in the order of the stream, and nobody but who
reads a row knows that. So all ranks expect the same rows, each reads those of its own share, and
they tell each other which of these are bad: words, not tokens. Where none is, one exchange makes
the batch. What is read ahead is only tokens of rows: the stream moves on when its step comes.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from rlp.data.documents import Document
from rlp.data.reader import Found, ReadAhead
from rlp.data.stream import DocumentStream

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks


class Batches:
    """This rank's share of batch after batch."""

    def __init__(
        self, stream: DocumentStream, size: int, ranks: "Ranks", *, together: int = 1
    ) -> None:
        """
        Args:
            size: documents of a batch, all ranks together.
            together: so many documents, from the first of a batch on, fall to one rank.
        """
        self._stream, self._usual, self._ranks = stream, size, ranks
        self._together = together
        self._size = size
        """Of this batch."""
        self._first = 0
        """Number of the batch's first document, since the beginning of the stream."""
        self._judged: dict[int, Exception | None] = {}
        """Rows of this batch, and what is wrong with them: the same on all ranks."""
        self._read: dict[int, Found] = {}
        """Rows that this rank has read for this batch."""
        self._ahead: ReadAhead | None = None

    def next_share(self, size: int | None = None) -> list[Document]:
        """This rank's documents of the next batch. A collective.

        Args:
            size: of this batch, where it is another.

        Raises:
            DataError: on all ranks; as `DocumentStream.take`.
        """
        self._first, self._size = self._stream.given, size or self._usual
        self._judged, self._read = {}, self._ahead.found() if self._ahead else {}

        mine = self._stream.take(self._size, self._judge)[self._share()]
        documents = [replace(self._document(row), occurrence=times) for row, times in mine]

        self._first, self._size = self._stream.given, self._usual
        self._judged, self._read = {}, {}
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
        share = self._share()
        return rows, rows[max(0, share.start - taken) : max(0, share.stop - taken)]

    def _share(self) -> slice:
        """Of the batch: as equal as can be, in the order of the ranks."""
        pieces, rank = -(-self._size // self._together), self._ranks.rank
        ends = [pieces * of // self._ranks.world_size for of in (rank, rank + 1)]
        return slice(*(min(self._size, end * self._together) for end in ends))

    def _find(self, row: int) -> Found:
        if row not in self._read:
            self._read[row] = self._stream.reader.read(row)
        return self._read[row]

    def _document(self, row: int) -> Document:
        """Of a row that some rank has found good."""
        found = self._find(row)
        if isinstance(found, Exception):
            raise found
        return found
