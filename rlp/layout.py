"""How documents and thoughts become rows of tokens, and which log-probabilities are wanted from them.

A layout is rows plus queries. A query names the hidden state that predicts (row, column), the token it
should predict, the temperature, and the token left out of the softmax. Queries stand in five blocks:

    thought       each sampled token of each thought, at the sampling temperature        [N, L]
    target        the H target tokens after each thought, open marker excluded           [N, H]
    document      each token of each document but its first: the LM loss                 [B, P - 1]
    no_think      the H target tokens without a thought, open marker excluded            [M, H]
    open_marker   the open marker where a thought may start, nothing excluded            [M]

`repeated`: one row per thought (instruction, prefix, open marker, thought, close marker, targets) and one
row per document. Plain, right for every causal LM; the definition for any other arrangement.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  N = M * G rows of thoughts
    P  document tokens;  L  thought tokens;  H  target tokens;  R  rows;  T  tokens in a row;  Q  queries
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config
from rlp.data import Document, Positions
from rlp.model import Markers


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """What a thought looks like in a row, and the temperatures."""

    markers: Markers
    instruction: tuple[int, ...]
    """Token ids put before the prefix when thinking; never in the no-think context."""
    begin: int | None
    """The beginning-of-sequence token, kept in front of the instruction; None where the tokenizer has none."""
    temperature: float
    """Of thought tokens, in sampling and in training."""
    target_temperature: float
    horizon: int

    def prefix(self, document: np.ndarray, position: int) -> np.ndarray:
        """Instruction, document before the position, open marker: what a thought continues."""
        lead = [self.begin] if len(self.instruction) and len(document) and document[0] == self.begin else []
        return np.concatenate([lead, self.instruction, document[len(lead):position], self.markers.open]).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Thoughts:
    """G sampled thoughts for each of M positions, with what the sampler knew about them."""

    tokens: Tensor
    """[M, G, L] int64, padded on the right; the close marker included where it was sampled."""
    mask: Tensor
    """[M, G, L] bool, True on sampled tokens; at least one per thought (Alg. 1, line 7)."""
    behavior_logprob: Tensor
    """[M, G, L] float32, nats, at the sampling temperature; 0 where mask is False."""
    entropy: Tensor
    """[M, G, L] float32, nats, of the distribution that each token was drawn from; 0 where mask is False."""
    truncated: Tensor
    """[M, G] bool, True where the budget ended the thought: its close marker is forced, without gradient."""

    def __getitem__(self, positions: slice) -> "Thoughts":
        """Those of some positions."""
        return Thoughts(self.tokens[positions], self.mask[positions], self.behavior_logprob[positions],
                        self.entropy[positions], self.truncated[positions])


@dataclass(frozen=True, slots=True)
class Work:
    """Size of a pass through the model, in the units that FLOPs are made of."""

    tokens: int = 0
    """Token positions run through the layers, padding not counted."""
    pairs: int = 0
    """Query-key pairs of causal attention: each token with itself and all before it in its row."""
    head_rows: int = 0
    """Hidden states multiplied with the LM head."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.head_rows + other.head_rows)


