"""The sampler that a config asks for."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from rlp.config import Config, ConfigError, SamplingConfig
from rlp.model.admission import context_limit
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.graph import recorder_for
from rlp.sampling.native import NativeSampler
from rlp.sampling.sampler import Sampler
from rlp.sampling.vllm_engine import NATIVE, VllmEngine, refuse_version
from rlp.sampling.vllm_sampler import VllmSampler


def open_sampler(
    sampling: SamplingConfig,
    policy: Policy,
    *,
    shared: bool,
    lend: Callable[[], AbstractContextManager] = nullcontext,
    agree: Callable[[int], int] = int,
    together: bool = False,
    weights: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    apart: Callable[[], AbstractContextManager] = nullcontext,
    look: Callable[[], None] = lambda: None,
    longest: int | None = None,
) -> Sampler:
    """The sampler of a config's section.

    `auto` is native, on every machine: it runs every model that trains, needs nothing installed,
    computes log-probabilities with the trainer's own code, so that the ratio of eq. 8 is 1, and its
    thoughts are the same on another machine. vLLM is asked for by name.

    Args:
        shared, lend, agree: of `NativeSampler`.
        together: whether a forward during sampling is a collective.
        weights, apart, look: of `VllmSampler`; `apart` is its `lend`.
        longest: tokens of the longest prefix with its thought; None: as many as the model reads.

    Raises:
        ConfigError: it can not be had here.
    """
    if sampling.engine == "vllm":
        refuse_vllm(sampling, policy.markers)
        return VllmSampler(
            policy,
            start=lambda: VllmEngine(
                policy.lm,
                policy.head.dtype,
                policy.device,
                slots=sampling.slots,
                longest=longest or _context_tokens(policy),
                memory_frac=sampling.vllm_memory_frac,
            ),
            weights=weights,
            lend=apart,
            look=look,
        )
    return NativeSampler(
        policy,
        slots=sampling.slots,
        shared=shared,
        recorder=recorder_for(sampling.graph, policy, shared=shared, together=together),
        lend=lend,
        agree=agree,
    )


def refuse_vllm(sampling: SamplingConfig, markers: Markers) -> None:
    """Refuse vLLM where it is asked for and can not be had; it is not imported for that.

    Raises:
        ConfigError: it is missing or another version, or a thought would not end at one token.
    """
    if sampling.engine != "vllm":
        return
    refuse_version()
    if len(markers.close) != 1:
        raise ConfigError(
            "sampling.engine: vllm ends a thought at one token, and thought.close_marker has"
            f" {len(markers.close)} here. Write thought.add_markers=true, which makes it one,"
            f" {NATIVE}."
        )


def longest_row(config: Config, thought_format: ThoughtFormat) -> int:
    """Tokens of the longest prefix with its thought, with or without an instruction."""
    opening = len(thought_format.instruction) + len(thought_format.markers.open)
    return opening + config.data.max_document_tokens + config.thought.max_thought_tokens


def _context_tokens(policy: Policy) -> int:
    """The longest row that a model reads."""
    limit = context_limit(policy.lm.config)
    if limit is None:
        raise ConfigError(
            "sampling.engine: vllm needs to know the longest row, and this model names no limit."
            " Write sampling.engine=native."
        )
    return limit.tokens
