"""The sampler that a config asks for."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rlp.config import ConfigError, SamplingConfig
from rlp.model.policy import Policy
from rlp.sampling.graph import recorder_for
from rlp.sampling.native import NativeSampler
from rlp.sampling.sampler import Sampler


def open_sampler(
    sampling: SamplingConfig,
    policy: Policy,
    *,
    shared: bool,
    lend: Callable[[], AbstractContextManager] = nullcontext,
    agree: Callable[[int], int] = int,
    together: bool = False,
) -> Sampler:
    """The sampler of a config's section.

    Args:
        shared, lend, agree: of `NativeSampler`.
        together: whether a forward during sampling is a collective.

    Raises:
        ConfigError: it can not be had here.
    """
    if sampling.engine == "vllm":
        raise ConfigError(
            "sampling.engine: vllm is not here. Write sampling.engine=native, which runs every"
            " model that trains."
        )
    return NativeSampler(
        policy,
        slots=sampling.slots,
        shared=shared,
        recorder=recorder_for(sampling.graph, policy, shared=shared, together=together),
        lend=lend,
        agree=agree,
    )
