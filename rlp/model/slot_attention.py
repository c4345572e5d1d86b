"""Attention of slots: keys of trunks, each held once, and of branches that come and go beside them.

A slot holds one branch at a time. Its softmax runs over the keys of its prefix and of the branch
together, in float32. Scores over a trunk are one product with the queries of all slots that are
seated at it, so its keys are read once for all of them; scores over own keys are masked by each
slot's own length. Tensors keep their shapes and places in memory while branches come and go, so a
forward can be recorded and replayed.

On a CPU, where arithmetic is what costs, only those keys, seats and slots are computed with that
are in use. What a row gets does not depend on that, nor on which slot it stands in: measured to the
bit for float32, given at least 4 rows in each product and `key_room` (2 cores of an AMD EPYC, MKL).

Dimensions
    B  places for trunks;  P  keys of a trunk, with room;  T  tokens of the packed trunks
    N  slots;  L  keys of a slot, with room;  W  seats at a trunk
    A  heads of queries;  C  heads of keys;  F = A / C, those that share keys;  E  width of a head
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

FEWEST_ROWS = 4
"""Of a product of matrices: with fewer, a CPU's library takes another way and rounds otherwise."""

LOOP_FLOPS = 500_000
"""What a CPU computes in the time that two more calls of a product take: 16 us at 30 GFLOP/s."""


