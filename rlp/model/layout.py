"""How documents and thoughts become rows of tokens, and which log-probabilities are wanted from
them.

A layout is rows plus queries. A query names the hidden state that predicts (row, column), the token
it should predict, the temperature, and the token left out of the softmax. Queries stand in five
blocks:

    thought       each sampled token of each thought, at the sampling temperature        [N, L]
    target        the H target tokens after each thought, open marker excluded           [N, H]
    document      each token of each document but its first: the LM loss                 [B, P - 1]
    no_think      the H target tokens without a thought, open marker excluded            [M, H]
    open_marker   the open marker where a thought may start, nothing excluded            [M]

`repeated`: one row per thought (instruction, prefix, open marker, thought, close marker, targets)
and one row per document. Plain, right for every causal LM; the definition for any other
arrangement.

`tree`: one packed row without padding: each document once (a trunk), then the thoughts (branches),
which attend to their prefix of the trunk and to themselves (`attention`). For attention-only
models; the same numbers for less work.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  N = M * G rows of thoughts
    P  document tokens;  L  thought tokens;  H  target tokens;  R  rows;  T  tokens in a row;  Q
       queries
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.attention import Tree
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat, Thoughts


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows, queries in block order, and how to put the answers back in shape."""

    tokens: Tensor
    """[R, T] int64, padded on the right."""
    position: Tensor | None
    """[R, T] int64, place of each token in its own sequence; None where that is its column."""
    tree: Tree | None
    """Which token attends to which, where rows are no plain sequences."""
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


def sequence_parts(
    thought_format: ThoughtFormat, document_tokens: int, thought_tokens: int | None
) -> dict[str, int]:
    """What the longest sequence that a model is run on is made of, in either layout; its length is
    the sum.

        I + (P - H) + O + L + E + H - 1

    with I, O, E the tokens of instruction, open marker and close marker. The position stands at the
    end of its document, the close marker is forced after a whole budget, and the last target is
    predicted and never read.

    Args:
        document_tokens, thought_tokens: P and L, the longest; L is None where no thoughts are
            sampled.
    """
    if thought_tokens is None:
        return {"document": document_tokens}
    return {
        "instruction": len(thought_format.instruction),
        "document": document_tokens,
        "open marker": len(thought_format.markers.open),
        "thought": thought_tokens,
        "close marker": len(thought_format.markers.close),
        "last target (not read)": -1,
    }


def repeated_layout(
    documents: list[Document],
    positions: Positions | None,
    thoughts: Thoughts | None,
    thought_format: ThoughtFormat,
    *,
    lm: bool,
    no_think: bool,
    device: torch.device,
) -> Layout:
    """One row per thought, and one per document where the LM loss or a no-think log-probability is
    wanted.

    Args:
        thoughts: None for no thought rows.
        lm: ask for every token of every document.
        no_think: ask for the targets and the open marker without a thought.
    """
    builder = _Builder()
    for branch in _branches(positions, thoughts, thought_format):
        prefix = thought_format.prefix(documents[branch.document].tokens, branch.position)
        row = builder.add_row(np.concatenate([prefix, branch.after_open]))
        builder.ask_thought(thought_format, row, len(prefix) - 1, branch)
    num_thoughts = len(builder.rows)
    if lm or no_think:
        for d, document in enumerate(documents):
            builder.ask_document(
                thought_format,
                builder.add_row(document.tokens),
                0,
                document.tokens,
                _of(positions, d, no_think),
                lm,
            )
    lengths = np.array([len(row) for row in builder.rows])
    tokens = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    for row, content in zip(tokens, builder.rows):
        row[: len(content)] = content
    thought_queries = builder.num_thought_queries()
    return builder.finish(
        tokens,
        None,
        None,
        thoughts,
        documents,
        thought_format.horizon,
        device,
        thought_work=row_work(lengths[:num_thoughts], thought_queries),
        document_work=row_work(lengths[num_thoughts:], builder.num_queries() - thought_queries),
    )


