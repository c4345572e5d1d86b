"""Rows to token ids: any row, in any order, in any thread, with the same result.

Nothing is counted here, and nothing is told: in which order rows come, and what follows from one
that is no document, is for `stream`.

Dimensions
    P  document tokens
"""

import threading
from collections.abc import Callable, Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import DataConfig, require
from rlp.data.documents import (
    NO_LOSS,
    Document,
    encode,
    ended,
    fill_template,
    given_ids,
    given_loss,
    short,
)
from rlp.data.errors import BadDocument, DataError
from rlp.data.sources import Rows

Found = Document | BadDocument | DataError
"""What reading a row gives: the document; or why it is none, or can not be read."""


class DocumentReader:
    """Reads and tokenizes rows."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        candidates: Callable[[np.ndarray], np.ndarray],
        why_none: Callable[[np.ndarray], str] = lambda tokens: (
            "none of them can be chosen by the `position` section"
        ),
        tokens_field: str | None = None,
        vocabulary: int = 0,
    ) -> None:
        """
        Args:
            candidates: token ids -> the positions that may be chosen; a document without one is
                bad.
            why_none: token ids without a candidate -> why there is none, in words.
            tokens_field: field that holds token ids, below `vocabulary`; None reads text by
                `data.template`.
        """
        require(
            tokenizer.eos_token_id is not None or not config.append_eos,
            "data.append_eos",
            config.append_eos,
            "needs a tokenizer that has an end-of-sequence token",
        )
        self.rows, self.config = rows, config
        self._tokenizer = tokenizer
        self._candidates = candidates
        self._why_none = why_none
        self._tokens_field, self._vocabulary = tokens_field, vocabulary

    def read(self, index: int) -> Found:
        """What a row holds; an error without the row that it came from, which may be long."""
        try:
            return self._document(index)
        except BadDocument as error:
            reason, detail = error.args
            return BadDocument(reason, short(detail))
        except DataError as error:
            return error.with_traceback(None)

    def _document(self, index: int) -> Document:
        row = self.rows.read(index)
        if self._tokens_field is None:
            text = fill_template(self.config.template, row)
            document = Document(index, encode(text, self._tokenizer, self.config))
        else:
            document = self._given(index, row)

        tokens = document.tokens
        if len(self._candidates(tokens)) == 0:
            raise BadDocument("no position", f"{len(tokens)} tokens, and {self._why_none(tokens)}")
        if not document.predicted.any():
            raise BadDocument(
                NO_LOSS,
                f"field {self.config.loss_field!r} has none among the {len(tokens)} tokens that are"
                " read, but for the first, which is never predicted",
            )
        return document

    def _given(self, index: int, row: dict) -> Document:
        """A row that holds its token ids, and perhaps where their loss is taken; an end-of-sequence
        token that is put behind them has none there."""
        ids = given_ids(row, self._tokens_field, self._vocabulary)
        tokens, field = ended(ids, self._tokenizer, self.config), self.config.loss_field
        if field is None:
            return Document(index, tokens)
        given = given_loss(row, field, len(ids))[: len(tokens)]
        return Document(index, tokens, loss_mask=np.pad(given, (0, len(tokens) - len(given))))


class ReadAhead:
    """Rows that are read in a thread of their own, each once, in the order in which they are given.

    The thread is no daemon: a tokenizer that is written in Rust must not be cut off by an
    interpreter that ends under it.
    """

    def __init__(self, reader: DocumentReader, rows: Iterable[int]) -> None:
        self._reader, self._rows = reader, list(dict.fromkeys(rows))
        self._found: dict[int, Found] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._read, name="documents read ahead")
        self._thread.start()

    def found(self) -> dict[int, Found]:
        """What was found in each row; waits for the last. A row may be missing, whose error is then
        met by whoever reads it."""
        self._thread.join()
        return self._found

    def close(self) -> None:
        """Read no further row, and wait for the one at hand."""
        self._is_closed = True
        self._thread.join()

    def _read(self) -> None:
        for row in self._rows:
            if self._is_closed:
                return
            try:
                self._found[row] = self._reader.read(row)
            except Exception:
                return  # nobody has asked for this row yet: it is raised again for who does
