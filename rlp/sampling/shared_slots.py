"""Slots behind shared trunks: a document is run once for all its positions, and its keys are read
where they are by every thought about it. Models that run trees (`attention.why_no_tree`).

Dimensions
    B  trunks that are held;  P  tokens of a trunk;  N  slots;  L  tokens of a slot
"""

import numpy as np
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.slot_attention import FEWEST_ROWS, SlotKeys
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.slots import Room, Slots, Trunk


class SharedSlots(Slots):
    """Keys of trunks once (`SlotKeys`), and of each slot's thought beside them."""

    reads_trunks = True
    can_be_recorded = True

    @staticmethod
    def trunks(
        documents: list[Document], positions: Positions, thought_format: ThoughtFormat
    ) -> list[Trunk]:
        """Each document that has positions, up to its last one."""
        members: dict[int, list[tuple[int, int]]] = {}
        for m, (d, t) in enumerate(positions.places()):
            prefix = len(thought_format.context(documents[d].tokens, t))
            members.setdefault(d, []).append((m, prefix))
        return [
            Trunk(thought_format.context(documents[d].tokens, positions.last_of(d)), tuple(of_it))
            for d, of_it in members.items()
        ]

    def __init__(self, policy: Policy, room: Room) -> None:
        self._policy = policy
        self._keys = SlotKeys(
            num_trunks=room.num_trunks,
            trunk_tokens=room.trunk_tokens,
            seats=room.seats,
            num_slots=room.num_slots,
            slot_tokens=room.slot_tokens,
            device=policy.device,
            static=room.static,
        )

    @property
    def num_slots(self) -> int:
        """N."""
        return self._keys.num_slots

    @property
    def length(self) -> Tensor:
        """As of any slots."""
        return self._keys.length

    def num_bytes(self) -> int:
        """Of all that is held."""
        return self._keys.num_bytes()

    def read(self, places: list[int], trunks: list[Trunk]) -> None:
        """Packed in one row, those of one length side by side."""
        order = sorted(range(len(trunks)), key=lambda index: len(trunks[index].tokens))
        self._read([places[index] for index in order], [trunks[index].tokens for index in order])

    def idle_read(self) -> None:
        """A row that nothing is held of."""
        self._read([], [])

    def _read(self, places: list[int], rows: list[np.ndarray]) -> None:
        missing = FEWEST_ROWS - sum(map(len, rows))
        if missing > 0:
            rows = [*rows, np.zeros(missing, dtype=np.int64)]
        lengths = [len(row) for row in rows]
        tokens = self._keys.on_device(np.concatenate(rows))
        position = self._keys.on_device(np.concatenate([np.arange(length) for length in lengths]))
        self._policy.read_trunks(tokens, position, self._keys.reading(places, lengths))

    def fill(self, slots: list[int], places: list[int], prefix: list[int]) -> None:
        """New branches behind the trunks at these places."""
        self._keys.fill(slots, places, prefix)

    def free(self, slots: list[int], *, broken: bool) -> None:
        """Their seats are free; what is not finite becomes zero."""
        self._keys.free(slots, broken=broken)

    def next(self, token: Tensor, going: Tensor) -> Tensor:
        """One forward of N tokens, at the positions that follow their prefixes."""
        position = self._keys.prefix + self._keys.length
        return self._policy.decode_slots(token, position, self._keys.step(going))

    def keep(self, slots: list[int]) -> None:
        """Their keys, copied together."""
        self._keys.keep(slots)
