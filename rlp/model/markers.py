"""The markers around a thought: their token ids, in the tokenizer and in the model."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from rlp.config import ConfigError, ThoughtConfig


@dataclass(frozen=True, slots=True)
class Markers:
    """Token ids of the thought markers."""

    open: tuple[int, ...]
    """Put after the prefix, before the thought."""
    close: tuple[int, ...]
    """Sampled at the end of a thought, or forced when the budget ends it."""
    pieces: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Of each token that `thought.add_markers` adds: the tokens that wrote its text before. Its
    rows of embedding and head begin as the mean of theirs. Empty where nothing is added."""

    @property
    def excluded(self) -> int:
        """The first token of the open marker: removed from every target softmax. A policy that has
        learned to think holds mass there, which its no-think prediction would otherwise lack."""
        return self.open[0]


def find_markers(tokenizer: PreTrainedTokenizerBase, config: ThoughtConfig) -> Markers:
    """Token ids of the two markers. With `add_markers`, one of several tokens becomes a single new
    one.

    Raises:
        ConfigError: the tokenizer can not write a marker, or one of them stands inside the other.
    """
    texts = {"thought.open_marker": config.open_marker, "thought.close_marker": config.close_marker}
    written = {key: _marker_ids(tokenizer, key, text) for key, text in texts.items()}
    pieces = {}
    for key, text in texts.items():
        if config.add_markers and len(written[key]) > 1:
            # Not special: another program that leaves special tokens out still shows where a
            # thought ends.
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])
            added = _marker_ids(tokenizer, key, text)
            pieces[added[0]], written[key] = written[key], added

    open_ids, close_ids = written.values()
    if _stands_in(open_ids, close_ids) or _stands_in(close_ids, open_ids):
        raise ConfigError(
            f"thought.open_marker {config.open_marker!r} (token ids {list(open_ids)}) and"
            f" thought.close_marker {config.close_marker!r} ({list(close_ids)}): one stands inside"
            " the other, so a text with a thought in it does not say where the thought ends."
            " Write two markers that share no such part."
        )
    return Markers(open=open_ids, close=close_ids, pieces=pieces)


def _stands_in(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return any(
        whole[start : start + len(part)] == part for start in range(len(whole) - len(part) + 1)
    )


def _marker_ids(tokenizer: PreTrainedTokenizerBase, key: str, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigError(
            f"{key}: the tokenizer can not write {text!r} (token ids {list(ids)}, unknown token"
            f" {tokenizer.unk_token_id}). Write a marker that it knows, such as one of its special"
            f" tokens {tokenizer.all_special_tokens}."
        )
    return ids


def marker_notes(
    tokenizer: PreTrainedTokenizerBase, markers: Markers, config: ThoughtConfig
) -> list[str]:
    """What a user has to know of the markers before a run: what was added, or which ordinary token
    can be no target."""

    def texts(tokens: tuple[int, ...]) -> list[str]:
        return [tokenizer.decode([token]) for token in tokens]

    written = (
        f"{config.open_marker!r} (token ids {list(markers.open)}) and"
        f" {config.close_marker!r} ({list(markers.close)})"
    )
    if markers.pieces:
        means = "; ".join(f"{token} from {texts(was)}" for token, was in markers.pieces.items())
        return [
            "thought.add_markers: added to tokenizer and model, each as the mean of the tokens that"
            f" wrote it: {means}. The markers are {written}; they mean nothing to the model before"
            " it has seen thoughts between them (docs/warm_start.md)."
        ]
    if config.add_markers:
        return [
            f"thought.add_markers: nothing is added, the tokenizer has {written} as single tokens."
        ]
    if len(markers.open) == 1:
        return []
    pieces = texts(markers.open)
    return [
        f"WARNING: thought.open_marker {config.open_marker!r} is {len(pieces)} tokens to this"
        f" tokenizer, {pieces}. The first one, {pieces[0]!r} (token id {markers.excluded}), is"
        " therefore left out of every target softmax, and no target may be one. Write"
        " thought.add_markers=true, which makes each marker one new token, or make such a model"
        " once: rlp add-markers MODEL --out FOLDER."
    ]


Whole = Callable[[list[nn.Parameter]], AbstractContextManager]
"""A context in which parameters that are sharded as they are read are whole, to be written."""


def vocabulary_with(markers: Markers, vocabulary: int) -> int:
    """Rows of embedding and head once the added markers are in a model of `vocabulary` rows. Rows
    beyond the tokenizer's tokens, which padded vocabularies have, are used before there are new
    ones."""
    return max(vocabulary, *(token + 1 for token in markers.pieces), 0)


@torch.no_grad()
def embed_markers(lm: PreTrainedModel, markers: Markers, whole: Whole) -> None:
    """Give each added marker its row in the embedding, the head where it is not tied, and the
    head's bias where there is one: the mean, taken in float32, of the rows of the tokens that wrote
    its text before. All other rows stay.

    Args:
        whole: of `load_policy`.
    """
    if not markers.pieces:
        return
    text = lm.config.get_text_config()
    if (rows := vocabulary_with(markers, text.vocab_size)) > text.vocab_size:
        lm.resize_token_embeddings(rows, mean_resizing=False)

    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    tables = [embedding]
    for table in (head.weight, getattr(head, "bias", None)):
        if table is not None and table is not embedding:
            tables.append(table)
    with whole(tables):
        for table in tables:
            for token, pieces in markers.pieces.items():
                table[token] = table[list(pieces)].float().mean(dim=0).to(table.dtype)
