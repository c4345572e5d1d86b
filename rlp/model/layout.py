"""Documents and thoughts as rows of tokens, and which log-probabilities are wanted of them.

A layout is rows plus queries. A query names the hidden state that predicts (row, column), the token
it should predict, the temperature, and the token left out of the softmax. Queries stand in five
blocks:

    thought       each sampled token of each thought, at the sampling temperature        [N, L]
                  and of its prediction, open marker excluded                        [N, L + H]
    target        the H target tokens after each thought, open marker excluded           [N, H]
                  the first alone where a prediction stands there                        [N, 1]
    document      the tokens of the LM loss: all of a document but its first, or some    [B, P - 1]
    no_think      the H target tokens without a thought, open marker excluded            [M, H]
    open_marker   the open marker where a thought may start, nothing excluded            [M]

`repeated_layout`: one row per thought (instruction, prefix, open marker, thought, close marker,
targets or prediction) and one per document. Plain, right for every causal LM; the definition for
any other.

`tree_layout`: one packed row without padding: each document once (a trunk), then the thoughts
(branches), which attend to their prefix of the trunk and to themselves (`attention`). For
attention-only models; the same numbers for less work.

What runs a layout, and what its answers are for, is not known here.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  N = M * G rows of thoughts
    P  document tokens;  L  thought tokens;  H  target tokens
    R  rows;  T  tokens in a row;  Q  queries
"""

from collections.abc import Iterator, Sequence
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

