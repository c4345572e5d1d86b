"""Documents: from files to token ids, in a seeded order with one integer cursor; and positions in them.

A row (a JSON object, a Parquet row, a line of text) becomes text by `data.template` and then token
ids, once: ids are never decoded and encoded again. A row that can not become a document is skipped
and counted by reason, up to `data.max_bad_fraction`. What a position is used for is not known here.

Dimensions
    B  documents;  K  positions per document;  M  positions of all documents together (B * K where each gives K)
    H  target tokens (the horizon)
"""

import glob
import json
import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import DataConfig, PositionConfig, require

POSITION_NOISE, THOUGHT_NOISE, PANEL_NOISE, ORDER_NOISE = range(4)
"""Purposes of `keyed_noise`: draws for different purposes never share a stream."""


class DataError(Exception):
    """Data that can not be used. The message says where, what came, what was expected and what to write."""


class BadDocument(Exception):
    """One row that can not become a document: (reason, detail)."""


def keyed_noise(*, seed: int, purpose: int, step: int = 0, document: int = 0, position: int = 0, thought: int = 0) -> np.random.Generator:
    """A generator that depends on its key alone, so a draw is the same on any rank, in any batch, after any resume.

    Philox is a function from (key, counter) to bits; the lowest counter word runs over the draws.
    """
    key = np.array([seed, (purpose << 32) | step], dtype=np.uint64)
    counter = np.array([0, thought, position, document], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


@dataclass(frozen=True, slots=True)
class Document:
    """A document of the corpus."""

    id: int
    """Its row number in the corpus: the same in every epoch, on every rank."""
    tokens: np.ndarray
    """[P] int64."""


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

    def last_of(self, document: int) -> int:
        """The last position of a document that has some."""
        return int(self.position[self.slice_of_documents(document, document + 1)].max())

    def slice_of_documents(self, start: int, stop: int) -> slice:
        """Where the positions of documents start to stop - 1 stand."""
        first, last = np.searchsorted(self.document, (start, stop))
        return slice(int(first), int(last))




class Rows:
    """Rows of one or more files (or of a Hub data set), memory-mapped, with random access."""

    def __init__(self, names: list[str], tables: list, formats: list[str]) -> None:
        """
        Args:
            names, tables, formats: of each file; a row of the format jsonl or text is one line in the column `text`.
        """
        self._names = names
        self._tables = tables
        self._formats = formats
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        """File and line of a row."""
        table, line = self._locate(index)
        return f"{self._names[table]}:{line + 1}"

    def read(self, index: int) -> dict:
        """A row as a mapping from field to value."""
        table, line = self._locate(index)
        row = self._tables[table][line]
        if self._formats[table] not in ("jsonl", "text"):
            return row
        text = row["text"].removeprefix("\ufeff")
        if not text.strip():
            raise BadDocument("empty line", "expected a document on each line")
        return _parse_json(text) if self._formats[table] == "jsonl" else {"text": text}

    def _locate(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._starts, index, side="right")) - 1
        return table, index - int(self._starts[table])


def _parse_json(line: str) -> dict:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadDocument("broken JSON", f"{error}; expected one JSON object on the line") from error
    if not isinstance(value, dict):
        raise BadDocument("not a JSON object", f"got {type(value).__name__}; expected an object such as {{\"text\": ...}}")
    return value


def open_rows(sources: list[str], config: DataConfig, split: str, key: str) -> Rows:
    """Open files, globs or a Hub data set.

    Args:
        sources: as `data.train`.
        split: split of a Hub data set.
        key: the config key, for messages.

    Raises:
        DataError: nothing there, unreadable, or no row at all.
    """
    names, tables, formats = [], [], []
    for source in sources:
        if source.startswith("hub:"):
            name, _, subset = source.removeprefix("hub:").partition("@")
            names.append(source)
            formats.append("hub")
            tables.append(_load(key, source, name, *filter(None, [subset]), split=split))
            continue
        for path in _expand(source, key):
            names.append(path)
            formats.append(_format_of(path, config.format, key))
            tables.append(_load(key, path, "parquet" if formats[-1] == "parquet" else "text", data_files=[path], split="train"))
    rows = Rows(names, tables, formats)
    if len(rows) == 0:
        raise DataError(f"{key}: {', '.join(names)} holds no row. Expected at least one document.")
    return rows


def _expand(source: str, key: str) -> list[str]:
    paths = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    files = [path for path in paths if Path(path).is_file() and Path(path).stat().st_size > 0]
    if not files:
        found = "an empty file" if any(Path(path).is_file() for path in paths) else "no file"
        raise DataError(f"{key}: {found} at {source!r} (looked from {Path.cwd()}). Write the path of a .jsonl, .parquet or .txt file, a glob that matches some, or hub:NAME.")
    return files


def _format_of(path: str, wanted: str, key: str) -> str:
    if wanted != "auto":
        return wanted
    endings = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".text": "text", ".md": "text"}
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".zst")]
    kind = endings.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise DataError(f"{key}: can not tell the format of {path!r} by its ending. Write data.format=jsonl, parquet or text.")
    return kind


