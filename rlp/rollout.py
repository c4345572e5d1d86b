"""G thoughts per position, sampled from the policy: each prefix computed once, its cache forked.

Each token is drawn by inverse CDF from one uniform number of a keyed counter-based generator, so
thoughts depend on (seed, step, document and its occurrence in the step, position, thought, token
index) and on nothing else: not on rank, order, micro-batches or resume. The whole distribution is
sampled: no top-p, no top-k.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens;  N = M * G
    R  rows decoded side by side;  T  prefix tokens, padded on the left;  V  vocabulary
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.attention import SharedKeys
from rlp.data import THOUGHT_NOISE, Document, Positions, keyed_noise
from rlp.faults import fault, poisoned
from rlp.layout import ThoughtFormat, Thoughts, Work, padded_places, row_work
from rlp.model import Policy


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What the sampling noise of a step is keyed by, beside document, position and thought."""

    seed: int
    step: int
    purpose: int = THOUGHT_NOISE

    def uniforms(self, document: Document, position: int, thought: int, length: int) -> np.ndarray:
        """[length] float64 in [0, 1), one per thought token."""
        noise = keyed_noise(seed=self.seed, purpose=self.purpose, step=self.step, document=document.id,
                            occurrence=document.occurrence, position=position, thought=thought)
        return noise.random(length)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Thoughts and what they cost."""

    thoughts: Thoughts
    prefill_work: Work
    decode_work: Work


def sample_thoughts(policy: Policy, documents: list[Document], positions: Positions, form: ThoughtFormat, noise: NoiseKey, *,
                    group_size: int, max_thought_tokens: int, rows: int, shared: bool = False, agree: Callable[[bool], bool] = bool,
                    prefill: Callable[[], AbstractContextManager] = nullcontext) -> Rollout:
    """Sample G thoughts at each position.

    Args:
        rows: thoughts decoded side by side; whole groups, at least one.
        shared: run each document once for all its positions and hold its keys once (`SharedKeys`), for models that
            run trees; else run each prefix once and fork its cache.
        agree: told "this rank still samples", answers "some rank does". Ranks that gather weights together
            during sampling must take the same number of decoding steps; alone, the answer is the question.
        prefill: makes what is entered while prefixes are run, to tell their time from that of decoding.
    """
    fault("rollout")
    uniforms = torch.from_numpy(np.stack([
        noise.uniforms(documents[d], int(t), g, max_thought_tokens)
        for d, t in zip(positions.document, positions.position) for g in range(group_size)]))
    size = max(1, rows // group_size)
    parts, work = [], Work()
    starts = iter(range(0, len(positions.position), size))
    while agree((start := next(starts, None)) is not None):
        # A rank without work keeps the others company, with its first positions.
        idle = start is None
        start = 0 if idle else start
        here = slice(start, start + size)
        some = Positions(positions.document[here], positions.position[here], positions.target[here])
        given = (policy, documents, some, form, group_size)
        branches = _SharedBranches(*given, max_thought_tokens) if shared else ForkedBranches(*given)
        numbers = uniforms[start * group_size : (start + size) * group_size].to(policy.device)
        part = _decode(branches, numbers, form, agree, prefill)
        if not idle:
            parts.append(part)
            work += branches.prefill_work
    tokens, mask, logprob, entropy, truncated = (_join(column) for column in zip(*parts))
    logprob = poisoned("rollout.logprob", logprob)
    group = {"g": group_size}
    thoughts = Thoughts(*(rearrange(part, "(m g) l -> m g l", **group) for part in (tokens, mask, logprob, entropy)),
                        rearrange(truncated, "(m g) -> m g", **group))
    prefixes = [form.prefix(documents[d].tokens, t) for d, t in zip(positions.document, positions.position)]
    return Rollout(thoughts, work, _decode_work(prefixes, thoughts))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
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
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(dim=-1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


class _Branches:
    """Thoughts that grow side by side from shared prefixes. Those that have ended are dropped when half have."""

    prefill_work: Work
    """Of the prefixes."""

    def __init__(self, policy: Policy, num_rows: int) -> None:
        self._policy = policy
        self._held = torch.arange(num_rows, device=policy.device)

    def sampling(self) -> AbstractContextManager:
        """As `Policy.sampling`."""
        return self._policy.sampling()

    def idle(self, logits: Tensor) -> Tensor:
        """A forward without use, in step with ranks that still sample; no row of the answer counts."""
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


class ForkedBranches(_Branches):
    """Each prefix run once and its cache copied for its thoughts: any causal LM, state-space states included."""

    def __init__(self, policy: Policy, documents: list[Document], positions: Positions, form: ThoughtFormat, group_size: int) -> None:
        prefixes = [form.prefix(documents[d].tokens, t) for d, t in zip(positions.document, positions.position)]
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


class _SharedBranches(_Branches):
    """Each document run once for all its positions, its keys held once: models that run trees."""

    def __init__(self, policy: Policy, documents: list[Document], positions: Positions, form: ThoughtFormat, group_size: int, max_thought_tokens: int) -> None:
        used = sorted({int(d) for d in positions.document})
        trunks = [form.context(documents[d].tokens, positions.last_of(d)) for d in used]
        lengths = np.array([len(trunk) for trunk in trunks])
        places, inside = padded_places(np.cumsum([0, *lengths[:-1]]), lengths)
        prefix = [len(form.context(documents[d].tokens, t)) for d, t in zip(positions.document, positions.position)]

        def on_device(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(policy.device)

        self._open = form.markers.open
        self._tokens, self._trunk_position = on_device(np.concatenate(trunks)), on_device(np.concatenate([np.arange(length) for length in lengths]))
        self._position = on_device(prefix).repeat_interleave(group_size)
        trunk_of = on_device([used.index(int(d)) for d in positions.document]).repeat_interleave(group_size)
        most = len(self._open) + max_thought_tokens - 1  # the last token of a thought is drawn and not run
        self._keys = SharedKeys(on_device(places), on_device(np.flatnonzero(inside)), trunk_of, self._position, most)
        opening = group_size * len(self._open)
        self.prefill_work = row_work(lengths, 0) + Work(tokens=opening * len(prefix), head_rows=opening * len(prefix),
                                                        pairs=opening * sum(prefix) + opening * (len(self._open) + 1) // 2 * len(prefix))
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


def _decode(branches: _Branches, uniforms: Tensor, form: ThoughtFormat, agree: Callable[[bool], bool],
            prefill: Callable[[], AbstractContextManager]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sample until every thought has ended: tokens, mask, log-probabilities, entropies [N, longest], and which the budget ended [N]."""
    num_rows, budget = uniforms.shape
    tokens = torch.zeros(num_rows, budget, dtype=torch.int64, device=uniforms.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    close = torch.tensor(form.markers.close, device=uniforms.device)
    rows = torch.arange(num_rows, device=uniforms.device)
    with branches.sampling():
        with prefill():
            logits = branches.first()
        logprobs, entropies = logits.new_zeros(tokens.shape), logits.new_zeros(tokens.shape)
        for u in range(budget):
            token, logprob, entropy = draw(logits, uniforms[rows, u], form.temperature)
            tokens[rows, u], mask[rows, u], logprobs[rows, u], entropies[rows, u] = token, True, logprob, entropy
            going = ~_ends_with(tokens[rows, : u + 1], close)
            rows, token = rows[going], token[going]
            if u + 1 == budget or not agree(len(rows) > 0):
                break
            logits = branches.next(rows, token) if len(rows) else branches.idle(logits)
    truncated = torch.zeros(num_rows, dtype=torch.bool, device=uniforms.device)
    truncated[rows] = True
    return *(part[:, : u + 1] for part in (tokens, mask, logprobs, entropies)), truncated


def _ends_with(tokens: Tensor, close: Tensor) -> Tensor:
    """[R] bool, whether sampled tokens [R, L] end with the close marker."""
    if tokens.shape[1] < len(close):
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return (tokens[:, -len(close):] == close).all(dim=1)


def _pad_left(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens, mask = np.zeros((len(rows), width), dtype=np.int64), np.zeros((len(rows), width), dtype=bool)
    for r, row in enumerate(rows):
        tokens[r, width - len(row):], mask[r, width - len(row):] = row, True
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    """Stack row blocks whose thoughts have different longest lengths."""
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _decode_work(prefixes: list[np.ndarray], thoughts: Thoughts) -> Work:
    """Each sampled token but a thought's last is run once, and attends to all before it."""
    prefix = np.array([len(row) for row in prefixes], dtype=np.int64)
    run = thoughts.mask.sum(dim=2).cpu().numpy() - 1
    pairs = run * prefix[:, None] + run * (run + 1) // 2
    return Work(tokens=int(run.sum()), pairs=int(pairs.sum()), head_rows=int(run.sum()))
