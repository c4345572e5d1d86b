"""Baselines: the no-think prediction that the information gain is measured against (eq. 4).

A baseline is a callable of one `NoThink` that returns [M], one number for all thoughts of a
position, so it never reaches the gradient of eq. 7: it changes what is reported. The built-in ones
are its first users; one of your own is named by `baseline.kind: package.module:name`.

Dimensions
    M  positions
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.process.outside import Part, open_part
from rlp.step.results import require_tensor

STATISTICS = ("ema_logprob", "start_logprob", "policy_logprob")
"""What a baseline may need: fields of `NoThink`. Each is a forward pass of the documents."""

NETWORKS = {"ema_logprob": "ema", "start_logprob": "start"}
"""Copies of the policy that a statistic is scored by; the policy itself is always there."""


@dataclass(frozen=True, slots=True)
class NoThink:
    """The targets of some positions, predicted without a thought: mean log-probability over the H
    target tokens, in nats, float32, open marker excluded. None where the baseline does not need it.
    """

    documents: list[Document]
    positions: Positions
    """[M]."""
    ema_logprob: Tensor | None = None
    """[M], under the EMA of the policy."""
    start_logprob: Tensor | None = None
    """[M], under the starting checkpoint."""
    policy_logprob: Tensor | None = None
    """[M], under the policy."""


class Baseline(Protocol):
    """Predicts without thinking.

    `needs` names what it reads of `NoThink`, out of `STATISTICS`.
    """

    needs: tuple[str, ...] = ()

    def __call__(self, no_think: NoThink) -> Tensor:
        """[M], finite, nats per target token."""


class Ema:
    """S_ema of the paper: the EMA of the policy."""

    needs = ("ema_logprob",)

    def __call__(self, no_think: NoThink) -> Tensor:
        return no_think.ema_logprob


class Frozen:
    """The starting checkpoint."""

    needs = ("start_logprob",)

    def __call__(self, no_think: NoThink) -> Tensor:
        return no_think.start_logprob


class Itself:
    """The policy, without a thought."""

    needs = ("policy_logprob",)

    def __call__(self, no_think: NoThink) -> Tensor:
        return no_think.policy_logprob


class Nothing:
    """0: the gain is S_pred."""

    needs: tuple[str, ...] = ()

    def __call__(self, no_think: NoThink) -> Tensor:
        return torch.zeros(len(no_think.positions.position))


BASELINES = {"ema": Ema, "frozen": Frozen, "self": Itself, "none": Nothing}
"""By `baseline.kind`."""


def open_baseline(name: str, given: Baseline | None = None) -> Part:
    """The baseline that a config names (`open_part`)."""
    return open_part("baseline.kind", name, BASELINES, STATISTICS, given)


def baseline_of(baseline: Part, no_think: NoThink, device: torch.device) -> Tensor:
    """[M] float32 log-evidence without a thought.

    Raises:
        PartError: a baseline from outside gave another shape, or a value that is not finite.
    """
    values = baseline(no_think)
    if baseline.is_outside:
        count = len(no_think.positions.position)
        values = require_tensor(baseline, values, [count], "[M]")
    return values.to(device)
