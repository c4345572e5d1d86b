"""Keys of a block of thoughts: those of a document once, and of each thought beside them.

What `blocks` needs of attention, kept here whole, so that the reference stays what it is when
`rlp.model.attention` changes.

Dimensions
    T  packed tokens;  B  trunks;  P  trunk tokens, padded;  N  branches
    A  heads of queries;  C  heads of keys;  F = A / C, those that share keys;  E  width of a head
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlp.model.attention import attend_trunks

ATTENTION = "rlp_blocks_sdpa"
"""sdpa unless a forward is given `blocks=`."""


class BlockKeys:
    """Keys and values of trunks, held once, and of branches beside them, while branches grow token
    by token.

    The softmax of a branch token runs over the keys of its prefix and of its branch together, in
    float32. Trunk scores are one product per trunk with the queries of all its branches, so prefix
    keys are read once for all of them.
    """

    def __init__(
        self, trunk: Tensor, place: Tensor, trunk_of: Tensor, prefix: Tensor, most: int
    ) -> None:
        """
        Args:
            trunk: [B, P] int64, place of each trunk token in the packed row of the first forward;
                padded anywhere.
            place: [T] int64, place of each packed token in the padded trunks [B * P].
            trunk_of, prefix: [N] int64, the trunk of each branch, and how many of its tokens the
                branch attends to.
            most: tokens of the longest branch; no room is made for more.
        """
        self._most = most
        self._trunk, self._packed = trunk, place
        self._trunk_of, self._prefix = trunk_of, prefix
        self._trunk_keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = -1
        """Branch tokens so far; -1 until the trunks have been run."""
        self._place_branches()

    def _place_branches(self) -> None:
        """Where each branch stands in the padded block [B, branches of a trunk]."""
        counts = torch.bincount(self._trunk_of, minlength=self._trunk.shape[0])
        before = counts.cumsum(0) - counts
        order = torch.argsort(self._trunk_of, stable=True)
        trunk = self._trunk_of[order]
        self._width = int(counts.max())
        self._place = torch.empty_like(order)
        self._place[order] = (
            trunk * self._width + torch.arange(len(order), device=order.device) - before[trunk]
        )

    def next_token(self) -> None:
        """Announce the forward of one more token of every branch."""
        self._length += 1

    def keep(self, index: Tensor) -> None:
        """Drop all branches but these, in this order."""
        self._trunk_of, self._prefix = self._trunk_of[index], self._prefix[index]
        # Layer by layer, so that one layer at most is held twice.
        for layer, (key, value) in self._own.items():
            self._own[layer] = key[index], value[index]
        self._place_branches()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one forward: of packed trunks [1, A, T, E] first, then of one token per
        branch [1, A, N, E].

        Returns:
            [1, T or N, A, E].
        """
        if self._length < 0:
            return self._attend_trunks(layer, query[0], key[0], value[0], scale)[None]
        query, key, value = (rearrange(part, "1 a n e -> n a e") for part in (query, key, value))
        return self._attend_branches(layer, query, key, value, scale)[None]

    def _attend_trunks(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        out, *self._trunk_keys[layer] = attend_trunks(query, key, value, self._trunk, scale)
        return out.index_select(0, self._packed)

    def _attend_branches(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        own_key, own_value = self._append(layer, key, value)
        trunk_key, trunk_value = self._trunk_keys[layer]
        query = rearrange(query, "n (c f) e -> n c f e", c=trunk_key.shape[1])

        scores = self._by_branch(self._by_trunk(query) @ trunk_key.mT)
        outside = torch.arange(scores.shape[-1], device=scores.device) >= self._prefix[:, None]
        scores = scores.masked_fill(rearrange(outside, "n p -> n 1 1 p"), float("-inf"))
        both = torch.cat([scores, query @ own_key.mT], dim=-1).float() * scale
        weights = both.softmax(dim=-1).to(value.dtype)

        on_trunk, on_own = weights.split([scores.shape[-1], own_key.shape[2]], dim=-1)
        out = self._by_branch(self._by_trunk(on_trunk) @ trunk_value) + on_own @ own_value
        return rearrange(out, "n c f e -> n (c f) e")

    def _by_trunk(self, part: Tensor) -> Tensor:
        """[N, C, F, Y] of the branches -> [B, C, W * F, Y], those of a trunk in one list of W
        places, zero where no branch stands."""
        num_trunks = self._trunk.shape[0]
        block = part.new_zeros(num_trunks * self._width, *part.shape[1:])
        block = block.index_copy(0, self._place, part)
        return rearrange(block, "(b w) c f y -> b c (w f) y", b=num_trunks)

    def _by_branch(self, part: Tensor) -> Tensor:
        """The inverse of `_by_trunk`."""
        return rearrange(part, "b c (w f) y -> (b w) c f y", w=self._width)[self._place]

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, C, tokens so far, E] of the branches, with room that grows ahead of
        them (`next_room`)."""
        room = self._own[layer][0].shape[2] if layer in self._own else 0
        if self._length >= room:
            larger = tuple(
                part.new_zeros(*part.shape[:2], next_room(room, self._most), part.shape[2])
                for part in (key, value)
            )
            for new, old in zip(larger, self._own.get(layer, ())):
                new[:, :, :room] = old
            self._own[layer] = larger
        own_key, own_value = self._own[layer]
        own_key[:, :, self._length], own_value[:, :, self._length] = key, value
        return own_key[:, :, : self._length + 1], own_value[:, :, : self._length + 1]


FIRST_ROOM, LARGEST_GROWTH = 16, 128
"""Places of a branch: the first ones, and how many more at a time. Room that is made and not used
is at most the latter."""


def next_room(room: int, most: int) -> int:
    """Places that a branch gets where `room` are full: twice as many, `LARGEST_GROWTH` more at
    most, and never more than `most`."""
    return min(max(FIRST_ROOM, room + min(room, LARGEST_GROWTH)), most)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    blocks: BlockKeys | None = None,
    **options: object,
):
    if blocks is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **options)
    return blocks.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
