"""What a config names, opened: tokenizer, thought format, documents, model shapes. Nothing is
written.

Whatever a user may have got wrong in files and names is refused here, before a run folder exists.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import Config, ConfigError, PositionConfig, first_line, panel_position
from rlp.data.documents import Document
from rlp.data.positions import Candidates, choose_positions, marker_ids
from rlp.data.reader import DocumentReader
from rlp.data.sources import Rows, open_rows
from rlp.data.stream import DocumentStream
from rlp.model.admission import context_limit, why_unfit
from rlp.model.layout import sequence_parts
from rlp.model.loading import read_model_config
from rlp.model.markers import marker_notes, vocabulary_with
from rlp.model.shapes import model_shapes
from rlp.model.thoughts import ThoughtFormat
from rlp.model.tokenizer import open_tokenizer, quiet_transformers, refuse_other_tokenizer
from rlp.process.progress import Progress, Tell

NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)
"""Of a model's config: what no number depends on. The compute dtype is a setting of the run."""


class ModelSetup:
    """Architecture, tokenizer, markers and thought format."""

    def __init__(self, config: Config) -> None:
        quiet_transformers()
        self.config = config
        self.architecture = read_model_config(config.model)
        self.tokenizer, self.markers = open_tokenizer(config)
        refuse_other_tokenizer(config, self.architecture, self.tokenizer, self.markers)
        self.thought_format = ThoughtFormat.of(
            config,
            self.markers,
            self._instruction(),
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
        )

    def marker_notes(self) -> list[str]:
        """`marker_notes` of these markers."""
        return marker_notes(self.tokenizer, self.markers, self.config.thought)

    def checksums(self) -> dict[str, str]:
        """By what they are of: all that the config names and does not hold, and that numbers of a
        run depend on."""
        markers, thought_format = self.markers, self.thought_format
        values = {
            "the tokenizer (model.tokenizer, else model.path)": _tokenizer_state(self.tokenizer),
            "the token ids of the markers": [
                markers.open,
                markers.close,
                markers.excluded,
                thought_format.begin,
            ],
            "the text of thought.instruction_file": thought_format.instruction,
        }
        return {name: _checksum(value) for name, value in values.items()}

    def vocabulary_checksum(self) -> str:
        """Of which text has which id, markers too: what token ids of two folders have to agree
        in."""
        return _checksum(sorted(self.tokenizer.get_vocab().items()))

    def _instruction(self) -> tuple[int, ...]:
        """Token ids of `thought.instruction_file`, empty where there is none."""
        path = self.config.thought.instruction_file
        if path is None:
            return ()
        try:
            if not Path(path).is_file():
                what = ", which is a folder" if Path(path).is_dir() else ""
                raise ConfigError(
                    f"thought.instruction_file: no file at {path!r}{what}. Write the path of a"
                    " text file, or leave it out."
                )
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"thought.instruction_file: {path!r} can not be read: {error.strerror}. Write the"
                " path of a text file."
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"thought.instruction_file: {path!r} is not UTF-8: {error}. Write the path of a"
                " text file."
            ) from error
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list:
    """Whatever turns text into ids: normalizer, splitting, vocabulary, merges, special tokens."""
    state = [
        sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    if not tokenizer.is_fast:
        return [*state, type(tokenizer).__name__]
    # As in tokenizer.json; truncation and padding are what the last call asked for.
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    return [
        *state,
        {name: part for name, part in whole.items() if name not in ("truncation", "padding")},
    ]


def _checksum(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class PanelSetup(ModelSetup):
    """What a held-out panel needs: which positions may be chosen, and its documents."""

    def __init__(
        self, config: Config, warn: Callable[[str], None], progress: Tell = Progress
    ) -> None:
        """
        Args:
            warn: told about skipped documents.
            progress: makes a `Progress`, for data that takes long to open.
        """
        super().__init__(config)
        if missing := why_unfit(self.architecture):
            raise ConfigError(
                f"model.path: {self.architecture.model_type} can not be trained: {missing}. Choose"
                " another model."
            )
        self._refuse_long_sequences()
        self._warn = warn
        self.candidates = self._candidates("position", config.position)
        own = "evaluation" if config.evaluation.selector else "position"
        self.panel_candidates = self._candidates(own, panel_position(config))

        data = config.data
        self.held_out: Rows | None = None
        if data.held_out:
            self.held_out = open_rows(
                data.held_out, data, data.held_out_split, "data.held_out", progress
            )

    def _refuse_long_sequences(self) -> None:
        """Refuse settings whose longest sequence is beyond what the model reads, naming values that
        fit."""
        config, limit = self.config, context_limit(self.architecture)
        thinks = config.objective.thinks or bool(config.data.held_out)
        parts = sequence_parts(
            self.thought_format,
            config.data.max_document_tokens,
            config.thought.max_thought_tokens if thinks else None,
        )
        longest = sum(parts.values())
        if limit is None or longest <= limit.tokens:
            return

        words = " + ".join(f"{name} {tokens}" for name, tokens in parts.items() if tokens)
        raise ConfigError(
            f"model.path: the longest sequence has {longest} tokens ({words}), and the model reads"
            f" at most {limit.tokens} ({limit.key} in its config.json)."
            f" {self._shorter(longest - limit.tokens, thinks)} {limit.advice()}"
        )

    def _shorter(self, over: int, thinks: bool) -> str:
        """Which settings take that many tokens off the longest sequence."""
        config, fitting = self.config, []
        document = config.data.max_document_tokens - over
        if document >= config.position.min_prefix_tokens + config.target.horizon:
            fitting.append(f"data.max_document_tokens={document}")
        thought = config.thought.max_thought_tokens - over
        if thinks and thought > 0:
            fitting.append(f"thought.max_thought_tokens={thought}")

        if not fitting:
            return (
                "Write smaller values of data.max_document_tokens and thought.max_thought_tokens:"
                f" together {over} less."
            )
        instructed = thinks and self.thought_format.instruction
        shorter = ", or a shorter thought.instruction_file" if instructed else ""
        return f"Write {' or '.join(fitting)}{shorter}."

    def notes(self) -> list[str]:
        """What is to be said of it before a run."""
        if self.held_out is not None:
            return self.marker_notes()
        return [
            *self.marker_notes(),
            "no held-out panel: data.held_out names no file, so nothing is measured before and"
            " after, and neither the run nor its report can say whether thoughts gain. Write"
            " data.held_out=[FILE] to have it measured.",
        ]

    def checksums(self) -> dict[str, str]:
        described = {
            name: value
            for name, value in self.architecture.to_dict().items()
            if name not in NOT_COMPUTED
        }
        found = super().checksums()
        found["the config of the model in model.path"] = _checksum(described)
        if self.held_out is not None:
            files = [table.identity for table in self.held_out.tables]
            found["the files of data.held_out"] = _checksum(files)
        return found

    def panel_stream(self, seed: int) -> DocumentStream:
        """Held-out documents with a position, in the order of a seed."""
        reader = DocumentReader(
            self.held_out,
            self.tokenizer,
            self.config.data,
            candidates=self.panel_candidates,
            why_none=partial(self.why_no_position, candidates=self.panel_candidates),
        )
        return DocumentStream(reader, seed=seed, warn=self._warn)

    def _candidates(self, section: str, position: PositionConfig) -> Candidates:
        """Of the documents that a section of the config says it for."""
        return Candidates(
            section,
            position,
            horizon=self.config.target.horizon,
            excluded=self.markers.excluded,
            marker=marker_ids(self.tokenizer, position, section),
        )

    def _pieces(self, tokens: np.ndarray) -> str:
        """Tokens as text, one by one."""
        texts = [self.tokenizer.decode([token]) for token in tokens.tolist()]
        return "|" + "|".join(texts).replace("\n", "\\n") + "|"

    def _tokens_around(self, text: str, tokens: np.ndarray) -> np.ndarray:
        """The tokens of a document that the first occurrence of a text lies in."""

        def holds(start: int, stop: int) -> bool:
            return text in self.tokenizer.decode(tokens[start:stop])

        stop = bisect_left(range(len(tokens)), True, key=lambda end: holds(0, end))
        start = next(begin for begin in reversed(range(stop)) if holds(begin, stop))
        return tokens[start:stop]

    def why_no_position(self, tokens: np.ndarray, candidates: Candidates | None = None) -> str:
        """Why a document has no position that may be chosen: above all, a marker that is not in it,
        and what was searched.

        Args:
            candidates: the positions that were asked for; None: those of the run.
        """
        candidates = candidates or self.candidates
        marker, position = candidates.marker, candidates.config
        if not marker:
            return (
                f"a position needs {position.min_prefix_tokens} tokens before it"
                f" (position.min_prefix_tokens), {self.config.target.horizon} from it on"
                " (target.horizon), and no open marker among those"
            )

        stands = any(
            np.array_equal(tokens[start : start + len(marker)], marker)
            for start in range(len(tokens) - len(marker) + 1)
        )
        if stands:
            said = (
                "stands only where no position may be: too early (position.min_prefix_tokens),"
                " too late (target.horizon) or before an open marker"
            )
        elif position.marker in self.tokenizer.decode(tokens):
            there = self._tokens_around(position.marker, tokens)
            said = (
                f"is in the text, written with other tokens, {self._pieces(there)}; write it as"
                f" they are read, {self.tokenizer.decode(there)!r}"
            )
        else:
            said = "does not occur"
        return (
            f"{candidates.section}.marker {position.marker!r} {said}; searched: token ids"
            f" {list(marker)}, {self._pieces(np.array(marker))}"
        )


class RunSetup(PanelSetup):
    """What a run needs: its training documents and the shapes of its model too."""

    def __init__(
        self,
        config: Config,
        warn: Callable[[str], None],
        record: Callable[[dict], None] = lambda entry: None,
        progress: Tell = Progress,
    ) -> None:
        """
        Args:
            warn: told about skipped documents, once for each reason.
            record: told about each skipped document of the training data.
            progress: as `PanelSetup`.
        """
        super().__init__(config, warn, progress)
        text = self.architecture.get_text_config()
        text.vocab_size = vocabulary_with(self.markers, text.vocab_size)
        try:
            self.shapes = model_shapes(self.architecture)
        except ValueError as error:
            raise ConfigError(f"model.path: {config.model.path!r}: {first_line(error)}") from error
        rows = open_rows(config.data.train, config.data, config.data.split, "data.train", progress)
        reader = self._train_reader(rows)
        order = {"seed": config.run.seed, "weights": config.data.weights}
        self.stream = DocumentStream(reader, warn=warn, record=record, **order)

        # Data that is all bad is refused here.
        DocumentStream(reader, warn=lambda text: None, **order).next_documents(1)

    def _train_reader(self, rows: Rows) -> DocumentReader:
        """Of training documents; without thoughts any document of two tokens is good."""

        def all_but_the_first(tokens: np.ndarray) -> np.ndarray:
            return np.arange(1, len(tokens))

        candidates = self.candidates if self.config.objective.thinks else all_but_the_first
        return DocumentReader(
            rows,
            self.tokenizer,
            self.config.data,
            candidates=candidates,
            why_none=self.why_no_position,
            tokens_field=self.config.data.tokens_field,
            vocabulary=self.architecture.get_text_config().vocab_size,
        )

    def show_example(self) -> str:
        """The first document and where a thought would stand in it, token by token."""
        document = self.stream.next_documents(1)[0]
        lines = [
            f"document {document.id}: {len(document.tokens)} tokens",
            self._pieces(document.tokens),
        ]
        if self.config.objective.thinks:
            lines += self._show_thought(document)
        return "\n".join(lines)

    def _show_thought(self, document: Document) -> list[str]:
        """Where a thought would stand in a document; a position that only a model can choose is
        the first one that may be."""
        chosen = candidates = self.candidates(document.tokens)
        if self.config.position.selector in ("uniform", "marker"):
            chosen = choose_positions(
                [document],
                self.candidates,
                self.config.position,
                horizon=self.config.target.horizon,
                seed=self.config.run.seed,
                step=1,
            ).position

        position = int(chosen[0])
        prefix = self.thought_format.prefix(document.tokens, position)
        close = np.array(self.markers.close)
        target = document.tokens[position : position + self.config.target.horizon]
        return [
            f"position {position} of {len(candidates)} that may be chosen: {len(prefix)} tokens of"
            " instruction, prefix and open marker, then up to"
            f" {self.config.thought.max_thought_tokens} sampled tokens, the close marker, and the"
            " target",
            f"{self._pieces(prefix[-24:])} ... {self._pieces(close)} -> {self._pieces(target)}",
        ]
