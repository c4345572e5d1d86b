"""The block loop, for models whose caches are forked: R rows of thoughts side by side, until the
longest has ended.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens;  R  rows decoded side by side
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.shapes import Work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.faults import poisoned
from rlp.sampling.branches import Branches, ForkedBranches
from rlp.sampling.draw import draw
from rlp.sampling.rollout import NoiseKey, Rollout, decode_work


def sample_in_blocks(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thought_format: ThoughtFormat,
    noise: NoiseKey,
    *,
    group_size: int,
    max_thought_tokens: int,
    rows: int,
    told: Callable[[int], int],
    beat: Callable[[], None],
    prefill: Callable[[], AbstractContextManager],
) -> Rollout:
    """As `Sampler.sample`."""

    def agree(claim: bool) -> bool:
        beat()
        return bool(told(int(claim)))

    size = max(1, rows // group_size)
    parts, prefill_work = [], Work()
    starts = iter(range(0, len(positions.position), size))
    while agree((start := next(starts, None)) is not None):
        # A rank without work keeps the others company, with its first positions.
        some = positions[:size] if start is None else positions[start : start + size]

        branches = ForkedBranches(policy, documents, some, thought_format, group_size)
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
    return Rollout(thoughts, prefill_work, decode_work(prefixes, thoughts))


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
