"""The reference sampler: blocks of thoughts, each sampled until its longest has ended.

A plain eager loop that every faster sampler is compared with: R rows at a time, whole groups; rows
that have ended leave the block when half of it has, and nothing takes their place. It is here
whole, with its keys (`block_keys`) and its draw, so that it stays what it is.

    ForkedBranches   a cache per row, forked from that of its prefix: any causal model
    SharedBranches   keys of a document once, and of each thought beside them: attention-only models

Dimensions
    M  positions;  G  thoughts per position;  N = M * G  rows of thoughts;  V  vocabulary
    T  prefix tokens, padded on the left;  R  rows decoded side by side;  L  thought tokens
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.layout import padded_places, padded_rows
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling.rollout import NoiseKey, Rollout
from sampling_phase.block_keys import ATTENTION, BlockKeys


class BlockSampler:
    """Samples block by block. A `Sampler` in its methods; it neither asks other ranks nor looks for
    a stop."""

    def __init__(self, policy: Policy, *, rows: int, shared: bool) -> None:
        """
        Args:
            rows: thoughts decoded side by side; whole groups, at least one.
            shared: run each document once for all its positions and hold its keys once; else run
                each prefix once and fork its cache.
        """
        self._policy, self._rows, self._shared = policy, rows, shared

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Around calls of `sample`."""
        lm = self._policy.lm
        attention = lm.config._attn_implementation
        if self._shared:
            lm.set_attn_implementation(ATTENTION)
        try:
            with self._policy.sampling():
                yield
        finally:
            lm.set_attn_implementation(attention)

    def sample(
        self,
        documents: list[Document],
        positions: Positions,
        thought_format: ThoughtFormat,
        noise: NoiseKey,
        *,
        group_size: int,
        max_thought_tokens: int,
        prefill: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Rollout:
        """G thoughts at each position.

        Args:
            prefill: makes what is entered while prefixes are run.
        """
        size = max(1, self._rows // group_size)
        parts, prefill_work = [], Work()
        for start in range(0, len(positions.position), size):
            some = positions[start : start + size]
            given = (self._policy, documents, some, thought_format, group_size)
            branches = (
                SharedBranches(*given, max_thought_tokens)
                if self._shared
                else ForkedBranches(*given)
            )
            uniforms = [
                [noise.uniforms(documents[d], t, g, max_thought_tokens) for g in range(group_size)]
                for d, t in some.places()
            ]
            numbers = torch.from_numpy(np.array(uniforms)).to(self._policy.device)
            parts.append(_decode(branches, numbers, thought_format, prefill))
            prefill_work += branches.prefill_work

        thoughts = Thoughts.joined(parts)
        prefixes = [thought_format.prefix(documents[d].tokens, t) for d, t in positions.places()]
        return Rollout(thoughts, prefill_work, _decode_work(prefixes, thoughts))


class Branches:
    """N thoughts that grow side by side behind the prefixes of their positions.

    `first` once, then `next` with the rows that go on, all within `sampling`. Rows that `next` is
    not given have ended; their memory is freed when half of those held have.
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
        self._keys = BlockKeys(
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
        self._forward(self._tokens, self._trunk_position)
        for token in self._open:
            logits = self._append(torch.full_like(self._held, token))
        return logits

    def _append(self, tokens: Tensor) -> Tensor:
        self._keys.next_token()
        hidden = self._forward(tokens, self._position)
        self._position = self._position + 1
        return self._policy._logits(hidden)

    def _forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Last hidden states [T, D] of packed tokens [T]; their keys and values are kept."""
        output = self._policy.lm.base_model(
            input_ids=tokens[None],
            position_ids=position[None],
            # A mask of four dimensions is passed through unread.
            attention_mask=tokens.new_zeros(1, 1, 1, 1),
            use_cache=False,
            blocks=self._keys,
        )
        return output.last_hidden_state[0]

    def _keep(self, index: Tensor) -> None:
        self._keys.keep(index)
        self._position = self._position[index]


def plain_draw(
    logits: Tensor, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF at the sampling temperature.

    Args:
        logits: [R, V] float32.
        uniform: [R] float64 in [0, 1).

    Returns:
        token [R] int64; its log-probability and the distribution's entropy [R] float32, nats.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    cdf = probs.double().cumsum(dim=-1)
    # The first token whose cumulative mass is above u: never one of probability zero.
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(dim=-1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


def _decode(
    branches: Branches,
    uniforms: Tensor,
    thought_format: ThoughtFormat,
    prefill: Callable[[], AbstractContextManager],
) -> Thoughts:
    """Sample until every thought has ended, with the numbers [M, G, budget] to draw by."""
    group, budget = {"g": uniforms.shape[1]}, uniforms.shape[2]
    uniforms = rearrange(uniforms, "m g l -> (m g) l")
    tokens = torch.zeros_like(uniforms, dtype=torch.int64)
    mask = torch.zeros_like(uniforms, dtype=torch.bool)
    close = torch.tensor(thought_format.markers.close, device=uniforms.device)
    rows = torch.arange(len(uniforms), device=uniforms.device)

    with prefill():
        logits = branches.first()
    logprobs, entropies = logits.new_zeros(tokens.shape), logits.new_zeros(tokens.shape)
    for u in range(budget):
        token, logprob, entropy = plain_draw(logits, uniforms[rows, u], thought_format.temperature)
        tokens[rows, u], mask[rows, u] = token, True
        logprobs[rows, u], entropies[rows, u] = logprob, entropy

        going = ~_ends_with(tokens[rows, : u + 1], close)
        rows, token = rows[going], token[going]
        if u + 1 == budget or not len(rows):
            break
        logits = branches.next(rows, token)

    truncated = torch.zeros_like(mask[:, 0])
    truncated[rows] = True
    return Thoughts(
        *(
            rearrange(part[:, : u + 1], "(m g) l -> m g l", **group)
            for part in (tokens, mask, logprobs, entropies)
        ),
        rearrange(truncated, "(m g) -> m g", **group),
    )


def _ends_with(tokens: Tensor, close: Tensor) -> Tensor:
    """[R] bool, whether sampled tokens [R, L] end with the close marker."""
    if tokens.shape[1] < len(close):
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return (tokens[:, -len(close) :] == close).all(dim=1)


def _decode_work(prefixes: list[np.ndarray], thoughts: Thoughts) -> Work:
    """Each sampled token but a thought's last is run once, and attends to all before it."""
    prefix = np.array([len(row) for row in prefixes], dtype=np.int64)
    run = thoughts.mask.sum(dim=2).cpu().numpy() - 1
    return row_work(run, int(run.sum()), before=prefix[:, None])
