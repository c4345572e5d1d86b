"""Slots: places for thoughts that grow side by side, each taken anew when its thought has ended.

What thoughts have in common is run once and held as a trunk; a slot continues one. Shapes do not
change while thoughts come and go, so a thought does not depend on its neighbours, and a step can be
recorded once and replayed. Which token is drawn, when a thought has ended and which one comes next
is not known here (`native`).

    SharedSlots   a trunk is a document, whose keys are read where they are by all slots behind it:
                  attention-only models (`shared_slots`)
    ForkedSlots   a trunk is the context of a position, whose cache is copied into each slot: any
                  causal model, recurrent states included (`forked_slots`)

Dimensions
    B  trunks that are held;  P  tokens of a trunk
    M  positions;  N  slots;  L  tokens of a slot;  V  vocabulary
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.thoughts import ThoughtFormat

FEWEST_SLOTS = 4
"""Slots that there are at least. A product of fewer rows takes another way through a CPU's library
and rounds otherwise; with four or more each row has the bits that it has among any number."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """What is run once, for the thoughts of some positions."""

    tokens: np.ndarray
    """[P] int64: instruction and document. The open marker is no part of it: each thought begins
    with one of its own."""
    members: tuple[tuple[int, int], ...]
    """(position m, how many of the tokens are its context), in the order of positions."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much is held."""

    num_slots: int
    """N, at least `FEWEST_SLOTS`."""
    slot_tokens: int
    """The most that a slot runs: open marker and thought, but for its last token."""
    num_trunks: int
    """B."""
    trunk_tokens: int
    """The most of any trunk."""
    seats: int
    """The most slots that stand behind one trunk at a time."""
    static: bool
    """Whether shapes are those of full slots and trunks all the time, so that a step can be
    recorded; else of what is in use."""


class Slots(ABC):
    """N slots and B places for trunks, made from a policy and a `Room`. All calls stand within
    `Policy.sampling`.

    `read` before `fill`, `fill` before the `next` that runs the first token of a thought. Each
    `read`, `idle_read` and `next` is one forward of the model, and nothing else is: where forwards
    are collectives, ranks count them.
    """

    length: Tensor
    """[N] int64, how many tokens of its thought a slot has run, those of the open marker included.
    The same tensor as long as `num_slots` is the same; `next` adds to it."""
    num_slots: int
    """N."""

    reads_trunks: ClassVar[bool]
    """Whether `next` reads the trunk of a thought: its place is free when the last of its thoughts
    has ended. Else it is free when they all have been begun."""
    can_be_recorded: ClassVar[bool]
    """Whether `next`, of static room, reads nothing on the host and makes nothing whose shape
    depends on a number."""

    @staticmethod
    @abstractmethod
    def trunks(
        documents: list[Document], positions: Positions, thought_format: ThoughtFormat
    ) -> list[Trunk]:
        """What has to be run for all positions; their members, trunk by trunk, are the positions in
        order."""

    @abstractmethod
    def __init__(self, policy: Policy, room: Room) -> None: ...

    @abstractmethod
    def read(self, places: list[int], trunks: list[Trunk]) -> None:
        """Run trunks in one forward and hold them at these places; no slot reads what was there."""

    @abstractmethod
    def idle_read(self) -> None:
        """A forward without use, beside ranks that have something to read."""

    @abstractmethod
    def fill(self, slots: list[int], places: list[int], prefix: list[int]) -> None:
        """Begin new thoughts.

        Args:
            slots: where; what stood there is forgotten.
            places: of each one's trunk.
            prefix: how many of the trunk's tokens each continues.
        """

    @abstractmethod
    def free(self, slots: list[int], *, broken: bool) -> None:
        """The thoughts in these slots have ended.

        Args:
            broken: their numbers may not be finite. A product with such a number is not finite
                either, even where its weight is zero: none may reach the next thought.
        """

    @abstractmethod
    def next(self, token: Tensor, going: Tensor) -> Tensor:
        """Run one more token in every slot.

        Args:
            token: [N] int64.
            going: [N] bool, the slots that have a thought. What the others compute is read by
                nobody, and their `length` stays.

        Returns:
            [N, V] float32, the logits after it.
        """

    @abstractmethod
    def keep(self, slots: list[int]) -> None:
        """Hold only these slots, renumbered in this order; at least `FEWEST_SLOTS` of them."""
