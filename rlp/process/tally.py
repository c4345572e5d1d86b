"""Sums of what a step measures, over micro-batches and ranks: means divide by global counts."""

import math

import torch
from torch import Tensor

from rlp.process.ranks import Ranks


class Tally:
    """Sums and counts by name; `mean` is the only thing it knows, `largest` the exception."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count every entry of `values` toward the mean of `name`; a name without any entry has no
        mean."""
        values = values.detach().double()
        self._sums[name] = self._sums.get(name, 0.0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_largest(self, name: str, values: Tensor) -> None:
        """Keep the largest entry."""
        largest = values.detach().double().max()
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    def not_finite(self) -> list[str]:
        """Names of this rank's sums and maxima that are not finite numbers: some value among them
        was not."""
        return [
            name
            for name, value in [*self._sums.items(), *self._largest.items()]
            if not math.isfinite(value)
        ]

    def reduce(self, ranks: Ranks, only: tuple[str, ...] | None = None) -> dict[str, float]:
        """Means and maxima over all ranks, equal on every rank, which need not have the same names.
        A collective.

        Args:
            only: names to reduce; None: all.
        """

        def wanted(name: str) -> bool:
            return only is None or name in only

        everyone = ranks.gather(
            (
                {
                    name: (float(total), self._counts[name])
                    for name, total in self._sums.items()
                    if wanted(name)
                },
                {name: float(value) for name, value in self._largest.items() if wanted(name)},
            )
        )

        means = {}
        for name in dict.fromkeys(name for sums, _ in everyone for name in sums):
            parts = [sums[name] for sums, _ in everyone if name in sums]
            count = sum(count for _, count in parts)
            if count > 0:
                means[name] = sum(total for total, _ in parts) / count
        return means | {
            name: max(largest[name] for _, largest in everyone if name in largest)
            for name in dict.fromkeys(name for _, largest in everyone for name in largest)
        }
