"""A step of sampling as one CUDA graph: recorded once, then replayed.

An eager step launches some 60 kernels a layer, which takes the host longer than the device needs to
run them; a replay is one launch. A graph reads and writes the addresses that it was recorded with,
so it is dropped with the phase: weights that are gathered anew for the next one stand elsewhere.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from rlp.config import ConfigError
from rlp.model.policy import Policy

WARM_UP = 2
"""Steps that are run as they are before one is recorded: libraries make their workspaces, and what
is built at its first use is there."""


class Recorder(Protocol):
    """Records what a function does to tensors that exist before, and does it again."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run it as it will be recorded."""

    def record(self, function: Callable[[], None]) -> None:
        """Note what it does, without doing it."""

    def replay(self) -> None:
        """Do it."""


class CudaRecorder:
    """A CUDA graph on the current device."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], None]) -> None:
        """On another stream, as capture needs it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> None:
        """Capture it; nothing is run."""
        with torch.cuda.graph(self._graph, stream=self._stream):
            function()

    def replay(self) -> None:
        """One launch, on the current stream."""
        self._graph.replay()


class Recorded:
    """A step without arguments: run a few times, then recorded, then replayed."""

    def __init__(self, step: Callable[[], None], recorder: Recorder) -> None:
        self._step, self._recorder, self._num_run = step, recorder, 0

    def __call__(self) -> None:
        """Do the step."""
        if self._num_run < WARM_UP:
            self._recorder.warm_up(self._step)
        else:
            if self._num_run == WARM_UP:
                self._recorder.record(self._step)
            self._recorder.replay()
        self._num_run += 1


SCALED_POSITIONS = {"dynamic", "longrope"}
"""Rotary embeddings whose scale follows from the longest position, which is read on the host."""


def recorder_for(
    choice: str, policy: Policy, *, shared: bool, together: bool
) -> Callable[[], Recorder] | None:
    """What makes a recorder of steps; None where steps are run as they are.

    Args:
        choice: `sampling.graph`.
        shared: whether thoughts share the keys of their documents.
        together: whether a forward during sampling is a collective.

    Raises:
        ConfigError: on is asked for where it can not be.
    """
    device = policy.device.type
    why_not = {
        f"the device is {device}": device != "cuda",
        "thoughts of this model do not share the keys of their documents": not shared,
        "with engine.generation=synced each forward gathers weights": together,
        "this model reads its longest position on the host": bool(
            _position_kinds(policy) & SCALED_POSITIONS
        ),
    }
    found = [reason for reason, holds in why_not.items() if holds]
    if choice == "on" and found:
        raise ConfigError(
            f"sampling.graph: on, but a step of sampling can not be recorded: {'; '.join(found)}."
            " Write sampling.graph=auto, which records where it can."
        )
    return None if choice == "off" or found else CudaRecorder


def _position_kinds(policy: Policy) -> set[str]:
    """How rotary embeddings scale positions, in any layer."""
    kinds = [getattr(module, "rope_type", None) for module in policy.lm.modules()]
    of_layers = [kind.values() if isinstance(kind, dict) else [kind] for kind in kinds]
    return {kind for some in of_layers for kind in some if kind is not None}
