"""The judge: which thoughts stand at the positions of a step, and their rewards, each computed
once, and handed to eq. 7.

Dimensions
    M  positions;  G  thoughts per position;  N  thoughts of a pass;  L  thought tokens
"""

from contextlib import nullcontext

from torch import Tensor

from rlp.step.micro_batch import MicroBatch
from rlp.step.parts import StepParts
from rlp.step.record import rows


class Judge:
    """Gives each position its own thoughts, and each thought its own reward. Placebos give others
    (`rlp.compare.placebos`)."""

    def given(self, run: StepParts, step: int, whole: MicroBatch) -> MicroBatch:
        """The step with the thoughts that are judged and trained, from what was sampled."""
        return whole

    def behavior(self, index: int, part: MicroBatch, logprob: Tensor) -> Tensor:
        """[N, L] log-probabilities of the tokens of a pass when they were sampled.

        Args:
            index: of the micro-batch that `part` is, or is a slice of.
            logprob: [N, L] what the pass has given them.
        """
        return rows(part.thoughts.sampled_logprob)

    def begin(
        self, run: StepParts, step: int, whole: MicroBatch, batches: list[MicroBatch]
    ) -> None:
        """The thoughts of a step are there, and none is rewarded yet. What has to be known before
        the pass with gradient is scored.

        Args:
            whole: the step.
            batches: it in the parts that the update runs.
        """
        self._rewards: list[Tensor | None] = [None] * len(batches)
        # Where passes with gradient are collectives and others are not, ranks meet between the two.
        meet = run.engine.backward_is_collective and not run.engine.forward_is_collective
        with run.pulse.may_be_left() if meet else nullcontext():
            self._look_ahead(run, step, whole, batches)

    def _look_ahead(
        self, run: StepParts, step: int, whole: MicroBatch, batches: list[MicroBatch]
    ) -> None:
        """Score what has to be known before the pass with gradient."""
        self._score(run, batches, run.cut.ahead(batches))

    def _score(self, run: StepParts, batches: list[MicroBatch], wanted: list[bool]) -> None:
        """The rewards of the micro-batches that are wanted."""
        for index, batch in enumerate(batches):
            if wanted[index]:
                run.pulse.between_passes(run.engine.forward_is_collective)
                self._rewards[index] = run.rewards_ahead(batch)

    def ahead(self, index: int) -> Tensor | None:
        """[M, G] rewards of a micro-batch, where they are known before the pass with gradient:
        after the first update with the same thoughts, and where they were scored ahead."""
        return self._rewards[index]

    def fed(self, index: int, reward: Tensor) -> Tensor:
        """[M, G] what eq. 7 is fed.

        Args:
            reward: what the thoughts of the micro-batch have earned.
        """
        self._rewards[index] = reward
        return reward
