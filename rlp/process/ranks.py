"""Ranks: who am I, and the few things that all ranks say together.

One process is the ordinary case: the same calls work without a launcher. Nothing here knows
about models or DeepSpeed.
"""

import datetime
import itertools
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from rlp.process.machine import usable_cores
from rlp.process.poller import Poller


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None
    """Where the ranks have met; None where there is no other rank to leave word for."""

    @property
    def is_first(self) -> bool:
        """The rank that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum of each number over the ranks, in float64 and in rank order, so equal on every
        rank."""
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
        return bool(self.largest(int(claim)))

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        vote = torch.tensor(value, device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return int(vote.item())

    def words(self, topic: str) -> "Words":
        """Word between ranks about something; every rank asks for the same topics in the same
        order."""
        return Words(self.store, f"{topic}/{next(_topics)}")


_topics = itertools.count()

LISTEN_S = 0.25
"""How often ranks listen for word of each other."""


class Words:
    """What ranks tell each other without waiting for each other, for threads that must go on when
    the main thread does not.

    A thread of its own talks to the store: the rank that keeps the store may be stopped, and then
    whoever asks it waits.
    """

    def __init__(self, store: dist.Store | None, word: str) -> None:
        self._store, self._word = store, word
        self._leaving = False
        self.heard = False
        """Whether some rank has left word."""
        self._poller = Poller(f"words {word}", LISTEN_S, self._talk) if store is not None else None

    def leave(self) -> None:
        """Leave word for every rank, as soon as the store takes it."""
        if self._poller is not None and not self._leaving:
            self._leaving = True
            self._poller.wake()

    def close(self) -> None:
        """Neither tell nor listen any more."""
        if self._poller is not None:
            self._poller.close(LISTEN_S)

    def _talk(self, polls: Iterator[bytes]) -> None:
        # RuntimeError: the rank that keeps the store is gone, and with it the run.
        with suppress(RuntimeError):
            # A connection of its own: that of the main thread is locked while it waits for
            # something.
            store, told = self._store.clone(), False
            for _ in polls:
                if self._leaving and not told:
                    store.set(self._word, "")
                    told = True
                self.heard = self.heard or store.check([self._word])


class PeerLost(Exception):
    """Another rank ended, or did not come, and this one can not go on."""


def short_cause(error: Exception) -> str:
    """The beginning of what a collective says that has failed, on one line."""
    return " ".join(str(error).split())[:160]


COLLECTIVES_S = 300.0
"""A collective waits so much longer than the watchdog, which says more of a stall than a time-out
does."""


def share_cores() -> None:
    """Let torch use the cores that are this rank's, where `OMP_NUM_THREADS` does not say how many:
    an equal part of those that its machine, or container, has for all ranks on it."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // ranks_of_this_machine()))


def ranks_of_this_machine() -> int:
    """As torchrun says, or DeepSpeed's launcher; one without a launcher."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
"""What a launcher would say of a single process. DeepSpeed looks for it, and without it searches
for MPI."""


def start_ranks(watchdog_s: float = 0) -> Ranks:
    """Join the process group that the launcher describes, or form one of a single process.

    Args:
        watchdog_s: `run.watchdog_s`. So long the others are waited for, one of which may have died
            on its way; a collective waits longer, in this group and in all that are made later. 0:
            both wait as long as torch does.

    Raises:
        PeerLost: they did not all come.
    """
    share_cores()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    store = None
    if not dist.is_initialized():
        try:
            store = _join(rank, world_size, device, watchdog_s)
        except RuntimeError as error:
            raise PeerLost(
                f"rank {rank} of {world_size}: the ranks did not all come together at"
                f" {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({short_cause(error)})."
                " One of them has ended before, or can not reach that address. Nothing was written."
                " Start the run again."
            ) from error
    return Ranks(rank, world_size, device, store if world_size > 1 else None)


def _join(rank: int, world_size: int, device: torch.device, watchdog_s: float) -> dist.Store:
    """Form the process group; the store where all ranks have met."""
    # A single rank needs no port to meet at, which another run on the machine may have.
    store = dist.HashStore() if world_size == 1 else _meet(watchdog_s)
    _wait_longer_than(watchdog_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return store


def _meet(limit_s: float) -> dist.Store:
    """The store where all ranks meet."""
    limit = {"timeout": datetime.timedelta(seconds=limit_s)} if limit_s else {}
    return next(dist.rendezvous("env://", **limit))[0]


def _wait_longer_than(watchdog_s: float) -> None:
    """Let collectives wait longer than the watchdog, in every process group that is made from here
    on.

    DeepSpeed makes groups of its own and gives none a limit: they have torch's default of the
    backend, 10 minutes for NCCL.
    """
    if watchdog_s:
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            before = getattr(distributed_c10d, name)  # None without NCCL
            wanted = datetime.timedelta(seconds=watchdog_s + COLLECTIVES_S)
            setattr(distributed_c10d, name, before and max(before, wanted))


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
