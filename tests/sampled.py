"""Thoughts of a policy in one phase of the native sampler."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.native import NativeSampler
from rlp.sampling.rollout import NoiseKey, Rollout


def sample_thoughts(
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    thought_format: ThoughtFormat,
    noise: NoiseKey,
    *,
    group_size: int,
    max_thought_tokens: int,
    slots: int,
    shared: bool = False,
    agree: Callable[[int], int] = int,
    prefill: Callable[[], AbstractContextManager] = nullcontext,
) -> Rollout:
    """As `Sampler.sample`, by a `NativeSampler` made for it."""
    sampler = NativeSampler(policy, slots=slots, shared=shared, agree=agree)
    with sampler.phase():
        return sampler.sample(
            documents,
            positions,
            thought_format,
            noise,
            group_size=group_size,
            max_thought_tokens=max_thought_tokens,
            prefill=prefill,
        )
