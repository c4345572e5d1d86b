"""Rows of thoughts while they are sampled: how a model holds what it has read.

    ForkedBranches   a cache per row, forked from that of its prefix: any causal model

Which token is drawn, and when a thought has ended, is not known here.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G  rows of thoughts;  V  vocabulary
    T  prefix tokens, padded on the left
"""

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.layout import padded_rows
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat


class Branches:
    """N thoughts that grow side by side behind the prefixes of their positions.

    `first` once, then `next` with the rows that go on, all within `Policy.sampling`. Rows that
    `next` is not given have ended; their memory is freed when half of those held have.
    """

    prefill_work: Work
    """Of what `first` runs."""

    def __init__(self, policy: Policy, num_rows: int) -> None:
        self._policy = policy
        self._held = torch.arange(num_rows, device=policy.device)

    def first(self) -> Tensor:
        """Run the prefixes; [N, V] float32 logits of the first thought token."""
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

    def idle(self, logits: Tensor) -> Tensor:
        """A forward without use, in step with ranks that still sample; no row of the answer
        counts."""
        self._append(torch.zeros_like(self._held))
        return logits[:0]

    def _append(self, tokens: Tensor) -> Tensor:
        """A token for every row that is held; logits after it."""
        raise NotImplementedError

    def _keep(self, index: Tensor) -> None:
        """Hold these rows only, of those that are held."""
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
        prefixes = [thought_format.prefix(documents[d].tokens, t) for d, t in positions.places()]
        self._tokens, self._mask = (
            torch.from_numpy(part).to(policy.device) for part in padded_rows(prefixes, left=True)
        )
        index = torch.arange(len(prefixes), device=policy.device)
        self._fork = repeat(index, "m -> (m g)", g=group_size)
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
