"""Rows of thoughts while they are sampled: how each architecture holds what it has read.

ForkedBranches   a cache per row, forked from that of its prefix: any causal model
SharedBranches   keys of a document once, and of each thought beside them: attention-only models
"""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.attention import SharedKeys
from rlp.model.layout import padded_places
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat


class Branches:
    """Thoughts that grow side by side from shared prefixes. Those that have ended are dropped when
    half have."""

    prefill_work: Work
    """Of the prefixes."""

    def __init__(self, policy: Policy, num_rows: int) -> None:
        self._policy = policy
        self._held = torch.arange(num_rows, device=policy.device)

    def sampling(self) -> AbstractContextManager:
        """As `Policy.sampling`."""
        return self._policy.sampling()

    def idle(self, logits: Tensor) -> Tensor:
        """A forward without use, in step with ranks that still sample; no row of the answer
        counts."""
        self._append(torch.zeros_like(self._held))
        return logits[:0]

    def first(self) -> Tensor:
        """[N, V] logits of the first thought token."""
        raise NotImplementedError

    def next(self, rows: Tensor, token: Tensor) -> Tensor:
        """Append a token to some rows; logits [rows, V] after it.

        Args:
            rows: ascending row numbers, among those of the last call.
        """
        if 2 * len(rows) <= len(self._held):
            self._keep(torch.searchsorted(self._held, rows))
            self._held = rows
        place = torch.searchsorted(self._held, rows)
        tokens = torch.zeros_like(self._held)
        tokens[place] = token
        return self._append(tokens)[place]

    def _append(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def _keep(self, index: Tensor) -> None:
        raise NotImplementedError


class ForkedBranches(Branches):
    """Each prefix run once and its cache copied for its thoughts: any causal LM, state-space states
    included."""

    def __init__(
        self,
        policy: Policy,
        documents: list[Document],
        positions: Positions,
        thought_format: ThoughtFormat,
        group_size: int,
    ) -> None:
        prefixes = [
            thought_format.prefix(documents[d].tokens, t)
            for d, t in zip(positions.document, positions.position)
        ]
        self._tokens, self._mask = _pad_left(prefixes, policy.device)
        self._fork = torch.arange(len(prefixes), device=policy.device).repeat_interleave(group_size)
        self._position = self._mask.sum(dim=1)[self._fork]
        self.prefill_work = row_work(np.array([len(prefix) for prefix in prefixes]), len(prefixes))
        super().__init__(policy, len(self._fork))

    def first(self) -> Tensor:
        logits, self._cache = self._policy.prefill(self._tokens, self._mask)
        self._policy.fork(self._cache, self._fork)
        self._mask = self._mask[self._fork]
        return logits[self._fork]

    def _append(self, tokens: Tensor) -> Tensor:
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        logits = self._policy.decode(tokens, self._mask, self._position, self._cache)
        self._position = self._position + 1
        return logits

    def _keep(self, index: Tensor) -> None:
        self._policy.fork(self._cache, index)
        self._mask, self._position = self._mask[index], self._position[index]


class SharedBranches(Branches):
    """Each document run once for all its positions, its keys held once: models that run trees."""

    def __init__(
        self,
        policy: Policy,
        documents: list[Document],
        positions: Positions,
        thought_format: ThoughtFormat,
        group_size: int,
        max_thought_tokens: int,
    ) -> None:
        used = sorted({int(d) for d in positions.document})
        trunks = [thought_format.context(documents[d].tokens, positions.last_of(d)) for d in used]
        lengths = np.array([len(trunk) for trunk in trunks])
        places, inside = padded_places(np.cumsum([0, *lengths[:-1]]), lengths)
        prefix = [
            len(thought_format.context(documents[d].tokens, t))
            for d, t in zip(positions.document, positions.position)
        ]

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(policy.device)

        self._open = thought_format.markers.open
        self._tokens, self._trunk_position = (
            on_device(np.concatenate(trunks)),
            on_device(np.concatenate([np.arange(length) for length in lengths])),
        )
        self._position = on_device(prefix).repeat_interleave(group_size)
        trunk_of = on_device([used.index(int(d)) for d in positions.document]).repeat_interleave(
            group_size
        )
        most = (
            len(self._open) + max_thought_tokens - 1
        )  # the last token of a thought is drawn and not run
        self._keys = SharedKeys(
            on_device(places), on_device(np.flatnonzero(inside)), trunk_of, self._position, most
        )
        opening = np.full(len(prefix), len(self._open))
        queries = group_size * int(opening.sum())
        self.prefill_work = row_work(lengths, 0) + row_work(
            opening, queries, before=np.array(prefix), count=group_size
        )
        super().__init__(policy, len(trunk_of))

    def first(self) -> Tensor:
        self._policy.prefill_trunks(self._tokens[None], self._trunk_position[None], self._keys)
        for token in self._open:
            logits = self._append(torch.full_like(self._held, token))
        return logits

    def _append(self, tokens: Tensor) -> Tensor:
        logits = self._policy.decode_branches(tokens, self._position, self._keys)
        self._position = self._position + 1
        return logits

    def _keep(self, index: Tensor) -> None:
        self._keys.keep(index)
        self._position = self._position[index]


def _pad_left(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens, mask = (
        np.zeros((len(rows), width), dtype=np.int64),
        np.zeros((len(rows), width), dtype=bool),
    )
    for r, row in enumerate(rows):
        tokens[r, width - len(row) :], mask[r, width - len(row) :] = row, True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
