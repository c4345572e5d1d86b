"""Micro-batches: some documents of a step with everything that belongs to them, in whole groups.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens
"""

from dataclasses import dataclass, replace

from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.thoughts import Thoughts
from rlp.step.reward import Evidence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some documents of a step with everything that belongs to them."""

    documents: list[Document]
    positions: Positions | None = None
    """[M]; None where the run does not think."""
    thoughts: Thoughts | None = None
    """[M, G, L]; likewise."""
    baseline_logprob: Tensor | None = None
    """[M] S_ema; None on a step that does not score it."""
    group: slice | None = None
    """Which thoughts of each group are here; None: all."""

    @property
    def is_first_slice(self) -> bool:
        """Whether it is whole, or the first of the parts that it is run in."""
        return self.group is None or self.group.start == 0

    def last_position(self) -> "MicroBatch":
        """Its last position alone, in its document."""
        positions = self.positions.of_documents(len(self.documents) - 1, len(self.documents))
        baseline_logprob = None if self.baseline_logprob is None else self.baseline_logprob[-1:]
        return MicroBatch(
            self.documents[-1:], positions.last(), self.thoughts[-1:], baseline_logprob
        )

    def slices(self, size: int | None) -> list["MicroBatch"]:
        """It in parts that are run by themselves, each with `size` thoughts of each group
        (`optim.thoughts_per_forward`); whole, without a size or without thoughts."""
        if self.thoughts is None:
            return [self]
        group_size = self.thoughts.tokens.shape[1]
        size = min(size or group_size, group_size)
        groups = [slice(start, start + size) for start in range(0, group_size, size)]
        return [
            replace(self, thoughts=self.thoughts.siblings(group), group=group) for group in groups
        ]

    def evidence(self, reasoned_logprob: Tensor, matched: Tensor | None) -> Evidence:
        """What is known about its thoughts.

        Args:
            reasoned_logprob, matched: [M, G], of whole groups.
        """
        return Evidence(
            reasoned_logprob=reasoned_logprob,
            baseline_logprob=self.baseline_logprob,
            matched=matched,
            documents=self.documents,
            positions=self.positions,
            thoughts=self.thoughts,
        )


def micro_batches(
    documents: list[Document], positions: Positions | None, thoughts: Thoughts | None, size: int
) -> list[MicroBatch]:
    """The documents of a step, `size` at a time, each with its positions and thoughts."""
    batches = []
    for start in range(0, len(documents), size):
        stop = min(start + size, len(documents))
        if thoughts is None:
            batches.append(MicroBatch(documents[start:stop]))
            continue
        here = positions.slice_of_documents(start, stop)
        batches.append(
            MicroBatch(documents[start:stop], positions.of_documents(start, stop), thoughts[here])
        )
    return batches
