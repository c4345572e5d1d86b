"""Documents: from rows to token ids, in a seeded order that a few integers resume; and positions in them.

A row (`rlp/sources.py`) becomes text by `data.template` and then token ids, once: ids are never decoded and
encoded again. A row that can not become a document is skipped and counted by reason, up to
`data.max_bad_fraction`. What a position is used for is not known here.

Dimensions
    B  documents;  K  positions per document;  M  positions of all documents together (B * K where each gives K)
    H  target tokens (the horizon)
"""

import math
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import DataConfig, PositionConfig, require
from rlp.sources import BadDocument, DataError, Rows

POSITION_NOISE, THOUGHT_NOISE, PANEL_NOISE, ORDER_NOISE, SOURCE_NOISE, BENCHMARK_THOUGHT_NOISE, BENCHMARK_ANSWER_NOISE = range(7)
"""Purposes of `keyed_noise`: draws for different purposes never share a stream."""

LISTED_PER_REASON = 100
"""Bad rows told one by one for each reason; the counts go on."""

FEWEST_JUDGED = 100
"""Rows of a large corpus before which its bad ones are no fraction of it: the first row may be one."""


def keyed_noise(*, seed: int, purpose: int, step: int = 0, document: int = 0, occurrence: int = 0,
                position: int = 0, thought: int = 0) -> np.random.Generator:
    """A generator that depends on its key alone.

    So a draw is the same on any rank, in any batch, after any resume. Philox is a function from
    (key, counter) to bits; the lowest counter word runs over the draws.

    Args:
        occurrence: of the document in the step (`Document.occurrence`).
    """
    key = np.array([seed, (purpose << 32) | step], dtype=np.uint64)
    counter = np.array([0, (occurrence << 32) | thought, position, document], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


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


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions chosen in a list of documents, document by document."""

    document: np.ndarray
    """[M] int64, index in the list of documents, never decreasing."""
    position: np.ndarray
    """[M] int64, index t of the first token to be predicted; the prefix is `tokens[:t]`."""
    target: np.ndarray
    """[M, H] int64, `tokens[t : t + H]`."""

    def of_documents(self, start: int, stop: int) -> "Positions":
        """Those of documents start to stop - 1, with the documents renumbered from 0."""
        chosen = self.slice_of_documents(start, stop)
        return Positions(self.document[chosen] - start, self.position[chosen], self.target[chosen])

    def last(self) -> "Positions":
        """The last position alone."""
        return Positions(self.document[-1:], self.position[-1:], self.target[-1:])

    def last_of(self, document: int) -> int:
        """The last position of a document that has some."""
        return int(self.position[self.slice_of_documents(document, document + 1)].max())

    def slice_of_documents(self, start: int, stop: int) -> slice:
        """Where the positions of documents start to stop - 1 stand."""
        first, last = np.searchsorted(self.document, (start, stop))
        return slice(int(first), int(last))


def fill_template(template: str, row: dict) -> str:
    """Text of a row: `{field}` is replaced by that field, which must be text."""
    text = []
    for literal, name, _, _ in string.Formatter().parse(template):
        text.append(literal)
        if name is None:
            continue
        if name not in row:
            raise BadDocument("missing field", f"no field {name!r}; the row has {', '.join(row) or 'none'}; write data.template with fields that it has")
        if not isinstance(row[name], str):
            raise BadDocument("field is not text", f"field {name!r} is {type(row[name]).__name__}; expected text")
        text.append(row[name])
    return "".join(text)


def encode(text: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> np.ndarray:
    """Token ids of a document's text, cut to `data.max_document_tokens`."""
    if not text.strip():
        raise BadDocument("empty text", "nothing but white space; expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument("not Unicode", f"character {error.start} is {error.reason.removesuffix(' not allowed')}; expected no lone half of a surrogate pair") from error
    return ended(first_ids(text, tokenizer, config.max_document_tokens), tokenizer, config)


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> np.ndarray:
    """[P] int64: with the end-of-sequence token where `data.append_eos` wants it, cut to `data.max_document_tokens`."""
    ids = ids + [tokenizer.eos_token_id] if config.append_eos else ids
    return np.array(ids[: config.max_document_tokens], dtype=np.int64)


def given_ids(row: dict, field: str, vocabulary: int) -> list[int]:
    """Token ids that a row holds under `data.tokens_field`."""
    ids = row.get(field)
    if field not in row:
        raise BadDocument("missing field", f"no field {field!r}; the row has {', '.join(row) or 'none'}; write data.tokens_field with one that it has")
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise BadDocument("field is not token ids", f"field {field!r} is {type(ids).__name__}; expected a list of whole numbers")
    beyond = [token for token in ids if not 0 <= token < vocabulary]
    if beyond:
        raise BadDocument("token id beyond the vocabulary", f"field {field!r} holds {beyond[0]}; the model's embedding has rows 0 to {vocabulary - 1}; expected ids of this model's tokenizer")
    return ids


def first_ids(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """The first `count` token ids of a text, and perhaps some more, without tokenizing the rest of a long one.

    The text is cut where there are 64 tokens more than asked for: what is behind a cut changes tokens next to it, not
    tokens that far before. A cut that leaves too few tokens is moved to four times as many characters.
    """
    wanted = count + 64
    characters = 8 * wanted  # 4 to 5 make a token of English
    while True:
        ids = tokenizer(text[:characters], truncation=False)["input_ids"]
        if len(ids) >= wanted or characters >= len(text):
            return ids
        characters *= 4


class Source:
    """Endless row numbers of one entry of `data.train`: epoch after epoch, each in an order of its own."""

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
            self._order = keyed_noise(seed=self._seed, purpose=ORDER_NOISE, step=epoch, document=self._index).permutation(self.size)
            self._epoch = epoch
        self.cursor += 1
        return self._first + int(self._order[offset])


class DocumentStream:
    """Endless documents in a seeded order; its whole state is a cursor for each source, and counts.

    All ranks read the same stream and each takes its share of a batch, so the documents of a step do not
    depend on the number of ranks. With weights, the source of the n-th document is drawn with noise keyed by n.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, seed: int, candidates: Callable[[np.ndarray], np.ndarray],
                 warn: Callable[[str], None], record: Callable[[dict], None] = lambda entry: None,
                 why_none: Callable[[np.ndarray], str] = lambda tokens: "none of them can be "
                 "chosen by the `position` section", weights: list[float] | None = None,
                 tokens_field: str | None = None, vocabulary: int = 0) -> None:
        """
        Args:
            candidates: token ids -> the positions that may be chosen; a document without one is bad.
            warn: called once for each reason, with the first row that it was met in.
            record: called with each bad row, `LISTED_PER_REASON` of each reason.
            why_none: token ids without a candidate -> why there is none, in words.
            weights: `data.weights`, one for each source of the rows; None or empty reads them all as one.
            tokens_field: field that holds token ids, below `vocabulary`; None reads text by `data.template`.
        """
        require(tokenizer.eos_token_id is not None or not config.append_eos, "data.append_eos", config.append_eos, "needs a tokenizer that has an end-of-sequence token")
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
        self._sources = [Source(sum(sizes[:index]), size, shuffle=config.shuffle, seed=seed, index=index) for index, size in enumerate(sizes)]
        self._up_to = np.cumsum(weights or [1.0]) / sum(weights or [1.0])
        self._given = 0
        self._files = [[table.name, table.identity] for table in rows.tables]
        self.bad: dict[str, int] = {}

    def next_documents(self, count: int) -> list[Document]:
        """The next `count` good documents: those of one step, of all ranks.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows read (of 100 at least) are bad, or all rows of a source are.
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
        return {"cursors": [source.cursor for source in self._sources], "given": self._given, "bad": dict(self.bad), "files": self._files}

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
                raise DataError(f"data.train: {name} is not what the checkpoint was made from: it had {was}, it has {found}. Put the file back, or start a new run.")
        if len(state["files"]) != len(self._files) or len(state["cursors"]) != len(self._sources):
            raise DataError(f"data.train names {len(self._files)} files; the checkpoint was made from {len(state['files'])}. Continue with the same files, or start a new run.")

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
                    raise DataError(f"{self._rows.where(index)}: {error.args[0]} ({short(error.args[1])}). None of the {num_barren} rows is a document ({self._counts()}). "
                                    "Write files with documents in them, and a data.template and a `position` section that suit them.") from error
                continue
            self._given += 1
            return document

    def _source_of(self, number: int) -> Source:
        if len(self._sources) == 1:
            return self._sources[0]
        draw = keyed_noise(seed=self._seed, purpose=SOURCE_NOISE, document=number).random()
        return self._sources[int(np.searchsorted(self._up_to[:-1], draw, side="right"))]

    def _tokens(self, index: int) -> np.ndarray:
        row = self._rows.read(index)
        if self._tokens_field is None:
            tokens = encode(fill_template(self._config.template, row), self._tokenizer, self._config)
        else:
            tokens = ended(given_ids(row, self._tokens_field, self._vocabulary), self._tokenizer, self._config)
        if len(self._candidates(tokens)) == 0:
            raise BadDocument("no position", f"{len(tokens)} tokens, and {self._why_none(tokens)}")
        return tokens

    def _count_bad(self, index: int, reason: str, detail: str) -> None:
        self.bad[reason] = count = self.bad.get(reason, 0) + 1
        where, detail = self._rows.where(index), short(detail)
        if count <= LISTED_PER_REASON:
            self._record({"reason": reason, "count": count, "where": where, "detail": detail})
        # A blank line between documents is no fault of the data.
        num_bad, num_rows = sum(self.bad.values()) - self.bad.get("empty line", 0), self._rows_to_judge_by()
        if num_bad > self._config.max_bad_fraction * num_rows:
            raise DataError(f"{where}: {reason} ({detail}). {num_bad} of {self.cursor} rows read are bad ({self._counts()}), "
                            f"more than data.max_bad_fraction = {self._config.max_bad_fraction:g} allows. Mend the data, or raise data.max_bad_fraction "
                            f"to {min(1.0, math.ceil(200 * num_bad / num_rows) / 100):g} or more to skip such rows.")
        if count == 1:
            self._warn(f"skipped {where}: {reason} ({detail}); further such rows are counted silently")

    def _rows_to_judge_by(self) -> int:
        """Rows that a fraction of bad ones is taken of: those read, but at least `FEWEST_JUDGED`, and of a smaller corpus whole epochs, as a
        few rows are met again and again."""
        size = len(self._rows)
        return max(self.cursor, FEWEST_JUDGED) if size >= FEWEST_JUDGED else math.ceil(self.cursor / size) * size

    def _counts(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.bad.items())


def short(text: str) -> str:
    """Names and values that a row holds may be of any length; a message is not."""
    return text if len(text) <= 300 else f"{text[:300]}..."


def candidate_positions(tokens: np.ndarray, config: PositionConfig, *, horizon: int, excluded: int, marker: tuple[int, ...] = ()) -> np.ndarray:
    """Positions of a document that may be chosen: enough prefix, a whole horizon of targets, none of them `excluded`.

    Args:
        tokens: [P] int64.
        excluded: a token that no target softmax holds, so that it can not be scored as a target.
        marker: token ids of `position.marker`; a position then follows an occurrence of it.

    Returns:
        int64, ascending.
    """
    positions = np.arange(config.min_prefix_tokens, len(tokens) - horizon + 1)
    for offset in range(horizon):
        positions = positions[tokens[positions + offset] != excluded]
    for back, token in enumerate(reversed(marker), start=1):
        positions = positions[positions >= back]
        positions = positions[tokens[positions - back] == token]
    return positions


def choose_positions(documents: list[Document], candidates: Callable[[np.ndarray], np.ndarray], config: PositionConfig, *,
                     horizon: int, seed: int, step: int, scores: list[np.ndarray] | None = None) -> Positions:
    """K positions of each document (fewer where it has fewer candidates).

    Args:
        scores: for the selectors `entropy` and `surprisal`, one [P] array per document, the score of position t
            at index t; the K largest are taken, the earlier one of equals.
    """
    chosen = [_choose(document, candidates(document.tokens), config, seed, step, None if scores is None else scores[index])
              for index, document in enumerate(documents)]
    position = np.concatenate(chosen)
    document = np.repeat(np.arange(len(documents)), [len(part) for part in chosen])
    target = np.stack([documents[d].tokens[t : t + horizon] for d, t in zip(document, position)])
    return Positions(document=document, position=position, target=target)


def _choose(document: Document, candidates: np.ndarray, config: PositionConfig, seed: int, step: int, score: np.ndarray | None) -> np.ndarray:
    if config.per_document == "all" or len(candidates) <= config.per_document:
        return candidates
    if score is not None:
        ranked = candidates[np.argsort(-score[candidates], kind="stable")]
        return np.sort(ranked[: config.per_document])
    noise = keyed_noise(seed=seed, purpose=POSITION_NOISE, step=step, document=document.id,
                        occurrence=document.occurrence)
    return np.sort(noise.choice(candidates, size=config.per_document, replace=False))


def marker_ids(tokenizer: PreTrainedTokenizerBase, config: PositionConfig) -> tuple[int, ...]:
    """Token ids of `position.marker`, empty where there is none."""
    if config.marker is None:
        return ()
    ids = tuple(tokenizer.encode(config.marker, add_special_tokens=False))
    require(len(ids) > 0 and tokenizer.unk_token_id not in ids, "position.marker", config.marker, f"must be text that the tokenizer can write (token ids {list(ids)})")
    return ids


def share_of_rank(count: int, rank: int, world_size: int) -> slice:
    """The contiguous share of a batch that one rank takes; shares are equal."""
    require(count % world_size == 0, "optim.batch_size", count, f"must be a multiple of the {world_size} ranks, so that each takes as many documents; write optim.batch_size={math.ceil(count / world_size) * world_size}")
    size = count // world_size
    return slice(rank * size, (rank + 1) * size)
