"""What a step is watched by: statistics of thoughts and rewards, added up over micro-batches and ranks.

Means are sums over global counts, so neither micro-batches nor ranks change a number.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  L  thought tokens
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from rlp.distributed import Ranks
from rlp.layout import Thoughts


class Tally:
    """Sums and counts by name; `mean` is the only thing it knows, `largest` the exception."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count every entry of `values` toward the mean of `name`."""
        values = values.detach().double()
        self._sums[name] = self._sums.get(name, 0.0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_largest(self, name: str, values: Tensor) -> None:
        """Keep the largest entry."""
        largest = values.detach().double().max()
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Means and maxima over all ranks, equal on every rank. A collective."""
        mine = ({name: (float(total), self._counts[name]) for name, total in self._sums.items()}, {name: float(value) for name, value in self._largest.items()})
        everyone = ranks.gather(mine)
        means = {}
        for name in mine[0]:
            parts = [sums[name] for sums, _ in everyone if name in sums]
            means[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        return means | {name: max(largest[name] for _, largest in everyone if name in largest) for name in mine[1]}


def watch_thoughts(tally: Tally, thoughts: Thoughts, close_tokens: int) -> None:
    """Length (close marker not counted), truncation, and entropy of what was sampled."""
    tally.add("thought/tokens_mean", thought_lengths(thoughts, close_tokens))
    tally.add("thought/truncated_frac", thoughts.truncated)
    tally.add("policy/entropy", thoughts.entropy[thoughts.mask])


def thought_lengths(thoughts: Thoughts, close_tokens: int) -> Tensor:
    """[M, G] tokens of each thought without its close marker."""
    return thoughts.mask.sum(dim=2) - close_tokens * (~thoughts.truncated).long()


def watch_rewards(tally: Tally, reward: Tensor, lengths: Tensor) -> None:
    """The reward [M, G], its spread within groups, and how it goes with length within groups.

    `reward/length_covariance` and the two variances are parts of `length_correlation`.
    """
    centered = reward - reward.mean(dim=1, keepdim=True)
    length = lengths.double() - lengths.double().mean(dim=1, keepdim=True)
    tally.add("reward/mean", reward)
    tally.add("reward/positive_frac", reward > 0)
    tally.add("reward/group_std", reward.std(dim=1))
    tally.add("length_covariance", centered * length)
    tally.add("reward_variance", centered.square())
    tally.add("length_variance", length.square())


def watch_ratio(tally: Tally, logprob: Tensor, thoughts: Thoughts, clip_low: float, clip_high: float) -> None:
    """How far the policy [N, L] is from the behavior policy: 0 on-policy, up to rounding."""
    mask = rearrange(thoughts.mask, "m g l -> (m g) l")
    log_ratio = (logprob.detach() - rearrange(thoughts.behavior_logprob, "m g l -> (m g) l"))[mask]
    ratio = log_ratio.exp()
    tally.add_largest("policy/ratio_max_deviation", (ratio - 1).abs())
    tally.add("policy/behavior_mismatch_kl", ratio - 1 - log_ratio)
    tally.add("policy/clip_frac", (ratio < 1 - clip_low) | (ratio > 1 + clip_high))


def length_correlation(means: dict[str, float]) -> None:
    """Replace the three parts by `reward/length_correlation`: the within-group correlation of reward and length.

    Left out where one of them does not vary at all.
    """
    covariance, reward, length = (means.pop(name) for name in ("length_covariance", "reward_variance", "length_variance"))
    if reward > 0 and length > 0:
        means["reward/length_correlation"] = covariance / math.sqrt(reward * length)
