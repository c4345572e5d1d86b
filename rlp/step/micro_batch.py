"""Micro-batches: a step, or some documents of it, with everything that belongs to them, in whole
groups. Which documents are together is not known here.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
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
    host: Thoughts | None = None
    """`thoughts`, in the memory of the host, where they were copied for the whole step at once."""
    rows: Tensor | None = None
    """[M] int64, which positions of the step these are; None where it is the whole step."""
    groups: tuple[slice, ...] = ()
    """The parts of each group that are run by themselves; without any, whole groups."""
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

    def part(self, documents: Sequence[int]) -> "MicroBatch":
        """Some documents of a step, in this order."""
        chosen = [self.documents[document] for document in documents]
        if self.positions is None:
            return MicroBatch(chosen)
        rows = there = torch.from_numpy(self.positions.rows_of(documents))
        thoughts = known = host = None
        if self.thoughts is not None:
            host = self.on_host()[rows]
            there = rows.to(self.thoughts.tokens.device, non_blocking=True)
            thoughts = self.thoughts[there]
            known = None if self.baseline_logprob is None else self.baseline_logprob[there]
        return MicroBatch(
            chosen, self.positions.of_list(documents), thoughts, known, host=host, rows=there
        )

    def on_host(self) -> Thoughts:
        """Its thoughts in the memory of the host: a copy waits for the device, so there is one for
        a step."""
        return self.thoughts.to("cpu") if self.host is None else self.host

    def slices_of(self, size: int | None) -> tuple[slice, ...]:
        """Its groups in parts of `size` thoughts (`optim.thoughts_per_forward`); nothing, without a
        size or without thoughts."""
        if self.thoughts is None or size is None:
            return ()
        count = self.thoughts.tokens.shape[1]
        return tuple(slice(start, min(start + size, count)) for start in range(0, count, size))

    def slices(self) -> list["MicroBatch"]:
        """It in the parts that are run by themselves: one pass each."""
        if self.thoughts is None:
            return [self]
        groups, host = self.groups or (slice(0, self.thoughts.tokens.shape[1]),), self.on_host()
        return [
            replace(
                self,
                thoughts=self.thoughts.siblings(group),
                host=host.siblings(group),
                group=group,
            )
            for group in groups
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
            prediction=self.thoughts.prediction,
        )


def in_order(batches: list[MicroBatch], values: list[Tensor]) -> Tensor:
    """[M, ...] of a step, position by position, from those of its micro-batches."""
    joined = torch.cat(values)
    return torch.empty_like(joined).index_copy(
        0, torch.cat([batch.rows for batch in batches]).to(joined.device), joined
    )
