"""Ranks that are threads of this process: what they gather, they bring to one table."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from rlp.process.ranks import Ranks

DEADLINE_S = 60.0
"""Far beyond what any of them takes to come."""


class Table:
    """Where they meet."""

    def __init__(self, world_size: int) -> None:
        self._barrier = threading.Barrier(world_size, timeout=DEADLINE_S)
        self._brought: list[object] = [None] * world_size

    def gather(self, rank: int, value: object) -> list:
        self._brought[rank] = value
        self._barrier.wait()
        gathered = list(self._brought)
        self._barrier.wait()
        return gathered


@dataclass(frozen=True)
class ThreadRank(Ranks):
    """One of them; the only one by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    table: Table = field(default_factory=lambda: Table(1))

    def gather(self, value: object) -> list:
        return self.table.gather(self.rank, value)

    def broadcast(self, value: object) -> object:
        return self.gather(value)[0]

    def largest(self, value: int) -> int:
        return max(self.gather(value))


def on_ranks(world_size: int, work: Callable[[ThreadRank], object]) -> list:
    """What each of several ranks returns."""
    table = Table(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [ThreadRank(rank, world_size, table=table) for rank in range(world_size)]
        return list(pool.map(work, ranks))
