"""The documents of a run: endless, in a seeded order that a few integers resume.

A row that can not become a document is skipped and counted by reason, up to
`data.max_bad_fraction`. What a document is used for is not known here.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rlp.config import require
from rlp.data.documents import NO_LOSS, Document, short
from rlp.data.errors import BadDocument, DataError
from rlp.data.noise import ORDER_NOISE, SOURCE_NOISE, keyed_noise
from rlp.data.reader import DocumentReader

LISTED_PER_REASON = 100
"""Bad rows told one by one for each reason; the counts go on."""

NO_FAULTS = ("empty line", NO_LOSS)
"""Why a row is passed over, and the data is none the worse: a blank line between documents; a
document in which no thought helped, where the loss is on thoughts alone."""

FEWEST_JUDGED = 100
"""Rows of a large corpus before which its bad ones are no fraction of it: the first row may be
one."""


class Source:
    """Endless row numbers of one entry of `data.train`: epoch after epoch, each in an order of its
    own."""

    def __init__(self, first: int, size: int, *, shuffle: bool, seed: int, index: int) -> None:
        """
        Args:
            first, size: its rows.
            index: its place in `data.train`; no two share an order.
        """
        self._first = first
        self._shuffle = shuffle
        self._seed = seed
        self._index = index
        self._orders: dict[int, np.ndarray] = {}
        self.size = size
        self.cursor = 0
        """Rows that are read."""

    def row(self, cursor: int) -> int:
        """The row that is read there: at the cursor, or at a later one."""
        epoch, offset = divmod(cursor, self.size)
        return self._first + (int(self._order(epoch)[offset]) if self._shuffle else offset)

    def _order(self, epoch: int) -> np.ndarray:
        """[rows] of an epoch; those of epochs that are over are let go."""
        if epoch not in self._orders:
            now = self.cursor // self.size
            self._orders = {of: order for of, order in self._orders.items() if of >= now}
            self._orders[epoch] = keyed_noise(
                seed=self._seed, purpose=ORDER_NOISE, step=epoch, document=self._index
            ).permutation(self.size)
        return self._orders[epoch]


class DocumentStream:
    """Endless documents in a seeded order; its whole state is a cursor for each source, and counts.

    All ranks go through the same rows and each takes its share of a batch (`Batches`), so the
    documents of a step do not depend on the number of ranks. With weights, the source of the n-th
    document is drawn with noise keyed by n.
    """

    def __init__(
        self,
        reader: DocumentReader,
        *,
        seed: int,
        warn: Callable[[str], None],
        record: Callable[[dict], None] = lambda entry: None,
        weights: list[float] | None = None,
    ) -> None:
        """
        Args:
            warn: called once for each reason, with the first row that it was met in.
            record: called with each bad row, `LISTED_PER_REASON` of each reason.
            weights: `data.weights`, one for each source of the rows; None or empty reads them all
                as one.
        """
        self.reader = reader
        self._rows, self._config = reader.rows, reader.config
        self._seed = seed
        self._warn = warn
        self._record = record

        rows = reader.rows
        sizes = rows.source_sizes if weights else [len(rows)]
        self._sources = [
            Source(sum(sizes[:index]), size, shuffle=self._config.shuffle, seed=seed, index=index)
            for index, size in enumerate(sizes)
        ]
        weights = weights or [1.0]
        self._up_to = np.cumsum(weights) / sum(weights)
        self.given = 0
        """Documents, of all sources."""
        self._files = [[table.name, table.identity] for table in rows.tables]
        self.bad: dict[str, int] = {}

    def next_documents(self, count: int) -> list[Document]:
        """The next `count` good documents.

        Raises:
            DataError: as `take`.
        """
        read: dict[int, Document] = {}

        def judge(row: int) -> Exception | None:
            found = read.get(row)
            found = self.reader.read(row) if found is None else found
            if isinstance(found, Exception):
                return found
            read[row] = found
            return None

        taken = self.take(count, judge)
        return [replace(read[row], occurrence=times) for row, times in taken]

    def take(self, count: int, judge: Callable[[int], Exception | None]) -> list[tuple[int, int]]:
        """Move on by the next `count` good documents: those of one step, of all ranks.

        Args:
            judge: a row -> what is wrong with it, None for a good document.

        Returns:
            (`Document.id`, `Document.occurrence`) of each.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows read (of 100 at least) are bad,
                or all rows of a source are, or one can not be read.
        """
        taken, seen = [], Counter()
        for _ in range(count):
            row = self._next_good(judge)
            taken.append((row, seen[row]))
            seen[row] += 1
        return taken

    def expected(self, count: int) -> list[int]:
        """Rows of the next `count` documents, if none of them is bad."""
        cursors, rows = [source.cursor for source in self._sources], []
        for number in range(self.given, self.given + count):
            which = self._source_of(number)
            rows.append(self._sources[which].row(cursors[which]))
            cursors[which] += 1
        return rows

    @property
    def cursor(self) -> int:
        """Rows read, good and bad."""
        return sum(source.cursor for source in self._sources)

    def state(self) -> dict:
        return {
            "cursors": [source.cursor for source in self._sources],
            "given": self.given,
            "bad": dict(self.bad),
            "files": self._files,
        }

    def load_state(self, state: dict) -> None:
        self.refuse_state(state)
        for source, cursor in zip(self._sources, state["cursors"]):
            source.cursor = cursor
        self.given, self.bad = state["given"], dict(state["bad"])

    def refuse_state(self, state: dict) -> None:
        """Refuse a state of other files.

        Raises:
            DataError: a file has changed, or there are more or fewer of them.
        """
        for (name, was), (_, found) in zip(state["files"], self._files):
            if was != found:
                raise DataError(
                    f"data.train: {name} is not what the checkpoint was made from: it had {was}, it"
                    f" has {found}. Put the file back, or start a new run."
                )
        if len(state["files"]) != len(self._files) or len(state["cursors"]) != len(self._sources):
            raise DataError(
                f"data.train names {len(self._files)} files; the checkpoint was made from"
                f" {len(state['files'])}. Continue with the same files, or start a new run."
            )

    def _next_good(self, judge: Callable[[int], Exception | None]) -> int:
        source = self._sources[self._source_of(self.given)]
        num_barren = 0
        while True:
            row = source.row(source.cursor)
            error = judge(row)
            source.cursor += 1
            if error is None:
                self.given += 1
                return row
            if not isinstance(error, BadDocument):
                raise error

            self._count_bad(row, *error.args)
            num_barren += 1
            if num_barren == source.size:
                raise DataError(
                    f"{self._rows.where(row)}: {error.args[0]} ({short(error.args[1])}). None"
                    f" of the {num_barren} rows is a document ({self._counts()}). Write files"
                    " with documents in them, and a data.template and a `position` section"
                    " that suit them."
                ) from error

    def _source_of(self, number: int) -> int:
        """Index of the source that the n-th document is from."""
        if len(self._sources) == 1:
            return 0
        draw = keyed_noise(seed=self._seed, purpose=SOURCE_NOISE, document=number).random()
        return int(np.searchsorted(self._up_to[:-1], draw, side="right"))

    def _count_bad(self, index: int, reason: str, detail: str) -> None:
        self.bad[reason] = count = self.bad.get(reason, 0) + 1
        where, detail = self._rows.where(index), short(detail)
        if count <= LISTED_PER_REASON:
            self._record({"reason": reason, "count": count, "where": where, "detail": detail})

        num_bad = sum(self.bad.values()) - sum(self.bad.get(reason, 0) for reason in NO_FAULTS)
        num_rows = self._rows_to_judge_by()
        if num_bad > self._config.max_bad_fraction * num_rows:
            enough = min(1.0, math.ceil(200 * num_bad / num_rows) / 100)
            raise DataError(
                f"{where}: {reason} ({detail}). {num_bad} of {self.cursor} rows read are bad"
                f" ({self._counts()}), more than data.max_bad_fraction ="
                f" {self._config.max_bad_fraction:g} allows. Mend the data, or raise"
                f" data.max_bad_fraction to {enough:g} or more to skip such rows."
            )

        if count == 1:
            self._warn(
                f"skipped {where}: {reason} ({detail}); further such rows are counted silently"
            )

    def _rows_to_judge_by(self) -> int:
        """Rows that a fraction of bad ones is taken of: those read, but at least `FEWEST_JUDGED`,
        and of a smaller corpus whole epochs, as a few rows are met again and again."""
        size = len(self._rows)
        if size < FEWEST_JUDGED:
            return math.ceil(self.cursor / size) * size
        return max(self.cursor, FEWEST_JUDGED)

    def _counts(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.bad.items())


def share_of_rank(count: int, rank: int, world_size: int) -> slice:
    """The contiguous share of a batch that one rank takes; shares are equal."""
    require(
        count % world_size == 0,
        "optim.batch_size",
        count,
        f"must be a multiple of the {world_size} ranks, so that each takes as many documents; write"
        f" optim.batch_size={math.ceil(count / world_size) * world_size}",
    )
    size = count // world_size
    return slice(rank * size, (rank + 1) * size)
