"""Slots of any causal model, recurrent states included: a trunk is the context of a position, whose
cache is copied into the slot of each of its thoughts."""

import numpy as np
import torch
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.running_rows import ReadRows, RunningRows
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.slots import FEWEST_SLOTS, Room, Slots, Trunk


class ForkedSlots(Slots):
    """Each slot holds a cache of its own, which `fill` copies from a trunk's."""

    reads_trunks = False
    can_be_recorded = False

    def __init__(self, policy: Policy, room: Room) -> None:
        self.num_slots = max(room.num_slots, FEWEST_SLOTS)
        self.length = torch.zeros(self.num_slots, dtype=torch.int64, device=policy.device)
        self._policy, self._running = policy, RunningRows(policy, self.num_slots)
        self._held: dict[int, tuple[ReadRows, int]] = {}

    @staticmethod
    def trunks(
        documents: list[Document], positions: Positions, thought_format: ThoughtFormat
    ) -> list[Trunk]:
        """One for each position, of all of its context."""
        contexts = [thought_format.context(documents[d].tokens, t) for d, t in positions.places()]
        return [Trunk(context, ((m, len(context)),)) for m, context in enumerate(contexts)]

    def read(self, places: list[int], trunks: list[Trunk]) -> None:
        """As `Slots.read`. What was read together is held until none of its places is."""
        for place in places:
            self._held.pop(place, None)
        read = ReadRows(self._policy, [trunk.tokens for trunk in trunks])
        self._held |= {place: (read, row) for row, place in enumerate(places)}

    def idle_read(self) -> None:
        """As `Slots.idle_read`. Slots that have never begun have something to run beside others."""
        read = ReadRows(self._policy, [np.zeros(1, dtype=np.int64)])
        if not self._running.has_begun:
            everywhere = list(range(self.num_slots))
            self._running.begin(everywhere, read, [0] * self.num_slots)
            self._running.end(everywhere)

    def fill(self, slots: list[int], places: list[int], prefix: list[int]) -> None:
        """As `Slots.fill`; a trunk is always continued from its end."""
        reads = {id(read): read for read, _ in (self._held[place] for place in places)}
        for read in reads.values():
            mine = [i for i, place in enumerate(places) if self._held[place][0] is read]
            rows = [self._held[places[i]][1] for i in mine]
            self._running.begin([slots[i] for i in mine], read, rows)
        self.length[torch.tensor(slots, device=self.length.device)] = 0

    def free(self, slots: list[int], *, broken: bool) -> None:
        """As `Slots.free`; rows share no tensor that a product sums over, and `fill` replaces the
        whole of one."""
        self._running.end(slots)

    def next(self, token: Tensor, going: Tensor) -> Tensor:
        """As `Slots.next`."""
        logits = self._running.next(token, going)
        self.length += going
        return logits

    def keep(self, slots: list[int]) -> None:
        """As `Slots.keep`."""
        self._running.keep(slots)
        self.num_slots = len(slots)
        self.length = self.length[torch.tensor(slots, device=self.length.device)]
