"""Rows of a corpus as documents of a selection: which of their tokens are predicted."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import ConfigError
from rlp.data.documents import Document, fill_template, short
from rlp.data.errors import BadDocument


@dataclass(frozen=True, slots=True)
class Templates:
    """How a row is read: as a text, or as a completion after a prompt."""

    text: str | None = None
    """Such as {text}; all of it is predicted."""
    prompt: str | None = None
    completion: str | None = None
    """Predicted alone, after the prompt."""

    def __post_init__(self) -> None:
        if self.text is not None and (self.prompt is not None or self.completion is not None):
            raise ConfigError("--template is for a text: it has no place beside --completion.")
        if self.prompt is not None and self.completion is None:
            raise ConfigError("--prompt needs --completion, which says what comes after it.")

    def fill(self, row: dict) -> tuple[str, str]:
        """(prompt, completion); a text is a completion without a prompt.

        Raises:
            BadDocument: a field is missing or no text, nothing is predicted, or it is not Unicode.
        """
        if self.text is not None:
            parts = "", fill_template(self.text, row)
        elif self.completion is not None:
            parts = fill_template(self.prompt or "", row), fill_template(self.completion, row)
        elif "completion" in row:
            prompt = fill_template("{prompt}", row) if "prompt" in row else ""
            parts = prompt, fill_template("{completion}", row)
        else:
            parts = "", fill_template("{text}", row)
        if not parts[1].strip():
            raise BadDocument("empty text", "nothing but white space; expected text")
        try:
            "".join(parts).encode()
        except UnicodeEncodeError as error:
            raise BadDocument("not Unicode", short(str(error))) from error
        return parts


SHORT, FOREIGN = "short", "other vocabulary"


def document_of(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    most_tokens: int,
    vocabulary: int,
) -> Document:
    """The first `most_tokens` tokens, with a loss on those that reach into the completion.

    Raises:
        BadDocument: fewer than two tokens, or none that is predicted; or the tokenizer knows less
            than half of the text, or has tokens that the proxy lacks.
    """
    text = prompt + completion
    read = text[: max(64, most_tokens) * 32]  # a token is seldom longer; a longer text is cut
    encoded = tokenizer(read, return_offsets_mapping=True, truncation=False)
    tokens = np.array(encoded["input_ids"][:most_tokens], dtype=np.int64)
    ends = np.array([end for _, end in encoded["offset_mapping"][:most_tokens]], dtype=np.int64)
    counts = ends > len(prompt)
    if len(tokens) < 2 or not counts[1:].any():
        raise BadDocument(
            SHORT, f"{len(tokens)} tokens, of which {counts[1:].sum()} are predicted; at least 1"
        )
    if tokens.max() >= vocabulary:
        raise BadDocument(FOREIGN, f"token {tokens.max()} of a proxy with {vocabulary}")
    unknown = tokenizer.unk_token_id
    if unknown is not None and 2 * (tokens == unknown).sum() > len(tokens):
        raise BadDocument(FOREIGN, f"{(tokens == unknown).sum()} of {len(tokens)} tokens unknown")
    return Document(0, tokens, loss_mask=counts)