def row_work(lengths: np.ndarray, head_rows: int) -> Work:
    """Work of separate rows of these lengths."""
    lengths = lengths.astype(np.int64)
    return Work(tokens=int(lengths.sum()), pairs=int((lengths * (lengths + 1) // 2).sum()), head_rows=head_rows)


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows, queries in block order, and how to put the answers back in shape."""

    tokens: Tensor
    """[R, T] int64, padded on the right."""
    row: Tensor
    """[Q] int64."""
    column: Tensor
    """[Q] int64, of the hidden state that predicts."""
    target: Tensor
    """[Q] int64, the predicted token."""
    inverse_temperature: Tensor
    """[Q] float32."""
    excluded: Tensor
    """[Q] int64, token left out of the softmax, or -1."""
    sizes: tuple[int, int, int, int, int]
    """Queries in each block: thought, target, document, no_think, open_marker."""
    thought_mask: Tensor
    """[N, L] bool."""
    document_mask: Tensor
    """[B, P - 1] bool, True on the tokens of the LM loss."""
    horizon: int
    """H."""
    thought_work: Work
    """Of the thought rows."""
    document_work: Work
    """Of the document rows."""


class _Builder:
    """Rows and queries while they are collected, as numpy arrays."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.blocks: list[list[tuple[np.ndarray, ...]]] = [[], [], [], [], []]

    def add_row(self, tokens: np.ndarray) -> int:
        self.rows.append(tokens)
        return len(self.rows) - 1

    def ask(self, block: int, row: int, columns: np.ndarray, targets: np.ndarray, temperature: float, excluded: int) -> None:
        """Queries of one row: token targets[i] predicted by the hidden state at columns[i]."""
        same = np.ones(len(columns), dtype=np.int64)
        self.blocks[block].append((row * same, columns, targets, same / temperature, excluded * same))


THOUGHT, TARGET, DOCUMENT, NO_THINK, OPEN_MARKER = range(5)


def repeated(documents: list[Document], positions: Positions | None, thoughts: Thoughts | None, form: ThoughtFormat, *,
             lm: bool, no_think: bool, device: torch.device) -> Layout:
    """One row per thought, and one per document where the LM loss or a no-think log-probability is wanted.

    Args:
        thoughts: None for no thought rows.
        lm: ask for every token of every document.
        no_think: ask for the targets and the open marker without a thought.
    """
    builder = _Builder()
    num_thoughts = 0
    if thoughts is not None:
        group_size = thoughts.tokens.shape[1]
        num_thoughts = len(positions.position) * group_size
        tokens, mask, truncated = (rearrange(part, "m g ... -> (m g) ...").cpu().numpy() for part in (thoughts.tokens, thoughts.mask, thoughts.truncated))
        for n in range(num_thoughts):
            m = n // group_size
            document = documents[positions.document[m]].tokens
            _add_thought_row(builder, form, form.prefix(document, positions.position[m]), tokens[n][mask[n]], bool(truncated[n]), positions.target[m])
    if lm or no_think:
        _add_document_rows(builder, documents, positions if no_think else None, form, lm)
    thought_mask = torch.zeros(0, 0, dtype=torch.bool, device=device) if thoughts is None else rearrange(thoughts.mask, "m g l -> (m g) l")
    return _finish(builder, num_thoughts, thought_mask, documents, form.horizon, device)


def _add_thought_row(builder: _Builder, form: ThoughtFormat, prefix: np.ndarray, thought: np.ndarray, truncated: bool, target: np.ndarray) -> None:
    forced = np.array(form.markers.close if truncated else (), dtype=np.int64)
    # The last target is predicted and never read, so it needs no place in the row.
    row = builder.add_row(np.concatenate([prefix, thought, forced, target[:-1]]))
    builder.ask(THOUGHT, row, len(prefix) - 1 + np.arange(len(thought)), thought, form.temperature, -1)
    start = len(prefix) + len(thought) + len(forced) - 1
    builder.ask(TARGET, row, start + np.arange(len(target)), target, form.target_temperature, form.markers.excluded)


def _add_document_rows(builder: _Builder, documents: list[Document], positions: Positions | None, form: ThoughtFormat, lm: bool) -> None:
    rows = [builder.add_row(document.tokens) for document in documents]
    if lm:
        for row, document in zip(rows, documents):
            builder.ask(DOCUMENT, row, np.arange(len(document.tokens) - 1), document.tokens[1:], 1.0, -1)
    if positions is None:
        return
    for d, t, target in zip(positions.document, positions.position, positions.target):
        builder.ask(NO_THINK, rows[d], t - 1 + np.arange(len(target)), target, form.target_temperature, form.markers.excluded)
        builder.ask(OPEN_MARKER, rows[d], np.array([t - 1]), np.array([form.markers.excluded]), 1.0, -1)


def _finish(builder: _Builder, num_thoughts: int, thought_mask: Tensor, documents: list[Document], horizon: int, device: torch.device) -> Layout:
    lengths = np.array([len(row) for row in builder.rows])
    tokens = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    for row, content in zip(tokens, builder.rows):
        row[: len(content)] = content
    queries = [part for block in builder.blocks for part in block]
    columns = [np.concatenate(column) for column in zip(*queries)]
    sizes = tuple(sum(len(part[0]) for part in block) for block in builder.blocks)
    row, column, target, inverse_temperature, excluded = (torch.from_numpy(part).to(device) for part in columns)
    document_lengths = torch.tensor([len(document.tokens) - 1 for document in documents], device=device)
    document_mask = torch.arange(int(document_lengths.max()), device=device) < document_lengths[:, None]
    thought_queries = sizes[THOUGHT] + sizes[TARGET]
    return Layout(
        tokens=torch.from_numpy(tokens).to(device), row=row, column=column, target=target,
        inverse_temperature=inverse_temperature.float(), excluded=excluded, sizes=sizes,
        thought_mask=thought_mask, document_mask=document_mask, horizon=horizon,
        thought_work=row_work(lengths[:num_thoughts], thought_queries),
        document_work=row_work(lengths[num_thoughts:], sum(sizes) - thought_queries))


def thought_format(config: Config, markers: Markers, instruction: tuple[int, ...], begin: int | None) -> ThoughtFormat:
    """The format that a config asks for."""
    return ThoughtFormat(markers=markers, instruction=instruction, begin=begin, temperature=config.thought.temperature,
                         target_temperature=config.target.temperature, horizon=config.target.horizon)
