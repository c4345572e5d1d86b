"""Placebos: rewards that say nothing about the thoughts they are given to (`reward.placebo`).

Each position of a step gets what the position before it has, and the first what the last has, in
the order of the documents over all ranks: micro-batches and ranks change nothing.

    foreign_thought    the position before gives its thoughts, which are scored in place of its own
    shuffled_reward    it gives its rewards, which are known by then; only those of the last
                       position are scored ahead

They go around any reward.

Dimensions
    M  positions;  G  thoughts per position
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlp.config import ConfigError
from rlp.model.thoughts import Thoughts
from rlp.step.judge import Judge
from rlp.step.micro_batch import MicroBatch
from rlp.step.parts import StepParts


class ShuffledReward(Judge):
    """Each position's thoughts get the rewards of the position before it."""

    def begin(self, run: StepParts, step: int, batches: list[MicroBatch]) -> None:
        super().begin(run, step, batches)
        refuse_single_position(run, step, batches)
        reward = run.rewards_ahead(batches[-1].last_position())
        before = run.ranks.gather(reward.cpu())[run.ranks.rank - 1].to(run.ranks.device)
        self._before = [before, *[None] * (len(batches) - 1)]

    def fed(self, index: int, reward: Tensor) -> Tensor:
        super().fed(index, reward)
        if index + 1 < len(self._before):
            self._before[index + 1] = reward[-1:]
        return torch.cat([self._before[index], reward[:-1]])


class ForeignThought(Judge):
    """Each thought is rewarded for a thought of the position before, in its own place."""

    def begin(self, run: StepParts, step: int, batches: list[MicroBatch]) -> None:
        super().begin(run, step, batches)
        refuse_single_position(run, step, batches)
        before = run.ranks.gather(batches[-1].thoughts[-1:].to("cpu"))[run.ranks.rank - 1]
        before = before.to(run.ranks.device)
        for index, batch in enumerate(batches):
            run.pulse.safe_point()
            foreign: Thoughts = batch.thoughts.exchanged(before)
            self._rewards[index] = run.rewards_ahead(replace(batch, thoughts=foreign))
            before = batch.thoughts[-1:]


PLACEBOS = {"none": Judge, "shuffled_reward": ShuffledReward, "foreign_thought": ForeignThought}
"""Judges by `reward.placebo`."""


def refuse_single_position(run: StepParts, step: int, batches: list[MicroBatch]) -> None:
    """Refuse a step without two positions to exchange. A collective."""
    here = sum(len(batch.positions.position) for batch in batches)
    if sum(run.ranks.gather(here)) < 2:
        raise ConfigError(
            f"reward.placebo: {run.config.reward.placebo} exchanges the positions of a step, and"
            f" step {step} has a single one. Write an optim.batch_size of 2 or more."
        )
