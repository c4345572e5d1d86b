"""G thoughts per position, sampled from the policy.

Each token is drawn by inverse CDF from one uniform number of a keyed counter-based generator, so
thoughts depend on (seed, step, document and its occurrence in the step, position, thought, token
index) and on nothing else: not on rank, order, micro-batches or resume. The whole distribution is
sampled: no top-p, no top-k. How a model holds what it has read is not known here (`branches`), nor
what a thought is for.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens
    R  rows decoded side by side;  V  vocabulary
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.noise import THOUGHT_NOISE, keyed_noise
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.faults import fault, poisoned
from rlp.sampling.branches import Branches, ForkedBranches, SharedBranches


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What the sampling noise of a step is keyed by, beside document, position and thought."""

    seed: int
    step: int
    purpose: int = THOUGHT_NOISE

    def uniforms(self, document: Document, position: int, thought: int, length: int) -> np.ndarray:
        """[length] float64 in [0, 1), one per thought token."""
        noise = keyed_noise(
            seed=self.seed,
            purpose=self.purpose,
            step=self.step,
            document=document.id,
            occurrence=document.occurrence,
            position=position,
            thought=thought,
        )
        return noise.random(length)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Thoughts and what they cost."""

    thoughts: Thoughts
    prefill_work: Work
    decode_work: Work


def sample_thoughts(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thought_format: ThoughtFormat,
    noise: NoiseKey,
    *,
    group_size: int,
    max_thought_tokens: int,
    rows: int,
    shared: bool = False,
    agree: Callable[[bool], bool] = bool,
    prefill: Callable[[], AbstractContextManager] = nullcontext,
) -> Rollout:
    """Sample G thoughts at each position.

    Args:
        rows: thoughts decoded side by side; whole groups, at least one.
        shared: run each document once for all its positions and hold its keys once
            (`SharedBranches`), for models that run trees; else run each prefix once and fork its
            cache (`ForkedBranches`).
        agree: told "this rank still samples", answers "some rank does". Ranks that gather weights
            together during sampling must take the same number of decoding steps; alone, the answer
            is the question.
        prefill: makes what is entered while prefixes are run, to tell their time from that of
            decoding.
    """
    fault("rollout")
    size = max(1, rows // group_size)
    parts, prefill_work = [], Work()
    starts = iter(range(0, len(positions.position), size))
    while agree((start := next(starts, None)) is not None):
        # A rank without work keeps the others company, with its first positions.
        some = positions[:size] if start is None else positions[start : start + size]

        given = (policy, documents, some, thought_format, group_size)
        branches = SharedBranches(*given, max_thought_tokens) if shared else ForkedBranches(*given)
        uniforms = [
            [noise.uniforms(documents[d], t, g, max_thought_tokens) for g in range(group_size)]
            for d, t in some.places()
        ]
        numbers = torch.from_numpy(np.array(uniforms)).to(policy.device)
        part = _decode(branches, numbers, thought_format, agree, prefill)
        if start is not None:
            parts.append(part)
            prefill_work += branches.prefill_work

    thoughts = Thoughts.joined(parts)
    logprob = poisoned("rollout.logprob", thoughts.behavior_logprob)
    thoughts = replace(thoughts, behavior_logprob=logprob)
    prefixes = [thought_format.prefix(documents[d].tokens, t) for d, t in positions.places()]
    return Rollout(thoughts, prefill_work, _decode_work(prefixes, thoughts))


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
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(dim=-1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy


def _decode(
    branches: Branches,
    uniforms: Tensor,
    thought_format: ThoughtFormat,
    agree: Callable[[bool], bool],
    prefill: Callable[[], AbstractContextManager],
) -> Thoughts:
    """Sample until every thought has ended, with the numbers [M, G, budget] to draw by."""
    group, budget = {"g": uniforms.shape[1]}, uniforms.shape[2]
    uniforms = rearrange(uniforms, "m g l -> (m g) l")
    tokens = torch.zeros_like(uniforms, dtype=torch.int64)
    mask = torch.zeros_like(uniforms, dtype=torch.bool)
    close = torch.tensor(thought_format.markers.close, device=uniforms.device)
    rows = torch.arange(len(uniforms), device=uniforms.device)

    with branches.sampling():
        with prefill():
            logits = branches.first()
        logprobs, entropies = logits.new_zeros(tokens.shape), logits.new_zeros(tokens.shape)
        for u in range(budget):
            token, logprob, entropy = draw(logits, uniforms[rows, u], thought_format.temperature)
            tokens[rows, u], mask[rows, u] = token, True
            logprobs[rows, u], entropies[rows, u] = logprob, entropy

            going = ~_ends_with(tokens[rows, : u + 1], close)
            rows, token = rows[going], token[going]
            if u + 1 == budget or not agree(len(rows) > 0):
                break
            logits = branches.next(rows, token) if len(rows) else branches.idle(logits)

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