def tree_layout(
    documents: list[Document],
    positions: Positions | None,
    thoughts: Thoughts | None,
    thought_format: ThoughtFormat,
    *,
    lm: bool,
    no_think: bool,
    device: torch.device,
) -> Layout:
    """All documents and thoughts in one packed row, each document once. Arguments as in
    `repeated_layout`.

    With an instruction the context of a thought is not the document that the LM loss is about: a
    document is then a trunk twice, with the instruction for its thoughts and without it for itself.
    """
    builder = _Builder()
    plain = lm or no_think
    thinking = {}
    for d in sorted({int(d) for d in positions.document}) if thoughts is not None else []:
        if len(thought_format.instruction) or not plain:
            thinking[d] = builder.add_row(
                thought_format.context(documents[d].tokens, positions.last_of(d))
            )
    if plain:
        for d, document in enumerate(documents):
            row = builder.add_row(document.tokens)
            thinking.setdefault(d, row)
            builder.ask_document(
                thought_format,
                0,
                builder.start_of(row),
                document.tokens,
                _of(positions, d, no_think),
                lm,
            )
    num_trunks = len(builder.rows)
    prefixes = []
    for branch in _branches(positions, thoughts, thought_format):
        prefixes.append(
            len(thought_format.context(documents[branch.document].tokens, branch.position))
        )
        row = builder.add_row(
            np.concatenate([thought_format.markers.open, branch.after_open]).astype(np.int64)
        )
        builder.ask_thought(
            thought_format, 0, builder.start_of(row) + len(thought_format.markers.open) - 1, branch
        )
    group = 1 if thoughts is None else thoughts.tokens.shape[1]
    trunk_of = () if thoughts is None else tuple(thinking[int(d)] for d in positions.document)
    lengths = np.array([len(row) for row in builder.rows])
    offset = np.concatenate(
        [np.zeros(num_trunks, dtype=np.int64), np.array(prefixes, dtype=np.int64)]
    )
    position = np.concatenate([start + np.arange(length) for start, length in zip(offset, lengths)])
    trunk_work, branch_work = (
        row_work(lengths[:num_trunks], 0),
        row_work(lengths[num_trunks:], builder.num_thought_queries()),
    )
    branch_work += Work(pairs=int((lengths[num_trunks:] * offset[num_trunks:]).sum()))
    return builder.finish(
        np.concatenate(builder.rows)[None],
        position[None],
        _tree(lengths, num_trunks, trunk_of, tuple(prefixes[::group]), device),
        thoughts,
        documents,
        thought_format.horizon,
        device,
        thought_work=branch_work if plain else branch_work + trunk_work,
        document_work=(
            trunk_work + Work(head_rows=builder.num_queries() - builder.num_thought_queries())
            if plain
            else Work()
        ),
    )


LAYOUTS = {"repeated": repeated_layout, "tree": tree_layout}
"""By the names of `engine.layout`."""


