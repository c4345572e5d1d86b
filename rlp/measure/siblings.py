"""How alike the thoughts of a position are: siblings that say the same are compared with themselves
(eq. 7), and nothing is learned from them. Tokens alone; `rlp diversity --of thought` says more of
thoughts that are on disk.

Dimensions
    M  positions;  G  thoughts per position, at least 2;  L  thought tokens;  W  runs of a thought
"""

import torch
from torch import Tensor

from rlp.process.tally import Tally

NUMBER_BASE = 6364136223846793005
"""Knuth's multiplier; int64 wraps around."""


def watch_siblings(
    tally: Tally, tokens: Tensor, lengths: Tensor, runs: Tensor, inside: Tensor
) -> None:
    """Which siblings are the same thought, and what of a thought a sibling has too.

    Args:
        tokens: [M, G, L] int64, of which the first `lengths` [M, G] count.
        runs: [M, G, W] int64, a number for each run of two tokens, equal for equal runs of a
            position.
        inside: [M, G, W] bool, which of them lie inside their thought.
    """
    tally.add("thought/duplicates_frac", _equal_pairs(tokens, lengths))
    shared, counts = _shared_runs(runs, inside)
    tally.add("thought/sibling_overlap_frac", shared, counts)


def _equal_pairs(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[M]: pairs i < j of a group that are the same tokens, over all its pairs.

    A thought's number is a polynomial in its tokens modulo 2 ** 64.
    """
    place = torch.arange(tokens.shape[2], device=tokens.device)
    power = torch.full_like(place, NUMBER_BASE).cumprod(dim=0)
    number = ((tokens + 1) * power).masked_fill(place >= lengths[..., None], 0).sum(dim=2)
    group_size = tokens.shape[1]
    equal = (number[:, :, None] == number[:, None, :]).sum(dim=(1, 2)) - group_size
    return equal / (group_size * (group_size - 1))


def _shared_runs(runs: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Of each thought, over its different runs g, the mean share of siblings that have g too:
    [M, G], and where a thought has any run: [M, G] bool.

        (sum_g #{thoughts of the group with g} - 1) / ((G - 1) #g)
    """
    outside = torch.iinfo(runs.dtype).min
    ordered = runs.masked_fill(~inside, outside).sort(dim=2).values
    counts = torch.ones_like(ordered, dtype=torch.bool)
    counts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    counts &= ordered != outside

    once = ordered.masked_fill(~counts, outside).flatten(1)
    group = once.sort(dim=1).values
    having = torch.searchsorted(group, once, right=True) - torch.searchsorted(group, once)
    having = having.reshape(runs.shape).masked_fill(~counts, 1)
    number = counts.sum(dim=2)
    siblings = runs.shape[1] - 1
    return (having - 1).sum(dim=2) / (siblings * number).clamp(min=1), number > 0
