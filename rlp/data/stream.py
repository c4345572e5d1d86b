"""The documents of a run: endless, in a seeded order that a few integers resume.

A row that can not become a document is skipped and counted by reason, up to
`data.max_bad_fraction`. What a document is used for is not known here.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import DataConfig, require
from rlp.data.documents import Document, encode, ended, fill_template, given_ids, short
from rlp.data.errors import BadDocument, DataError
from rlp.data.noise import ORDER_NOISE, SOURCE_NOISE, keyed_noise
from rlp.data.sources import Rows

LISTED_PER_REASON = 100
"""Bad rows told one by one for each reason; the counts go on."""

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
        self._epoch = -1
        self._order = np.arange(size) if not shuffle else None
        self.size = size
        self.cursor = 0

    def next_row(self) -> int:
        epoch, offset = divmod(self.cursor, self.size)
        if self._shuffle and epoch != self._epoch:
            self._order = keyed_noise(
                seed=self._seed, purpose=ORDER_NOISE, step=epoch, document=self._index
            ).permutation(self.size)
            self._epoch = epoch
        self.cursor += 1
        return self._first + int(self._order[offset])


class DocumentStream:
    """Endless documents in a seeded order; its whole state is a cursor for each source, and counts.

    All ranks read the same stream and each takes its share of a batch, so the documents of a step
    do not depend on the number of ranks. With weights, the source of the n-th document is drawn
    with noise keyed by n.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        seed: int,
        candidates: Callable[[np.ndarray], np.ndarray],
        warn: Callable[[str], None],
        record: Callable[[dict], None] = lambda entry: None,
        why_none: Callable[[np.ndarray], str] = lambda tokens: (
            "none of them can be chosen by the `position` section"
        ),
        weights: list[float] | None = None,
        tokens_field: str | None = None,
        vocabulary: int = 0,
    ) -> None:
        """
        Args:
            candidates: token ids -> the positions that may be chosen; a document without one is
                bad.
            warn: called once for each reason, with the first row that it was met in.
            record: called with each bad row, `LISTED_PER_REASON` of each reason.
            why_none: token ids without a candidate -> why there is none, in words.
            weights: `data.weights`, one for each source of the rows; None or empty reads them all
                as one.
            tokens_field: field that holds token ids, below `vocabulary`; None reads text by
                `data.template`.
        """
        require(
            tokenizer.eos_token_id is not None or not config.append_eos,
            "data.append_eos",
            config.append_eos,
            "needs a tokenizer that has an end-of-sequence token",
        )
        self._rows = rows
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._candidates = candidates
        self._why_none = why_none
        self._warn = warn
        self._record = record
        self._tokens_field, self._vocabulary = tokens_field, vocabulary

        sizes = rows.source_sizes if weights else [len(rows)]
        self._sources = [
            Source(sum(sizes[:index]), size, shuffle=config.shuffle, seed=seed, index=index)
            for index, size in enumerate(sizes)
        ]
        weights = weights or [1.0]
        self._up_to = np.cumsum(weights) / sum(weights)
        self._given = 0
        self._files = [[table.name, table.identity] for table in rows.tables]
        self.bad: dict[str, int] = {}

    def next_documents(self, count: int) -> list[Document]:
        """The next `count` good documents: those of one step, of all ranks.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows read (of 100 at least) are bad,
                or all rows of a source are.
        """
        documents, seen = [], Counter()
        for _ in range(count):
            document = self._next_document()
            documents.append(replace(document, occurrence=seen[document.id]))
            seen[document.id] += 1
        return documents

    @property
    def cursor(self) -> int:
        """Rows read, good and bad."""
        return sum(source.cursor for source in self._sources)

    def state(self) -> dict:
        return {
            "cursors": [source.cursor for source in self._sources],
            "given": self._given,
            "bad": dict(self.bad),
            "files": self._files,
        }

    def load_state(self, state: dict) -> None:
        self.refuse_state(state)
        for source, cursor in zip(self._sources, state["cursors"]):
            source.cursor = cursor
        self._given, self.bad = state["given"], dict(state["bad"])

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

    def _next_document(self) -> Document:
        source = self._source_of(self._given)
        num_barren = 0
        while True:
            index = source.next_row()
            try:
                document = Document(index, self._tokens(index))
            except BadDocument as error:
                self._count_bad(index, *error.args)
                num_barren += 1
                if num_barren == source.size:
                    raise DataError(
                        f"{self._rows.where(index)}: {error.args[0]} ({short(error.args[1])}). None"
                        f" of the {num_barren} rows is a document ({self._counts()}). Write files"
                        " with documents in them, and a data.template and a `position` section"
                        " that suit them."
                    ) from error
                continue
            self._given += 1
            return document

    def _source_of(self, number: int) -> Source:
        if len(self._sources) == 1:
            return self._sources[0]
        draw = keyed_noise(seed=self._seed, purpose=SOURCE_NOISE, document=number).random()
        return self._sources[int(np.searchsorted(self._up_to[:-1], draw, side="right"))]

    def _tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, or BadDocument."""
        row = self._rows.read(index)
        if self._tokens_field is None:
            text = fill_template(self._config.template, row)
            tokens = encode(text, self._tokenizer, self._config)
        else:
            ids = given_ids(row, self._tokens_field, self._vocabulary)
            tokens = ended(ids, self._tokenizer, self._config)

        if len(self._candidates(tokens)) == 0:
            raise BadDocument("no position", f"{len(tokens)} tokens, and {self._why_none(tokens)}")
        return tokens

    def _count_bad(self, index: int, reason: str, detail: str) -> None:
        self.bad[reason] = count = self.bad.get(reason, 0) + 1
        where, detail = self._rows.where(index), short(detail)
        if count <= LISTED_PER_REASON:
            self._record({"reason": reason, "count": count, "where": where, "detail": detail})

        # A blank line between documents is no fault of the data.
        num_bad = sum(self.bad.values()) - self.bad.get("empty line", 0)
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
