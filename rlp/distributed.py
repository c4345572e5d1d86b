"""Ranks: who am I, and the few things that all ranks say together.

One process is the ordinary case: the same calls work without a launcher. Nothing here knows
about models or DeepSpeed.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The rank that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum of each number over the ranks, in float64 and in rank order, so equal on every rank."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)))]

    def gather(self, value: object) -> list:
        """One object from each rank, in rank order, on every rank. Also a barrier."""
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: object) -> object:
        """Rank 0's object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, claim: bool) -> bool:
        """True on every rank where it is true on one."""
        vote = torch.tensor(int(claim), device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())


def start_ranks() -> Ranks:
    """Join the process group that the launcher describes, or form one of a single process."""
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    alone = "WORLD_SIZE" not in os.environ
    if alone:
        # DeepSpeed looks for these, and without them searches for MPI.
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
            os.environ.setdefault(name, value)
    rank, local_rank, world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(backend, **store)
    return Ranks(rank=rank, world_size=world_size, device=device)


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
