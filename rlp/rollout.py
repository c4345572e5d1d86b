"""G thoughts per position, sampled from the policy: each prefix computed once, its cache forked.

Each token is drawn by inverse CDF from one uniform number of a keyed counter-based generator, so
thoughts depend on (seed, step, document, position, thought, token index) and on nothing else: not on
rank, order, micro-batches or resume. The whole distribution is sampled: no top-p, no top-k.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens;  N = M * G
    R  rows decoded side by side;  T  prefix tokens, padded on the left;  V  vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.data import THOUGHT_NOISE, Document, Positions, keyed_noise
from rlp.layout import ThoughtFormat, Thoughts, Work
from rlp.model import Policy


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What the sampling noise of a step is keyed by, beside document, position and thought."""

    seed: int
    step: int
    purpose: int = THOUGHT_NOISE

    def uniforms(self, document: int, position: int, thought: int, length: int) -> np.ndarray:
        """[length] float64 in [0, 1), one per thought token."""
        return keyed_noise(seed=self.seed, purpose=self.purpose, step=self.step, document=document, position=position, thought=thought).random(length)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Thoughts and what they cost."""

    thoughts: Thoughts
    prefill_work: Work
    decode_work: Work


def sample_thoughts(policy: Policy, documents: list[Document], positions: Positions, form: ThoughtFormat, noise: NoiseKey, *,
                    group_size: int, max_thought_tokens: int, rows: int, agree: Callable[[bool], bool] = bool) -> Rollout:
    """Sample G thoughts at each position.

    Args:
        rows: thoughts decoded side by side; whole groups, at least one.
        agree: told "this rank still samples", answers "some rank does". Ranks that gather weights together
            during sampling must take the same number of decoding steps; alone, the answer is the question.
    """
    prefixes = [form.prefix(documents[d].tokens, t) for d, t in zip(positions.document, positions.position)]
    uniforms = torch.from_numpy(np.stack([
        noise.uniforms(documents[d].id, int(t), g, max_thought_tokens)
        for d, t in zip(positions.document, positions.position) for g in range(group_size)]))
    size = max(1, rows // group_size)
    parts = []
    starts = iter(range(0, len(prefixes), size))
    while agree((start := next(starts, None)) is not None):
        # A rank without work keeps the others company, with its first prefix.
        idle = start is None
        start = 0 if idle else start
        part = _decode(policy, prefixes[start : start + size], uniforms[start * group_size : (start + size) * group_size].to(policy.device),
                       form, group_size, agree)
        if not idle:
            parts.append(part)
    tokens, mask, logprob, entropy, truncated = (_join(column) for column in zip(*parts))
    group = {"g": group_size}
    thoughts = Thoughts(*(rearrange(part, "(m g) l -> m g l", **group) for part in (tokens, mask, logprob, entropy)),
                        rearrange(truncated, "(m g) -> m g", **group))
    return Rollout(thoughts, *_work(prefixes, thoughts))


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


def _decode(policy: Policy, prefixes: list[np.ndarray], uniforms: Tensor, form: ThoughtFormat, group_size: int,
            agree: Callable[[bool], bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Prefill these prefixes, fork each cache G times, and decode until every thought has ended."""
    device, budget = policy.device, uniforms.shape[1]
    tokens, mask = _pad_left(prefixes, device)
    fork = torch.arange(len(prefixes), device=device).repeat_interleave(group_size)
    length = mask.sum(dim=1)[fork]
    close = torch.tensor(form.markers.close, device=device)
    num_rows = len(fork)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    columns = []
    with policy.sampling():
        logits, cache = policy.prefill(tokens, mask)
        policy.fork(cache, fork)
        logits, mask = logits[fork], mask[fork]
        for u in range(budget):
            token, logprob, entropy = draw(logits, uniforms[:, u], form.temperature)
            columns.append((token * alive, alive, logprob * alive, entropy * alive))
            alive = alive & ~_ends_with(columns, close)
            if u + 1 == budget or not agree(bool(alive.any())):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = policy.decode(token, mask, length + u, cache)
    return *(torch.stack(column, dim=1) for column in zip(*columns)), alive


def _ends_with(columns: list[tuple[Tensor, ...]], close: Tensor) -> Tensor:
    """[R] bool, whether the last sampled tokens of a row spell the close marker."""
    if len(columns) < len(close):
        return torch.zeros_like(columns[-1][1])
    tail = torch.stack([token for token, *_ in columns[-len(close):]], dim=1)
    sampled = columns[-1][1]
    return sampled & (tail == close).all(dim=1)


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


def _work(prefixes: list[np.ndarray], thoughts: Thoughts) -> tuple[Work, Work]:
    """(prefill, decode): each prefix once; each sampled token but a thought's last is run once, and attends to all before it."""
    prefix = np.array([len(row) for row in prefixes], dtype=np.int64)
    run = thoughts.mask.sum(dim=2).cpu().numpy() - 1
    pairs = run * prefix[:, None] + run * (run + 1) // 2
    prefill = Work(tokens=int(prefix.sum()), pairs=int((prefix * (prefix + 1) // 2).sum()), head_rows=len(prefix))
    return prefill, Work(tokens=int(run.sum()), pairs=int(pairs.sum()), head_rows=int(run.sum()))