def padded_places(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where packed segments stand, as a padded block: places [X, longest] int64, 0 off a segment,
    and a mask of what is on one."""
    column = np.arange(int(lengths.max(initial=0)))
    inside = column < lengths[:, None]
    return np.where(inside, starts[:, None] + column, 0), inside


def _tree(
    lengths: np.ndarray,
    num_trunks: int,
    trunk_of: tuple[int, ...],
    prefix: tuple[int, ...],
    device: torch.device,
) -> Tree:
    """The places of packed segments in padded blocks and back."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    blocks, places, before = [], [], 0
    for first, last in ((0, num_trunks), (num_trunks, len(lengths))):
        block, inside = padded_places(starts[first:last], lengths[first:last])
        blocks.append(block)
        places.append((before + np.arange(inside.size)).reshape(inside.shape)[inside])
        before += inside.size
    trunk, branch, place = (
        torch.from_numpy(np.ascontiguousarray(part)).to(device)
        for part in (*blocks, np.concatenate(places))
    )
    return Tree(trunk=trunk, branch=branch, place=place, trunk_of=trunk_of, prefix=prefix)


@dataclass(frozen=True, slots=True)
class _Branch:
    """One thought with what stands around it."""

    document: int
    position: int
    thought: np.ndarray
    """Sampled tokens."""
    forced: np.ndarray
    """The close marker of a truncated thought; else nothing."""
    target: np.ndarray

    @property
    def after_open(self) -> np.ndarray:
        """What follows the open marker. The last target is predicted and never read, so it needs no
        place."""
        return np.concatenate([self.thought, self.forced, self.target[:-1]]).astype(np.int64)


def _branches(
    positions: Positions | None, thoughts: Thoughts | None, thought_format: ThoughtFormat
) -> Iterator[_Branch]:
    """The thoughts, position by position."""
    if thoughts is None:
        return
    tokens, mask, truncated = (
        part.cpu().numpy() for part in (thoughts.tokens, thoughts.mask, thoughts.truncated)
    )
    close, nothing = np.array(thought_format.markers.close), np.array([], dtype=np.int64)
    for m, (d, t, target) in enumerate(
        zip(positions.document, positions.position, positions.target)
    ):
        for g in range(tokens.shape[1]):
            yield _Branch(
                int(d),
                int(t),
                tokens[m, g][mask[m, g]],
                close if truncated[m, g] else nothing,
                target,
            )


def _of(positions: Positions | None, document: int, wanted: bool) -> list[tuple[int, np.ndarray]]:
    """(position, target) of one document; none where they are not wanted."""
    if not wanted:
        return []
    here = positions.slice_of_documents(document, document + 1)
    return list(zip(positions.position[here].tolist(), positions.target[here]))


THOUGHT, TARGET, DOCUMENT, NO_THINK, OPEN_MARKER = range(5)


class _Builder:
    """Rows and queries while they are collected, as numpy arrays."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self._starts: list[int] = [0]
        self._blocks: list[list[tuple[np.ndarray, ...]]] = [[], [], [], [], []]

    def add_row(self, tokens: np.ndarray) -> int:
        self.rows.append(tokens)
        self._starts.append(self._starts[-1] + len(tokens))
        return len(self.rows) - 1

    def start_of(self, row: int) -> int:
        """First column of a row when all rows are packed into one."""
        return self._starts[row]

    def ask_thought(
        self, thought_format: ThoughtFormat, row: int, open_column: int, branch: _Branch
    ) -> None:
        """Its tokens and targets; `open_column` holds the last token of the open marker."""
        length = len(branch.thought)
        self._ask(
            THOUGHT,
            row,
            open_column + np.arange(length),
            branch.thought,
            thought_format.temperature,
            -1,
        )
        start = open_column + length + len(branch.forced)
        self._ask(
            TARGET,
            row,
            start + np.arange(len(branch.target)),
            branch.target,
            thought_format.target_temperature,
            thought_format.markers.excluded,
        )

    def ask_document(
        self,
        thought_format: ThoughtFormat,
        row: int,
        start: int,
        tokens: np.ndarray,
        positions: list[tuple[int, np.ndarray]],
        lm: bool,
    ) -> None:
        """Tokens and no-think targets of a document that begins at column `start`."""
        if lm:
            self._ask(DOCUMENT, row, start + np.arange(len(tokens) - 1), tokens[1:], 1.0, -1)
        for t, target in positions:
            self._ask(
                NO_THINK,
                row,
                start + t - 1 + np.arange(len(target)),
                target,
                thought_format.target_temperature,
                thought_format.markers.excluded,
            )
            self._ask(
                OPEN_MARKER,
                row,
                np.array([start + t - 1]),
                np.array([thought_format.markers.excluded]),
                1.0,
                -1,
            )

    def _ask(
        self,
        block: int,
        row: int,
        columns: np.ndarray,
        targets: np.ndarray,
        temperature: float,
        excluded: int,
    ) -> None:
        """Queries of one row: token targets[i] predicted by the hidden state at columns[i]."""
        same = np.ones(len(columns), dtype=np.int64)
        self._blocks[block].append(
            (row * same, columns, targets, same / temperature, excluded * same)
        )

    def sizes(self) -> tuple[int, ...]:
        """Queries in each block."""
        return tuple(sum(len(part[0]) for part in block) for block in self._blocks)

    def num_queries(self) -> int:
        return sum(self.sizes())

    def num_thought_queries(self) -> int:
        """Queries whose hidden state belongs to a thought."""
        sizes = self.sizes()
        return sizes[THOUGHT] + sizes[TARGET]

    def finish(
        self,
        tokens: np.ndarray,
        position: np.ndarray | None,
        tree: Tree | None,
        thoughts: Thoughts | None,
        documents: list[Document],
        horizon: int,
        device: torch.device,
        *,
        thought_work: Work,
        document_work: Work,
    ) -> Layout:
        """The layout of what was collected."""
        columns = [
            np.concatenate(column)
            for column in zip(*(part for block in self._blocks for part in block))
        ]
        row, column, target, inverse_temperature, excluded = (
            torch.from_numpy(part).to(device) for part in columns
        )
        lengths = torch.tensor([len(document.tokens) - 1 for document in documents], device=device)
        return Layout(
            tokens=torch.from_numpy(tokens).to(device),
            position=None if position is None else torch.from_numpy(position).to(device),
            tree=tree,
            row=row,
            column=column,
            target=target,
            inverse_temperature=inverse_temperature.float(),
            excluded=excluded,
            sizes=self.sizes(),
            thought_mask=(
                torch.zeros(0, 0, dtype=torch.bool, device=device)
                if thoughts is None
                else rearrange(thoughts.mask, "m g l -> (m g) l")
            ),
            document_mask=torch.arange(int(lengths.max()), device=device) < lengths[:, None],
            horizon=horizon,
            thought_work=thought_work,
            document_work=document_work,
        )
