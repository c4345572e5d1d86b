"""What tests of the data read with: a stream whose warnings are kept, and small files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlp.config import DataConfig
from rlp.data.reader import DocumentReader
from rlp.data.sources import open_rows
from rlp.data.stream import DocumentStream
from tests.tiny_models import WORDS, word_tokenizer

GOOD = b'{"text": "w1 w2 w3"}\n'
GOOD_TOKENS = [7, 8, 9]


def after_the_first(tokens: np.ndarray) -> np.ndarray:
    """Candidates: every position with a context."""
    return np.arange(1, len(tokens))


class Reader:
    """A stream over files, its warnings kept."""

    def __init__(
        self,
        files: list[Path],
        *,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerFast | None = None,
        candidates: Callable[[np.ndarray], np.ndarray] = after_the_first,
        **fields: object,
    ) -> None:
        config = DataConfig(
            **{"train": [str(path) for path in files], "shuffle": False, "max_bad_fraction": 1.0}
            | fields
        )
        self.warnings: list[str] = []
        self.listed: list[dict] = []
        self.rows = open_rows(config.train, config, config.split, "data.train")
        self.reader = DocumentReader(
            self.rows,
            tokenizer or word_tokenizer(),
            config,
            candidates=candidates,
            tokens_field=config.tokens_field,
            vocabulary=len(WORDS),
        )
        self.stream = DocumentStream(
            self.reader,
            seed=seed,
            warn=self.warnings.append,
            record=self.listed.append,
            weights=config.weights,
        )

    def tokens(self, count: int) -> list[list[int]]:
        return [document.tokens.tolist() for document in self.stream.next_documents(count)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def numbered(path: Path, count: int) -> Path:
    """A corpus whose row r is the word number r."""
    return write(path, b"".join(b'{"text": "w%d w0"}\n' % row for row in range(count)))
