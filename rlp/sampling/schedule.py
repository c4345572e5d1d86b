"""Which thought takes which slot, and which trunk is read where: bookkeeping on the host.

Thoughts stand in one queue, ordered by trunk, position and number. A slot that is free takes the
first of them, as soon as there is a place for its trunk. What a thought is made of does not depend
on any of this.

Dimensions
    B  places for trunks;  N  slots;  T  thoughts, M positions times G
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlp.sampling.slots import FEWEST_SLOTS, Room, Slots, Trunk

READ_TOKENS = 8192
"""Tokens of trunks that are packed into one forward, but for a trunk that is longer. From about a
thousand on a GPU works at its full rate, and what a layer keeps of these is some 100 MB for a model
of 2 billion parameters."""


@dataclass(frozen=True, slots=True)
class Read:
    """Run these trunks in one forward, and hold them at these places."""

    places: list[int]
    trunks: list[Trunk]


@dataclass(frozen=True, slots=True)
class Fill:
    """Begin these thoughts in these slots, behind the first `prefix` tokens of the trunks at these
    places."""

    slots: list[int]
    thoughts: list[int]
    places: list[int]
    prefix: list[int]


def num_slots(wanted: int, num_thoughts: int) -> int:
    """Slots that thoughts are sampled in: no more than there are thoughts, but for the fewest."""
    return max(FEWEST_SLOTS, min(wanted, num_thoughts))


def trunk_places(num_slots: int, thoughts_per_trunk: int, num_trunks: int, *, lasting: bool) -> int:
    """Places for trunks that keep the slots busy.

    A trunk that its thoughts read until they end lingers behind the longest of them. With 1,024
    thoughts of exponential lengths (mean a quarter or a sixth of the budget, cut there) in 128
    slots, as many places as are needed at once (N / thoughts of a trunk) take 2.2 to 3.3 times the
    steps that unlimited places take, twice as many 1.3 to 1.9, three times and two more 1.00 to
    1.04. Trunks that last only until their thoughts are begun need no more than are begun at once.
    """
    at_once = -(-num_slots // thoughts_per_trunk)
    return min(3 * at_once + 2 if lasting else at_once, num_trunks)


class Schedule:
    """The queue, and what stands in slots and places."""

    def __init__(
        self,
        trunks: list[Trunk],
        group_size: int,
        num_slots: int,
        num_places: int,
        *,
        lasting: bool,
        together: bool = False,
    ) -> None:
        """
        Args:
            lasting: a trunk's place is free when the last of its thoughts has ended, else when all
                have been begun.
            together: thoughts begin when none goes on, in whole groups, behind trunks of one read:
                as many as there are places.
        """
        self._trunks, self._group, self._lasting = trunks, group_size, lasting
        self._together = together
        members = [len(trunk.members) for trunk in trunks]
        self._trunk_of = np.repeat(np.arange(len(trunks)), members)
        """[M]"""
        self._prefix = [prefix for trunk in trunks for _, prefix in trunk.members]
        self._begun, self._num_thoughts = 0, group_size * len(self._prefix)
        self._last = group_size * np.cumsum(members)
        """[trunks], the first thought that is no longer the trunk's."""

        self._next_trunk = 0
        self._held: dict[int, int] = {}
        """Trunk -> place."""
        self._thoughts_at = np.zeros(num_places, dtype=np.int64)
        """[B], thoughts that go on behind the trunk at a place."""
        self._free_places = list(range(num_places))
        self.thought = np.full(num_slots, -1)
        """[N], which one stands in a slot; -1 for none."""
        self._place = np.zeros(num_slots, dtype=np.int64)

    @classmethod
    def of(
        cls, trunks: list[Trunk], group_size: int, slots: Slots, room: Room, *, together: bool
    ) -> "Schedule":
        """Of the thoughts behind these trunks, in these slots."""
        return cls(
            trunks,
            group_size,
            slots.num_slots,
            room.num_trunks,
            lasting=slots.reads_trunks,
            together=together,
        )

    @property
    def num_going(self) -> int:
        """Slots with a thought."""
        return int((self.thought >= 0).sum())

    @property
    def is_drained(self) -> bool:
        """Whether every thought has been begun."""
        return self._begun == self._num_thoughts

    def end(self, slots: list[int]) -> None:
        """The thoughts in these slots have ended."""
        self.thought[slots] = -1
        np.subtract.at(self._thoughts_at, self._place[slots], 1)

    def keep(self, slots: list[int]) -> None:
        """Hold only these slots, renumbered in this order."""
        self.thought, self._place = self.thought[slots], self._place[slots]

    def moves(self) -> Iterator[Read | Fill]:
        """What to do for the slots that are free, in order."""
        slots = np.flatnonzero(self.thought < 0).tolist()
        if self._together:
            slots = [] if self.num_going else slots[: len(self._thoughts_at) * self._group]
        fill = Fill([], [], [], [])
        while slots and not self.is_drained:
            trunk = int(self._trunk_of[self._begun // self._group])
            if trunk not in self._held:
                if fill.slots:
                    yield fill
                    fill = Fill([], [], [], [])
                if not (reads := self._read_ahead()):
                    return
                yield from reads
            self._begin(slots.pop(0), self._held[trunk], fill)
        if fill.slots:
            yield fill

    def _begin(self, slot: int, place: int, fill: Fill) -> None:
        """The first thought of the queue, in a slot."""
        thought = self._begun
        self._begun += 1
        self.thought[slot], self._place[slot] = thought, place
        self._thoughts_at[place] += 1
        fill.slots.append(slot)
        fill.thoughts.append(thought)
        fill.places.append(place)
        fill.prefix.append(self._prefix[thought // self._group])

    def _read_ahead(self) -> list[Read]:
        """The next trunks, one for each place that is free."""
        for trunk, place in list(self._held.items()):
            if self._begun >= self._last[trunk] and not (
                self._lasting and self._thoughts_at[place]
            ):
                del self._held[trunk]
                self._free_places.append(place)
        self._free_places.sort()

        reads, tokens = [], 0
        while self._free_places and self._next_trunk < len(self._trunks):
            trunk, place = self._trunks[self._next_trunk], self._free_places.pop(0)
            self._held[self._next_trunk] = place
            self._next_trunk += 1
            tokens += len(trunk.tokens)
            if not reads or tokens > READ_TOKENS and not self._together:
                reads.append(Read([], []))
                tokens = len(trunk.tokens)
            reads[-1].places.append(place)
            reads[-1].trunks.append(trunk)
        return reads