def key_room(tokens: int) -> int:
    """Places for the keys of so many tokens, 16 at a time, so that a product over them has the same
    bits with more places of weight zero. A CPU's library sums up to 192 terms at once, and from 384
    on in blocks of 192; in between it takes halves."""
    room = 16 * -(-tokens // 16)
    return room if room <= 192 else max(384, room)


@dataclass(frozen=True, slots=True)
class _Table:
    """Trunks whose scores are one batched product, and who is seated at them."""

    places: slice
    """Of the trunks."""
    fold: Tensor
    """[places * A * W] int64, for each row of the product, which of the queries [N * A] it is;
    any where the seat is empty."""


class SlotKeys:
    """Keys and values of B trunks and of the branches in N slots."""

    def __init__(
        self,
        *,
        num_trunks: int,
        trunk_tokens: int,
        seats: int,
        num_slots: int,
        slot_tokens: int,
        device: torch.device,
        static: bool,
    ) -> None:
        """
        Args:
            trunk_tokens, slot_tokens: the most of any trunk and of any branch.
            seats: the most slots that stand behind one trunk at a time.
            static: compute with all places, seats and slots, so that a step can be recorded.
        """
        self._trunk_room, self._own_room = key_room(trunk_tokens), key_room(slot_tokens)
        self._num_trunks, self._seats, self._static = num_trunks, seats, static
        self._device = device
        self._trunk_keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._own_keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._heads = (0, 0)
        """A and C, as soon as a trunk has been run."""
        self._place = np.full(num_slots, -1)
        """[N], the place of the trunk that a slot stands behind; -1 for none."""
        self._tables: list[_Table] = []

        zeros = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.prefix = zeros
        """[N] int64, how many tokens of its trunk a slot attends to."""
        self.length = zeros.clone()
        """[N] int64, how many tokens of its branch it has run."""

    @property
    def num_slots(self) -> int:
        """N."""
        return len(self._place)

    def num_bytes(self) -> int:
        """Of all keys and values."""
        layers = (*self._trunk_keys.values(), *self._own_keys.values())
        return sum(part.numel() * part.element_size() for pair in layers for part in pair)

    def on_device(self, values: np.ndarray | list[int]) -> Tensor:
        """Whole numbers, as an index."""
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(self._device)

    def reading(self, places: list[int], lengths: list[int]) -> "TrunkReading":
        """What a forward of packed trunks [T] is given, to hold them at `places`.

        Args:
            lengths: tokens of each trunk; one that has no place is run and not held.
        """
        return TrunkReading(self, self.on_device(places), tuple(lengths))

    def fill(self, slots: list[int], places: list[int], prefix: list[int]) -> None:
        """Begin a branch in each of these slots."""
        index = self.on_device(slots)
        self._place[slots] = places
        self.prefix[index] = self.on_device(prefix)
        self.length[index] = 0
        self.seat()

    def free(self, slots: list[int], *, broken: bool) -> None:
        """No branch stands in these slots.

        Args:
            broken: make their keys and values zero: what a slot does not look at counts nothing
                only where it is finite.
        """
        self._place[slots] = -1
        if not broken:
            return
        index = self.on_device(slots)
        for pair in self._own_keys.values():
            for part in pair:
                part.index_fill_(0, index, 0)

    def keep(self, slots: list[int]) -> None:
        """Hold only these slots, in this order."""
        index = self.on_device(slots)
        self._place = self._place[slots]
        self.prefix, self.length = self.prefix[index], self.length[index]
        # Layer by layer, so that one layer at most is held twice.
        for layer, (key, value) in self._own_keys.items():
            self._own_keys[layer] = key[index], value[index]
        self.seat()

    def seat(self) -> None:
        """Who sits where, anew."""
        heads, key_heads = self._heads
        seated = np.flatnonzero(self._place >= 0)
        order = seated[np.argsort(self._place[seated], kind="stable")]
        place = self._place[order]
        counts = np.bincount(place, minlength=self._num_trunks)
        seat = np.arange(len(order)) - (np.cumsum(counts) - counts)[place]

        rows, tables = 0, []
        unfold = np.zeros((self.num_slots, heads), dtype=np.int64)
        head = np.arange(heads)
        for first, last, width in self._blocks(counts, heads // key_heads):
            here = slice(*np.searchsorted(place, (first, last)))
            slot = np.zeros((last - first, width), dtype=np.int64)
            slot[place[here] - first, seat[here]] = order[here]
            fold = slot[:, None] * heads + head[:, None]
            tables.append((slice(first, last), fold.ravel()))
            block = (place[here] - first) * heads * width + seat[here]
            unfold[order[here]] = rows + block[:, None] + head * width
            rows += fold.size
        self._set_tables(tables, unfold.ravel())

    def _set_tables(self, tables: list[tuple[slice, np.ndarray]], unfold: np.ndarray) -> None:
        """Where shapes are fixed the numbers go where they were, for a recorded step to read."""
        if self._static and self._tables:
            self._tables[0].fold.copy_(self.on_device(tables[0][1]))
            self._unfold.copy_(self.on_device(unfold))
            return
        self._tables = [_Table(places, self.on_device(fold)) for places, fold in tables]
        self._unfold = self.on_device(unfold)

    def _blocks(self, counts: np.ndarray, share: int) -> list[tuple[int, int, int]]:
        """(first place, last place + 1, seats) of each product.

        One product for all, as wide as its fullest trunk, is the fewest calls; one for each trunk
        the least arithmetic.
        """
        fewest = -(-FEWEST_ROWS // share)
        if self._static:
            return [(0, self._num_trunks, max(self._seats, fewest))]
        used = np.flatnonzero(counts)
        if not len(used):
            return [(0, 1, fewest)]

        width = max(int(counts.max()), fewest)
        together = (int(used[0]), int(used[-1]) + 1, width)
        idle = (together[1] - together[0]) * width - int(counts.sum())
        key = self._trunk_keys[next(iter(self._trunk_keys))][0]
        of_a_seat = 4 * self._heads[0] * self._trunk_room * key.shape[3]
        if idle * of_a_seat <= LOOP_FLOPS * len(used):
            return [together]
        return [(place, place + 1, max(int(counts[place]), fewest)) for place in used.tolist()]

    def step(self, going: Tensor) -> "SlotStep":
        """What a forward of one token of each slot is given; those that go on [N] are one longer
        for it."""
        own = torch.clamp(self.length, max=self._own_room - 1)
        room = self._own_room if self._static else self._used_room(int(own.max()) + 1)
        outside = torch.cat(
            [
                torch.arange(self._trunk_room, device=self._device) >= self.prefix[:, None],
                torch.arange(room, device=self._device) > own[:, None],
            ],
            dim=1,
        )
        heads, key_heads = self._heads
        row = torch.arange(self.num_slots * key_heads, device=self._device)
        place = row * self._own_room + repeat(own, "n -> (n c)", c=key_heads)
        self.length += going
        bias = torch.zeros(outside.shape, device=self._device).masked_fill_(outside, float("-inf"))
        return SlotStep(self, place, room, bias[:, None])

    def _used_room(self, tokens: int) -> int:
        """Of the places for own keys, those up to `tokens`, in coarse steps: whatever a product of
        a single row has less than 64 of is computed in another way."""
        return min(self._own_room, key_room(64 * -(-tokens // 64)))

    def _hold(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Make room for a layer, given its queries [A, T, E] and keys [C, T, E]."""
        self._heads = query.shape[0], key.shape[0]
        # Scores are float32; a GPU gives them from narrower keys, a CPU from such alone.
        dtype = key.dtype if key.is_cuda else torch.promote_types(key.dtype, torch.float32)

        def zeros(rows: int, room: int) -> tuple[Tensor, Tensor]:
            shape = (rows, key.shape[0], room, key.shape[2])
            return tuple(key.new_zeros(shape, dtype=dtype) for _ in range(2))

        self._trunk_keys[layer] = zeros(self._num_trunks, self._trunk_room)
        self._own_keys[layer] = zeros(self.num_slots, self._own_room)
        if not self._tables:
            self.seat()


@dataclass(frozen=True, slots=True)
class TrunkReading:
    """A forward of packed trunks, which attend to themselves; their keys are held."""

    keys: SlotKeys
    places: Tensor
    """Of the first trunks in the row."""
    lengths: tuple[int, ...]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [1, T, A, E] of queries [1, A, T, E], keys and values [1, C, T, E].

        Each trunk has the length that it has, and so the bits that it has alone; those of one
        length, side by side in the row, are one call.
        """
        if layer not in self.keys._trunk_keys:
            self.keys._hold(layer, query[0], key[0])
        outs, first, start = [], 0, 0
        while first < len(self.lengths):
            length = self.lengths[first]
            last = first + 1
            while last < len(self.lengths) and self.lengths[last] == length:
                last += 1
            stop = start + (last - first) * length
            parts = [
                rearrange(part[0, :, start:stop], "a (n t) e -> n a t e", t=length)
                for part in (query, key, value)
            ]
            self._keep(layer, self.places[first:last], length, *parts[1:])
            out = nn.functional.scaled_dot_product_attention(
                *parts, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
            outs.append(rearrange(out, "n a t e -> 1 (n t) a e"))
            first, start = last, stop
        return torch.cat(outs, dim=1)

    def _keep(self, layer: int, places: Tensor, length: int, key: Tensor, value: Tensor) -> None:
        """Keys and values [n, C, length, E] of the first of these trunks, which have places."""
        if not len(places):
            return
        for held, part in zip(self.keys._trunk_keys[layer], (key, value)):
            held[places, :, :length] = part[: len(places)].to(held.dtype)
            held[places, :, length:] = 0


@dataclass(frozen=True, slots=True)
class SlotStep:
    """A forward of one token of each slot."""

    keys: SlotKeys
    place: Tensor
    """[N * C] int64, where its key goes among all own keys [N * C * L]."""
    room: int
    """Own keys that are computed with."""
    bias: Tensor
    """[N, 1, P + room] float32, -inf where a slot does not look."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [1, N, A, E] of queries [1, A, N, E], keys and values [1, C, N, E]."""
        (trunk_key, trunk_value), own = self.keys._trunk_keys[layer], self.keys._own_keys[layer]
        for held, part in zip(own, (key, value)):
            rows = rearrange(part, "1 c n e -> (n c) e").to(held.dtype)
            held.flatten(0, 2).index_copy_(0, self.place, rows)
        own_key, own_value = (part[:, :, : self.room].flatten(0, 1) for part in own)

        by_slot, by_key = (self.keys.num_slots, query.shape[1]), (len(own_key), -1)
        rows = rearrange(query, "1 a n e -> (n a) e").to(trunk_key.dtype)
        on_trunk = self._by_trunk(rows, trunk_key.mT)
        on_own = _product(rows.unflatten(0, by_key), own_key.mT).flatten(0, 1)
        scores = torch.cat([on_trunk, on_own], dim=1).unflatten(0, by_slot)
        weights = torch.add(self.bias, scores, alpha=scale).softmax(dim=2).to(trunk_key.dtype)

        on_trunk, on_own = weights.flatten(0, 1).split([trunk_key.shape[2], self.room], dim=1)
        out = self._by_trunk(on_trunk, trunk_value)
        out = out + _product(on_own.unflatten(0, by_key), own_value).flatten(0, 1)
        return out.unflatten(0, by_slot)[None].to(query.dtype)

    def _by_trunk(self, rows: Tensor, other: Tensor) -> Tensor:
        """Of each slot's rows [N * A, X], the product with its trunk's part of `other`
        [B, C, X, Y]: [N * A, Y]."""
        products = []
        for table in self.keys._tables:
            trunks = other[table.places].flatten(0, 1)
            folded = rows.index_select(0, table.fold).unflatten(0, (len(trunks), -1))
            products.append(_product(folded, trunks).flatten(0, 1))
        product = products[0] if len(products) == 1 else torch.cat(products)
        return product.index_select(0, self.keys._unfold)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched, in float32 at least."""
    if left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right)
