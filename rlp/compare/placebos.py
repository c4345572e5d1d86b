"""Placebos: rewards that say nothing about the thoughts they are given to (`reward.placebo`).

Each position of a step gets what the position before it has, and the first what the last has, in
the order of the documents over all ranks: micro-batches and ranks change nothing.

    foreign_thought    the position before gives its thoughts, which are scored in place of its own
    shuffled_reward    it gives its rewards, which are known by then; only those of the last
                       position are scored ahead, and where documents are put together by their
                       lengths, all

They go around any reward.

Dimensions
    M  positions;  G  thoughts per position
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlp.config import ConfigError
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


PLACEBOS = {"none": Judge, "shuffled_reward": ShuffledReward, "foreign_thought": ForeignThought}
"""Judges by `reward.placebo`."""


def refuse_single_position(run: StepParts, step: int, whole: MicroBatch) -> None:
    """Refuse a step without two positions to exchange. A collective."""
    here = len(whole.positions.position)
    if sum(run.ranks.gather(here)) < 2:
        raise ConfigError(
            f"reward.placebo: {run.config.reward.placebo} exchanges the positions of a step, and"
            f" step {step} has a single one. Write an optim.batch_size of 2 or more."
        )
