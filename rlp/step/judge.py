"""The judge: the rewards of a step, each computed once, and handed to eq. 7.

Dimensions
    M  positions;  G  thoughts per position
"""

from torch import Tensor

from rlp.step.micro_batch import MicroBatch
from rlp.step.parts import StepParts


class Judge:
    """Gives each thought its own reward. Placebos give it another (`rlp.compare.placebos`)."""

    def begin(self, run: StepParts, step: int, batches: list[MicroBatch]) -> None:
        """The thoughts of a step are there, and none is rewarded yet."""
        self._run, self._batches = run, batches
        self._rewards: list[Tensor | None] = [None] * len(batches)

    def ahead(self, index: int) -> Tensor | None:
        """[M, G] rewards of a micro-batch, where they are known before the pass with gradient:
        after the first update with the same thoughts, and where a group goes through the model in
        slices, for each thought is compared with all its siblings."""
        batch = self._batches[index]
        if self._rewards[index] is None and self._is_sliced(batch):
            self._rewards[index] = self._run.rewards_ahead(batch)
        return self._rewards[index]

    def fed(self, index: int, reward: Tensor) -> Tensor:
        """[M, G] what eq. 7 is fed.

        Args:
            reward: what the thoughts of the micro-batch have earned.
        """
        self._rewards[index] = reward
        return reward

    def _is_sliced(self, batch: MicroBatch) -> bool:
        return len(batch.slices(self._run.config.optim.thoughts_per_forward)) > 1