def _load(key: str, source: str, *names: str, **arguments: object):
    """One table through `datasets`, its errors turned into ours."""
    import datasets

    datasets.disable_progress_bars()
    encoding = {"encoding_errors": "replace"} if names == ("text",) else {}
    try:
        return datasets.load_dataset(*names, **arguments, **encoding)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()
        raise DataError(f"{key}: {source!r} can not be read: {reason[0].rstrip('.') if reason else type(cause).__name__}. Expected a readable .jsonl, .parquet or .txt file, or a Hub data set that this machine can reach.") from error




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
    if "\ufffd" in text:
        raise BadDocument("not UTF-8", "the text holds U+FFFD, the mark of bytes that are not UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument("not Unicode", f"{error}; expected no lone half of a surrogate pair") from error
    ids = tokenizer(text, truncation=False)["input_ids"]
    ids = ids + [tokenizer.eos_token_id] if config.append_eos else ids
    return np.array(ids[: config.max_document_tokens], dtype=np.int64)


class DocumentStream:
    """Endless documents in a seeded order; its whole state is a cursor and the counts of what was skipped.

    All ranks read the same stream and each takes its share of a batch, so the documents of a step do not
    depend on the number of ranks.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, seed: int,
                 candidates: Callable[[np.ndarray], np.ndarray], warn: Callable[[str], None]) -> None:
        """
        Args:
            candidates: token ids -> the positions that may be chosen; a document without one is bad.
            warn: called once for each reason, with the first row that it was met in.
        """
        require(tokenizer.eos_token_id is not None or not config.append_eos, "data.append_eos", config.append_eos, "needs a tokenizer that has an end-of-sequence token")
        self._rows = rows
        self._tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._candidates = candidates
        self._warn = warn
        self._order_epoch = -1
        self._order = np.arange(len(rows))
        self.cursor = 0
        self.bad: dict[str, int] = {}

    def next_documents(self, count: int) -> list[Document]:
        """The next `count` good documents.

        Raises:
            DataError: more than `data.max_bad_fraction` of the rows read (of 100 at least) are bad, or all rows are.
        """
        documents, num_barren = [], 0
        while len(documents) < count:
            index = self._row_at(self.cursor)
            self.cursor += 1
            try:
                documents.append(Document(index, self._tokens(index)))
                num_barren = 0
            except BadDocument as error:
                self._count_bad(index, *error.args)
                num_barren += 1
                if num_barren == len(self._rows):
                    raise DataError(f"{self._rows.where(index)}: {error.args[0]} ({error.args[1]}). None of the {num_barren} rows is a document ({self._counts()}). "
                                    "Write files with documents in them, and a data.template and a `position` section that suit them.") from error
        return documents

    def state(self) -> dict:
        return {"cursor": self.cursor, "bad": dict(self.bad), "rows": len(self._rows)}

    def load_state(self, state: dict) -> None:
        if state["rows"] != len(self._rows):
            raise DataError(f"data.train holds {len(self._rows)} rows; the checkpoint was made from {state['rows']}. Continue with the same files, or start a new run.")
        self.cursor, self.bad = state["cursor"], dict(state["bad"])

    def _row_at(self, cursor: int) -> int:
        epoch, offset = divmod(cursor, len(self._rows))
        if self._config.shuffle and epoch != self._order_epoch:
            self._order = keyed_noise(seed=self._seed, purpose=ORDER_NOISE, step=epoch).permutation(len(self._rows))
            self._order_epoch = epoch
        return int(self._order[offset])

    def _tokens(self, index: int) -> np.ndarray:
        tokens = encode(fill_template(self._config.template, self._rows.read(index)), self._tokenizer, self._config)
        if len(self._candidates(tokens)) == 0:
            raise BadDocument("no position", f"{len(tokens)} tokens, and none of them can be chosen by the `position` section")
        return tokens

    def _count_bad(self, index: int, reason: str, detail: str) -> None:
        self.bad[reason] = self.bad.get(reason, 0) + 1
        # A blank line between documents is no fault of the data.
        num_bad, where = sum(self.bad.values()) - self.bad.get("empty line", 0), self._rows.where(index)
        if num_bad > self._config.max_bad_fraction * max(self.cursor, 100):
            raise DataError(f"{where}: {reason} ({detail}). {num_bad} of {self.cursor} rows read are bad ({self._counts()}), "
                            f"more than data.max_bad_fraction = {self._config.max_bad_fraction:g} allows. Mend the data, or raise data.max_bad_fraction to skip such rows.")
        if self.bad[reason] == 1:
            self._warn(f"skipped {where}: {reason} ({detail}); further such rows are counted silently")

    def _counts(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.bad.items())




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
    noise = keyed_noise(seed=seed, purpose=POSITION_NOISE, step=step, document=document.id)
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
