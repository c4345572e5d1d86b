"""Placebos: rewards that say nothing about the thoughts they are given to, and thoughts that say
nothing about the position they are given to (`reward.placebo`).

Each position of a step gets what the position before it has, and the first what the last has, in
the order of the documents over all ranks: micro-batches and ranks change nothing.

    foreign_thought    the position before gives its thoughts, which are scored in place of its own
    shuffled_reward    it gives its rewards, which are known by then; only those of the last
                       position are scored ahead, and where documents are put together by their
                       lengths, all
    other_thought      it gives its thoughts, which are rewarded and trained in place of its own

The first two train a position's own thoughts by another's reward; the last trains another's
thoughts by their own reward, in which there is nothing of the position. They go around any reward.

Dimensions
    M  positions;  G  thoughts per position;  N  thoughts of a pass;  L  thought tokens
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlp.config import ConfigError
from rlp.measure.thought_statistics import thought_lengths
from rlp.model.thoughts import Thoughts
from rlp.step.judge import Judge
from rlp.step.micro_batch import MicroBatch, in_order
from rlp.step.parts import StepParts


class ShuffledReward(Judge):
    """Each position's thoughts get the rewards of the position before it."""

    def _look_ahead(
        self, run: StepParts, step: int, whole: MicroBatch, batches: list[MicroBatch]
    ) -> None:
        refuse_single_position(run, step, whole)
        # Put together by their lengths, documents are not met in their order: what the position
        # before has earned is known only if all is scored ahead.
        by_length = run.cut.by_length
        self._score(run, batches, [by_length or ahead for ahead in run.cut.ahead(batches)])
        last = in_order(batches, self._rewards)[-1:] if by_length else None
        if last is None:
            last = run.rewards_ahead(whole.last_position())
        before = run.ranks.gather(last.cpu())[run.ranks.rank - 1].to(last)
        unknown = last.new_zeros(len(whole.positions.position), last.shape[1])
        self._batches, self._known = batches, torch.cat([before, unknown])
        for batch, reward in zip(batches, self._rewards):
            if reward is not None:
                self._known[batch.rows + 1] = reward

    def fed(self, index: int, reward: Tensor) -> Tensor:
        super().fed(index, reward)
        rows = self._batches[index].rows
        self._known[rows + 1] = reward
        return self._known[rows]


class ForeignThought(Judge):
    """Each thought is rewarded for a thought of the position before, in its own place."""

    def _look_ahead(
        self, run: StepParts, step: int, whole: MicroBatch, batches: list[MicroBatch]
    ) -> None:
        refuse_single_position(run, step, whole)
        before = run.ranks.gather(whole.on_host()[-1:])[run.ranks.rank - 1]
        foreign = whole.on_host().exchanged(before)
        exchanged = run.cut.update(
            replace(whole, thoughts=foreign.to(run.ranks.device), host=foreign)
        )
        rewards = []
        for batch in exchanged:
            run.pulse.between_passes(run.engine.forward_is_collective)
            rewards.append(run.rewards_ahead(batch))
        reward = in_order(exchanged, rewards)
        self._rewards = [reward[batch.rows] for batch in batches]


class OtherThought(Judge):
    """Each position thinks with the words of the position before it, and is rewarded and trained as
    if they were its own.

    They are written over its own words, so that every thought keeps its length and the way it ended
    (`overwritten`), and a step costs what it costs without the placebo. The behavior
    log-probability of a token is what the first pass with gradient gives it in this place, so that
    every ratio is 1 there.
    """

    def given(self, run: StepParts, step: int, whole: MicroBatch) -> MicroBatch:
        refuse_single_position(run, step, whole)
        self._behavior: dict[tuple[int, int], Tensor] = {}
        own, num_close = whole.on_host(), len(run.setup.markers.close)
        before = run.ranks.gather(own[-1:])[run.ranks.rank - 1]
        thoughts = overwritten(own, own.exchanged(before), num_close)
        return replace(whole, thoughts=thoughts.to(run.ranks.device), host=thoughts)

    def behavior(self, index: int, part: MicroBatch, logprob: Tensor) -> Tensor:
        first = part.group.start if part.group else 0
        return self._behavior.setdefault((index, first), logprob.detach())


def overwritten(own: Thoughts, other: Thoughts, num_close: int) -> Thoughts:
    """Thoughts with the words of others in the place of their own.

    A thought takes as many words as it has, its close marker apart: those of the other thought of
    its number, then of the next ones of that group, round and round. A group that has said nothing
    at all is put there as it is.

    Args:
        own, other: [M, G, L] in the memory of the host, of any length L each.
        num_close: tokens of the close marker.

    Returns:
        [M, G, L]; what the sampler knew about them is not known here: log-probabilities are NaN.
    """
    own = own.padded(max(0, other.tokens.shape[2] - own.tokens.shape[2]))
    other = other.padded(own.tokens.shape[2] - other.tokens.shape[2])
    lengths, others = (thought_lengths(thoughts, num_close).numpy() for thoughts in (own, other))
    silent = others.sum(axis=1) == 0
    there = torch.from_numpy(silent)
    mask = torch.where(there[:, None, None], other.mask, own.mask)
    tokens = torch.where(there[:, None, None], other.tokens, own.tokens)

    for m in np.flatnonzero(~silent).tolist():
        said = [row[:length] for row, length in zip(other.tokens[m].numpy(), others[m])]
        for g, length in enumerate(lengths[m].tolist()):
            words = np.resize(np.concatenate(said[g:] + said[:g]), length)
            tokens[m, g, :length] = torch.from_numpy(words)
    return Thoughts(
        tokens=tokens,
        mask=mask,
        behavior_logprob=torch.full_like(own.behavior_logprob, torch.nan),
        entropy=None,
        truncated=torch.where(there[:, None], other.truncated, own.truncated),
    )


PLACEBOS = {
    "none": Judge,
    "shuffled_reward": ShuffledReward,
    "foreign_thought": ForeignThought,
    "other_thought": OtherThought,
}
"""Judges by `reward.placebo`."""


def refuse_single_position(run: StepParts, step: int, whole: MicroBatch) -> None:
    """Refuse a step without two positions to exchange. A collective."""
    here = len(whole.positions.position)
    if sum(run.ranks.gather(here)) < 2:
        raise ConfigError(
            f"reward.placebo: {run.config.reward.placebo} exchanges the positions of a step, and"
            f" step {step} has a single one. Write an optim.batch_size of 2 or more."
        )
