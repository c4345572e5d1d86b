"""Rewards: what a thought is worth, from evidence about it.

A reward is a callable of one `Evidence` that returns [M, G]. The built-in ones are its first users;
one of your own is named by `reward.kind: package.module:name`, and may be a function or a class.
Only differences within a group reach the gradient (eq. 7): what is the same for all thoughts of a
position changes nothing but what is logged.

Dimensions
    M  positions;  G  thoughts per position;  H  target tokens
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.thoughts import Predictions, Thoughts
from rlp.objective import (
    exact_match,
    greedy_match,
    information_gain,
    prefix_match,
    with_language,
)
from rlp.process.outside import Part, open_part
from rlp.step.results import require_tensor

STATISTICS = ("baseline_logprob", "matched", "prediction")
"""What a reward may need: fields of `Evidence`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about the thoughts of some positions, in whole groups; nothing in it carries a
    gradient."""

    reasoned_logprob: Tensor
    """[M, G] float32, nats: S_pred, mean log-probability of the targets after each thought (eq. 3);
    where predictions are made, of the first target, and so in all that follows."""
    baseline_logprob: Tensor | None
    """[M] float32, nats: S_ema, the same without a thought, under the baseline (eq. 4). None on a
    step that does not score it, which is no step of a reward that needs it."""
    matched: Tensor | None
    """[M, G] bool: whether every target is the most probable token after the thought. None unless
    the reward needs it."""
    documents: list[Document]
    """The documents of the positions."""
    positions: Positions
    """[M] which document, which index, which targets."""
    thoughts: Thoughts
    """[M, G, L] token ids, mask, whether the budget ended them."""
    prediction: Predictions | None = None
    """[M, G, H] what the policy said would come, after each thought. None unless the reward needs
    it: then it is sampled, and trained as the thought is."""
    script_share: Tensor | None = None
    """[M, G] float32, from 0 to 1: letters of each thought that are of `reward.script`. None where
    `reward.language_weight` is 0."""


class Reward(Protocol):
    """Rewards thoughts.

    `needs` names what it reads of `Evidence` beyond what is always there, out of `STATISTICS`.
    """

    needs: tuple[str, ...] = ()

    def __call__(self, evidence: Evidence) -> Tensor:
        """[M, G], finite, in nats or in a unit of its own."""


class InformationGain:
    """How much a thought raised the log-probability of what came next (eq. 5).

    Where the baseline is not scored it is S_pred alone: what is missing cancels in eq. 7.
    """

    needs: tuple[str, ...] = ()
    relative_to_baseline = True
    """Without a baseline its values say nothing by themselves, and only their spread is logged."""

    def __call__(self, evidence: Evidence) -> Tensor:
        if evidence.baseline_logprob is None:
            return evidence.reasoned_logprob
        return information_gain(evidence.reasoned_logprob, evidence.baseline_logprob)


class GreedyMatch:
    """1 where the most probable continuation is the real one, else 0."""

    needs = ("matched",)

    def __call__(self, evidence: Evidence) -> Tensor:
        return greedy_match(evidence.matched)


class PrefixMatch:
    """1 where the prediction after the thought is how the document goes on, else 0: reinforcement
    pre-training (RPT, arXiv 2506.08007)."""

    needs = ("prediction",)

    def __call__(self, evidence: Evidence) -> Tensor:
        said, device = evidence.prediction, evidence.reasoned_logprob.device
        target = torch.from_numpy(evidence.positions.target).to(device)
        return prefix_match(said.tokens, said.mask, said.ended, target)


class ExactMatch:
    """1 where the prediction after the thought is the whole target, else 0: reinforcement from
    verifiable answers (RLVR), without a format to keep."""

    needs = ("prediction",)

    def __call__(self, evidence: Evidence) -> Tensor:
        said, device = evidence.prediction, evidence.reasoned_logprob.device
        target = torch.from_numpy(evidence.positions.target).to(device)
        return exact_match(said.tokens, said.mask, target)


REWARDS = {
    "information_gain": InformationGain,
    "greedy_match": GreedyMatch,
    "prefix_match": PrefixMatch,
    "exact_match": ExactMatch,
}
"""By `reward.kind`."""


def open_reward(name: str, given: Reward | None = None) -> Part:
    """The reward that a config names (`open_part`)."""
    return open_part("reward.kind", name, REWARDS, STATISTICS, given)


def is_measured(reward: Part, evidence: Evidence) -> bool:
    """Whether the values of a reward mean something by themselves, and not only their spread."""
    relative = getattr(reward.call, "relative_to_baseline", False)
    return evidence.baseline_logprob is not None or not relative


def rewards_of(reward: Part, evidence: Evidence, language_weight: float = 0.0) -> Tensor:
    """[M, G] float32 rewards of whole groups, eq. 5 or another, and what is paid for the script of
    a thought, whatever the reward.

    Raises:
        PartError: a reward from outside gave another shape, or a value that is not finite.
    """
    values = reward(evidence)
    if reward.is_outside:
        shape = list(evidence.reasoned_logprob.shape)
        values = require_tensor(reward, values, shape, "[M, G]").to(evidence.reasoned_logprob)
    if language_weight == 0:
        return values
    return with_language(values, evidence.script_share, language_weight)
