"""What a document is, and how a row becomes one.

A row (`sources`) becomes text by `data.template` and then token ids, once: ids are never decoded
and encoded again. A row that can not become a document raises BadDocument; what follows from that,
and in which order rows come, is not known here (`stream`).

Dimensions
    P  document tokens
"""

import string
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import DataConfig
from rlp.data.errors import BadDocument


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the corpus."""

    id: int
    """Its row number in the corpus: the same in every epoch, on every rank."""
    tokens: np.ndarray
    """[P] int64."""
    occurrence: int = 0
    """How often it came before in the same step, over all ranks and in the order of the stream. A
    small corpus, a weighted source or the end of an epoch gives a document twice: it is then
    thought about twice, with other noise."""
    loss_mask: np.ndarray | None = None
    """[P] bool, the tokens that the LM loss is taken on (`data.loss_field`); None: all. The first
    is never predicted."""

    @property
    def predicted(self) -> np.ndarray:
        """[P - 1] bool, which of the tokens behind the first the LM loss is taken on."""
        if self.loss_mask is None:
            return np.ones(len(self.tokens) - 1, dtype=bool)
        return self.loss_mask[1:]


def fill_template(template: str, row: dict) -> str:
    """Text of a row: `{field}` is replaced by that field, which must be text."""
    text = []
    for literal, name, _, _ in string.Formatter().parse(template):
        text.append(literal)
        if name is None:
            continue
        if name not in row:
            raise BadDocument(
                "missing field",
                f"no field {name!r}; the row has {', '.join(row) or 'none'}; write data.template"
                " with fields that it has",
            )
        if not isinstance(row[name], str):
            raise BadDocument(
                "field is not text", f"field {name!r} is {type(row[name]).__name__}; expected text"
            )
        text.append(row[name])
    return "".join(text)


def encode(text: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> np.ndarray:
    """Token ids of a document's text, cut to `data.max_document_tokens`."""
    if not text.strip():
        raise BadDocument("empty text", "nothing but white space; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(
            "not Unicode",
            f"character {error.start} is {error.reason.removesuffix(' not allowed')}; expected no"
            " lone half of a surrogate pair",
        ) from error
    return ended(first_ids(text, tokenizer, config.max_document_tokens), tokenizer, config)


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> np.ndarray:
    """[P] int64: with the end-of-sequence token where `data.append_eos` wants it, cut to
    `data.max_document_tokens`."""
    ids = ids + [tokenizer.eos_token_id] if config.append_eos else ids
    return np.array(ids[: config.max_document_tokens], dtype=np.int64)


def given_ids(row: dict, field: str, vocabulary: int) -> list[int]:
    """Token ids that a row holds under `data.tokens_field`."""
    if field not in row:
        raise BadDocument(
            "missing field",
            f"no field {field!r}; the row has {', '.join(row) or 'none'}; write data.tokens_field"
            " with one that it has",
        )

    ids = row[field]
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise BadDocument(
            "field is not token ids",
            f"field {field!r} is {type(ids).__name__}; expected a list of whole numbers",
        )

    beyond = [token for token in ids if not 0 <= token < vocabulary]
    if beyond:
        raise BadDocument(
            "token id beyond the vocabulary",
            f"field {field!r} holds {beyond[0]}; the model's embedding has rows 0 to"
            f" {vocabulary - 1}; expected ids of this model's tokenizer",
        )
    return ids


NO_LOSS = "no token with a loss"
"""Why a row of `data.loss_field` is passed over, which is no fault of the data."""


def given_loss(row: dict, field: str, count: int) -> np.ndarray:
    """[count] bool, the tokens of the spans that a row holds under `data.loss_field`.

    Args:
        count: token ids of the row, before they are cut.
    """
    if field not in row:
        raise BadDocument(
            "missing field",
            f"no field {field!r}; the row has {', '.join(row) or 'none'}; write data.loss_field"
            " with one that it has, or null for a loss on every token",
        )

    spans, mask = row[field], np.zeros(count, dtype=bool)
    for span in spans if isinstance(spans, list) else [spans]:
        whole = isinstance(span, list) and [type(edge) for edge in span] == [int, int]
        if not whole or not 0 <= span[0] < span[1] <= count:
            raise BadDocument(
                "loss span outside the document",
                f"field {field!r} holds {span!r}; expected a list of [start, stop] with"
                f" 0 <= start < stop <= {count}, the tokens of the row",
            )
        mask[slice(*span)] = True
    return mask


def first_ids(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` token ids of a text, and perhaps some more, without tokenizing the rest of
    a long one.

    The text is cut where there are 64 tokens more than asked for: what is behind a cut changes
    tokens next to it, not tokens that far before. A cut that leaves too few tokens is moved to four
    times as many characters.
    """
    wanted = count + 64
    characters = 8 * wanted  # 4 to 5 make a token of English
    while True:
        ids = tokenizer(text[:characters], truncation=False)["input_ids"]
        if len(ids) >= wanted or characters >= len(text):
            return ids
        characters *= 4


def short(text: str) -> str:
    """Names and values that a row holds may be of any length; a message is not."""
    return text if len(text) <= 300 else f"{text[:300]}..."
