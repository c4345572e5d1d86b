"""Ranks: who am I, and the few things that all ranks say together.

One process is the ordinary case: the same calls work without a launcher. Nothing here knows
about models or DeepSpeed.
"""

import datetime
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from rlp.terminal import INTERRUPTED, accept_any_text


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
        return bool(self.largest(int(claim)))

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        vote = torch.tensor(value, device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return int(vote.item())

    def word(self, topic: str) -> str:
        """A name for something to leave word of, not used before; the same on every rank that has asked as often."""
        return f"{topic}/{next(_topics)}"

    def words(self) -> "Words":
        """Word between ranks, for one thread."""
        return Words(self.store)


_topics = itertools.count()


class Words:
    """What ranks tell each other without waiting for each other, from threads that must go on when the main thread does not."""

    def __init__(self, store: dist.Store | None) -> None:
        # A connection of its own: that of the main thread is locked while it waits for something.
        self._store = store.clone() if store is not None else None

    def leave(self, word: str) -> bool:
        """Leave word for every rank; True."""
        if self._store is not None:
            try:
                self._store.set(word, "")
            except RuntimeError:
                self._store = None  # the rank that keeps the store is gone, and with it the run
        return True

    def has(self, word: str) -> bool:
        """Whether some rank has left this word."""
        try:
            return self._store is not None and self._store.check([word])
        except RuntimeError:
            self._store = None
            return False


def start_ranks(timeout_s: float = 0) -> Ranks:
    """Join the process group that the launcher describes, or form one of a single process.

    Args:
        timeout_s: how long to wait for the others, one of which may have died on its way; 0: as long as torch does.

    Raises:
        dist.DistError: they did not all come.
    """
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
    store = None
    if not dist.is_initialized():
        store = dist.HashStore() if alone else next(dist.rendezvous("env://", **({"timeout": datetime.timedelta(seconds=timeout_s)} if timeout_s else {})))[0]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Ranks(rank=rank, world_size=world_size, device=device, store=None if alone else store)


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def run_as_process(main: Callable[[], int]) -> NoReturn:
    """Run a program and end the process with its exit code, whatever the other ranks do.

    Python's own way out runs the destructors of process groups, which wait for ranks that may be gone.
    """
    code = 1
    accept_any_text()
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
