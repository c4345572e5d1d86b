"""Rows of thoughts while they are sampled: how a model holds what it has read.

    ForkedBranches   a cache per row, forked from that of its prefix: any causal model
    SharedBranches   keys of a document once, and of each thought beside them: attention-only models

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
from rlp.model.attention import SharedKeys
from rlp.model.layout import padded_places, padded_rows
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
        used = sorted(set(positions.document.tolist()))
        trunks = [thought_format.context(documents[d].tokens, positions.last_of(d)) for d in used]
        lengths = np.array([len(trunk) for trunk in trunks])
        prefix = np.array(
            [len(thought_format.context(documents[d].tokens, t)) for d, t in positions.places()]
        )
        places, mask = padded_places(np.cumsum(lengths) - lengths, lengths)

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(policy.device)

        self._open = thought_format.markers.open
        self._tokens = on_device(np.concatenate(trunks))
        self._trunk_position = on_device(np.concatenate([np.arange(length) for length in lengths]))
        self._position = on_device(np.repeat(prefix, group_size))
        self._keys = SharedKeys(
            trunk=on_device(places),
            place=on_device(np.flatnonzero(mask)),
            trunk_of=on_device(np.repeat(np.searchsorted(used, positions.document), group_size)),
            prefix=self._position,
            # The last token of a thought is drawn and not run.
            most=len(self._open) + max_thought_tokens - 1,
        )

        opening = np.full_like(prefix, len(self._open))
        branch_work = row_work(
            opening, group_size * int(opening.sum()), before=prefix, count=group_size
        )
        self.prefill_work = row_work(lengths, 0) + branch_work
        super().__init__(policy, len(self._position))

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
