"""Sums of what a step measures, over micro-batches and ranks: means divide by global counts."""

import math

import torch
from torch import Tensor

from rlp.process.ranks import Ranks


class Tally:
    """Sums and counts by name; `mean` is the only thing it knows, `largest` the exception."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int | Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Count every entry of `values` toward the mean of `name`, or those where `mask` is True; a
        name without any entry has no mean. The device is not waited for."""
        values, count = values.detach().double(), values.numel()
        if mask is not None:
            values, count = values.masked_fill(~mask, 0.0), mask.sum()
        self._sums[name] = self._sums.get(name, 0.0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + count

    def add_largest(self, name: str, values: Tensor) -> None:
        """Keep the largest entry."""
        largest = values.detach().double().max()
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    def not_finite(self) -> list[str]:
        """Names of this rank's sums and maxima that are not finite numbers: some value among them
        was not."""
        values = [*self._sums.values(), *self._largest.values()]
        names = [*self._sums, *self._largest]
        return [name for name, value in zip(names, _read(values)) if not math.isfinite(value)]

    def reduce(self, ranks: Ranks, only: tuple[str, ...] | None = None) -> dict[str, float]:
        """Means and maxima over all ranks, equal on every rank, which need not have the same names.
        A collective.

        Args:
            only: names to reduce; None: all.
        """

        def wanted(name: str) -> bool:
            return only is None or name in only

        summed, largest = list(filter(wanted, self._sums)), list(filter(wanted, self._largest))
        read = iter(
            _read(
                [self._sums[name] for name in summed]
                + [self._counts[name] for name in summed]
                + [self._largest[name] for name in largest]
            )
        )
        totals, counts, maxima = ([next(read) for _ in of] for of in (summed, summed, largest))
        mine = dict(zip(summed, zip(totals, counts))), dict(zip(largest, maxima))
        everyone = ranks.gather(mine)

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


def _read(values: list[Tensor | int]) -> list[float]:
    """Numbers of the device, read at once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    alike = [value.to(tensors[0].device, torch.float64) for value in tensors]
    read = iter(torch.stack(alike).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]