THOUGHT, TARGET, DOCUMENT, NO_THINK, OPEN_MARKER = range(5)
"""The blocks."""


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
    asked: Tensor
    """int64, the queries that leave one out."""
    sizes: tuple[int, int, int, int, int]
    """Queries in each block: thought, target, document, no_think, open_marker."""
    thought_mask: Tensor
    """[N, L] or [N, L + H] bool, `Thoughts.sampled_mask`."""
    thought_place: Tensor
    """int64, the places of its True entries, row by row."""
    document_mask: Tensor
    """[B, P - 1] bool, True on the tokens of the LM loss."""
    document_place: Tensor
    """int64, likewise."""
    horizon: int
    """Real target tokens scored at a position: H, or 1 (`ThoughtFormat.scored`)."""
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
        lm: ask for the tokens of every document that the LM loss is taken on.
        no_think: ask for the targets and the open marker without a thought.
    """
    builder = _Builder(thought_format)
    for branch in _branches(positions, thoughts, thought_format):
        prefix = thought_format.prefix(documents[branch.document].tokens, branch.position)
        row = builder.add_row(np.concatenate([prefix, branch.after_open]))
        builder.ask_thought(row, len(prefix) - 1, branch)
    num_thoughts = len(builder.rows)

    if lm or no_think:
        for d, document in enumerate(documents):
            row = builder.add_row(document.tokens)
            builder.ask_document(row, 0, document, _targets(positions, d, no_think), lm)

    lengths = builder.lengths()
    return builder.finish(
        padded_rows(builder.rows)[0],
        _thought_mask(thoughts),
        documents,
        device,
        thought_work=row_work(lengths[:num_thoughts], builder.num_thought_queries()),
        document_work=row_work(lengths[num_thoughts:], builder.num_document_queries()),
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
    builder = _Builder(thought_format)
    plain = lm or no_think
    trunk_of = {}
    if thoughts is not None and (len(thought_format.instruction) or not plain):
        for d in sorted(set(positions.document.tolist())):
            context = thought_format.context(documents[d].tokens, positions.last_of(d))
            trunk_of[d] = builder.add_row(context)
    if plain:
        for d, document in enumerate(documents):
            row = builder.add_row(document.tokens)
            trunk_of.setdefault(d, row)
            start = builder.start_of(row)
            builder.ask_document(0, start, document, _targets(positions, d, no_think), lm)
    num_trunks = len(builder.rows)

    trunks, prefixes = [], []
    opening = np.array(thought_format.markers.open, dtype=np.int64)
    for branch in _branches(positions, thoughts, thought_format):
        trunks.append(trunk_of[branch.document])
        context = thought_format.context(documents[branch.document].tokens, branch.position)
        prefixes.append(len(context))
        row = builder.add_row(np.concatenate([opening, branch.after_open]))
        builder.ask_thought(0, builder.start_of(row) + len(opening) - 1, branch)

    lengths = builder.lengths()
    before = np.array([0] * num_trunks + prefixes)
    position = np.concatenate([start + np.arange(length) for start, length in zip(before, lengths)])
    group = 1 if thoughts is None else thoughts.tokens.shape[1]
    tree = _tree(lengths, num_trunks, tuple(trunks[::group]), tuple(prefixes[::group]), device)

    trunk_work = row_work(lengths[:num_trunks], builder.num_document_queries())
    branch_work = row_work(
        lengths[num_trunks:], builder.num_thought_queries(), before=before[num_trunks:]
    )
    return builder.finish(
        np.concatenate(builder.rows)[None],
        _thought_mask(thoughts),
        documents,
        device,
        position=to_device(position[None], device),
        tree=tree,
        thought_work=branch_work if plain else branch_work + trunk_work,
        document_work=trunk_work if plain else Work(),
    )


LAYOUTS = {"repeated": repeated_layout, "tree": tree_layout}
"""By the names of `engine.layout`."""


def continuation_layout(
    contexts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    thought_format: ThoughtFormat,
    device: torch.device,
) -> Layout:
    """One row per context [T] with its continuation [L], of which each token is asked for in the
    place of a thought: at temperature 1, open marker excluded."""
    builder = _Builder(thought_format)
    for context, continuation in zip(contexts, continuations):
        row = builder.add_row(np.concatenate([context, continuation[:-1]]))
        columns = len(context) - 1 + np.arange(len(continuation))
        builder.ask(THOUGHT, row, columns, continuation, 1.0, thought_format.markers.excluded)
    mask = row_mask(np.array([len(continuation) for continuation in continuations]))
    return builder.finish(
        padded_rows(builder.rows)[0],
        mask,
        [],
        device,
        thought_work=row_work(builder.lengths(), builder.num_thought_queries()),
        document_work=Work(),
    )


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on a device, which is not waited for."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def row_mask(lengths: np.ndarray) -> np.ndarray:
    """[X, longest] bool, True on the first `length` places of each row."""
    return np.arange(int(lengths.max(initial=0))) < lengths[:, None]


def padded_rows(rows: list[np.ndarray], *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one block [R, T] int64, padded with zeros on the right, or on the left; and a mask of
    what is no padding."""
    mask = row_mask(np.array([len(row) for row in rows]))
    if left:
        mask = mask[:, ::-1].copy()
    tokens = np.zeros(mask.shape, dtype=np.int64)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def padded_places(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where packed segments stand, as a padded block: places [X, longest] int64, 0 off a segment,
    and a mask of what is on one."""
    mask = row_mask(lengths)
    return np.where(mask, starts[:, None] + np.arange(mask.shape[1]), 0), mask


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
        block, mask = padded_places(starts[first:last], lengths[first:last])
        blocks.append(block)
        places.append(before + np.flatnonzero(mask))
        before += mask.size
    trunk, branch, place = (to_device(part, device) for part in (*blocks, np.concatenate(places)))
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
    """Those that are scored."""
    prediction: np.ndarray
    """Sampled tokens after the close marker; mostly nothing."""

    @property
    def after_open(self) -> np.ndarray:
        """What follows the open marker. The last token of target or prediction is predicted and
        never read, so it needs no place."""
        return np.concatenate([self.thought, self.forced, self.target[:-1], self.prediction[:-1]])


def _branches(
    positions: Positions | None, thoughts: Thoughts | None, thought_format: ThoughtFormat
) -> Iterator[_Branch]:
    """The thoughts, position by position."""
    if thoughts is None:
        return
    tokens, mask, truncated = (
        part.cpu().numpy() for part in (thoughts.tokens, thoughts.mask, thoughts.truncated)
    )
    if thought_format.predicts:
        prediction = thoughts.prediction
        said, said_mask = prediction.tokens.cpu().numpy(), prediction.mask.cpu().numpy()
    close = np.array(thought_format.markers.close, dtype=np.int64)
    for m, (d, t) in enumerate(positions.places()):
        for g in range(tokens.shape[1]):
            forced = close if truncated[m, g] else close[:0]
            target = positions.target[m][: thought_format.scored]
            prediction = said[m, g][said_mask[m, g]] if thought_format.predicts else close[:0]
            yield _Branch(d, t, tokens[m, g][mask[m, g]], forced, target, prediction)


def _thought_mask(thoughts: Thoughts | None) -> np.ndarray:
    """[N, L] or [N, L + H] bool."""
    if thoughts is None:
        return np.zeros((0, 0), dtype=bool)
    return rearrange(thoughts.sampled_mask.cpu().numpy(), "m g l -> (m g) l")


def _document_mask(documents: list[Document]) -> np.ndarray:
    """[B, P - 1] bool."""
    mask = row_mask(np.array([len(document.tokens) - 1 for document in documents]))
    mask[mask] = np.concatenate([np.zeros(0, bool), *(each.predicted for each in documents)])
    return mask


def _targets(
    positions: Positions | None, document: int, wanted: bool
) -> list[tuple[int, np.ndarray]]:
    """(position, target) of one document; none where they are not wanted."""
    if not wanted:
        return []
    here = positions.of_documents(document, document + 1)
    return list(zip(here.position.tolist(), here.target))


class _Builder:
    """Rows and queries while they are collected, as numpy arrays."""

    def __init__(self, thought_format: ThoughtFormat) -> None:
        self.rows: list[np.ndarray] = []
        self._format = thought_format
        self._starts = [0]
        self._blocks: list[list[tuple[np.ndarray, ...]]] = [[], [], [], [], []]

    def add_row(self, tokens: np.ndarray) -> int:
        self.rows.append(tokens)
        self._starts.append(self._starts[-1] + len(tokens))
        return len(self.rows) - 1

    def start_of(self, row: int) -> int:
        """First column of a row when all rows are packed into one."""
        return self._starts[row]

    def lengths(self) -> np.ndarray:
        """[R] int64."""
        return np.diff(self._starts)

    def ask_thought(self, row: int, open_column: int, branch: _Branch) -> None:
        """Its tokens and targets; `open_column` holds the last token of the open marker."""
        length, temperature = len(branch.thought), self._format.temperature
        columns = open_column + np.arange(length)
        self.ask(THOUGHT, row, columns, branch.thought, temperature, -1)

        closed = open_column + length + len(branch.forced)
        columns = closed + np.arange(len(branch.prediction))
        excluded = self._format.markers.excluded
        self.ask(THOUGHT, row, columns, branch.prediction, temperature, excluded)
        self._ask_target(TARGET, row, closed, branch.target)

    def ask_document(
        self,
        row: int,
        start: int,
        document: Document,
        targets: list[tuple[int, np.ndarray]],
        lm: bool,
    ) -> None:
        """Tokens and no-think targets (position, target) of a document that begins at column
        `start`."""
        if lm:
            before = np.flatnonzero(document.predicted)
            self.ask(DOCUMENT, row, start + before, document.tokens[before + 1], 1.0, -1)
        for t, target in targets:
            last = start + t - 1
            self._ask_target(NO_THINK, row, last, target[: self._format.scored])
            marker = np.array([self._format.markers.excluded])
            self.ask(OPEN_MARKER, row, np.array([last]), marker, 1.0, -1)

    def _ask_target(self, block: int, row: int, first: int, target: np.ndarray) -> None:
        """Target tokens, the first of them predicted at column `first`."""
        columns = first + np.arange(len(target))
        markers, temperature = self._format.markers, self._format.target_temperature
        self.ask(block, row, columns, target, temperature, markers.excluded)

    def ask(
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

    def _sizes(self) -> tuple[int, ...]:
        """Queries in each block."""
        return tuple(sum(len(part[0]) for part in block) for block in self._blocks)

    def num_thought_queries(self) -> int:
        """Queries whose hidden state belongs to a thought."""
        return sum(self._sizes()[: TARGET + 1])

    def num_document_queries(self) -> int:
        """All others."""
        return sum(self._sizes()[DOCUMENT:])

    def finish(
        self,
        tokens: np.ndarray,
        thought_mask: np.ndarray,
        documents: list[Document],
        device: torch.device,
        *,
        position: Tensor | None = None,
        tree: Tree | None = None,
        thought_work: Work,
        document_work: Work,
    ) -> Layout:
        """The layout of what was collected."""
        collected = [part for block in self._blocks for part in block]
        columns = [np.concatenate(parts) for parts in zip(*collected)]
        row, column, target, inverse_temperature, excluded = (
            to_device(part, device) for part in columns
        )
        document_mask = _document_mask(documents)

        return Layout(
            tokens=to_device(tokens, device),
            position=position,
            tree=tree,
            row=row,
            column=column,
            target=target,
            inverse_temperature=inverse_temperature.float(),
            excluded=excluded,
            asked=to_device(np.flatnonzero(columns[-1] >= 0), device),
            sizes=self._sizes(),
            thought_mask=to_device(thought_mask, device),
            thought_place=to_device(np.flatnonzero(thought_mask), device),
            document_mask=to_device(document_mask, device),
            document_place=to_device(np.flatnonzero(document_mask), device),
            horizon=self._format.scored,
            thought_work=thought_work,
            document_work=document_work,
        )
