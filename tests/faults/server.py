"""Starts runs without starting Python: this process imports everything once, and forks each rank.

    python server.py MODEL [PROGRAM MODULE...]
                                one JSON job a line on stdin, one JSON answer a line on stdout

PROGRAM is the module whose `main` each rank is (train), MODULE what else is imported before.

An import of torch, transformers and deepspeed takes 8 s of a core; a fork takes a hundredth of one.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}

PR_SET_CHILD_SUBREAPER = 36

PRELOADED = (
    "train",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.integrations.deepspeed",
    "scipy.stats",
)
"""What a run imports late; a rank inherits it."""


LOOK_S = 0.1
"""How often the server looks at its ranks; that a process stops wakes nobody."""


LEFT_S = 20.0
"""How long a process may outlive the rank that started it."""


class Ranks:
    """The ranks of one job, or of two in the same run folder."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        """By rank; those of a second job follow those of the first."""
        self.stopped: dict[int, float] = {}
        """When a rank was seen to be stopped."""

    def start(
        self,
        arguments: list[str],
        environment: dict[str, str],
        world_size: int,
        log: str,
        record: int | None = None,
    ) -> None:
        """Fork the ranks of a job.

        Args:
            record: they know their ancestors from their first line on, and tell this pipe so.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        distributed = (
            {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if world_size > 1
            else {}
        )
        for rank in range(world_size):
            own = environment | distributed | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.pids.append(
                _fork(lambda own=own: _run(arguments, own, record), f"{log}.rank{rank}")
            )

    def alive(self) -> list[int]:
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def look(self, now: float) -> None:
        """Take note of who has ended, and who was stopped."""
        for rank in self.alive():
            try:
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                continue  # a child of its launcher as yet
            if pid and os.WIFSTOPPED(status):
                self.stopped[rank] = now
            elif pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)

    def signal(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def wake(self, now: float, wake_s: float | None) -> None:
        """Continue who was stopped for so long; None: when all others have ended."""
        alone = len(self.alive()) == len(self.stopped)
        for rank, since in list(self.stopped.items()):
            if alone if wake_s is None else now - since >= wake_s:
                self.signal(signal.SIGCONT, [rank])
                del self.stopped[rank]


@dataclass
class Job:
    """Ranks of `train.py` to be run, and what happens to them."""

    arguments: list[str]
    environment: dict[str, str]
    world_size: int
    log: str
    """Each rank's output goes to LOG.rankN."""
    limit_s: float
    """After which the rest is killed; its stacks are in the logs."""
    kill: tuple[int, float] | None
    """Rank and seconds after the start, of a SIGKILL."""
    wake_s: float | None
    """A rank that has stopped itself is continued so long after it; None: when all others have
    ended."""
    launcher_s: float | None
    """The ranks have a launcher, which is killed so long after they have taken note of it."""
    twin_s: float | None
    """So long after the first a second job starts in the same run folder; its output goes to
    LOG.twin.rankN."""


def run_ranks(job: Job) -> dict:
    """Run `train.py` as ranks, and wait until all have ended.

    Returns:
        exit codes by rank (-9: killed by SIGKILL), those of the second job, how many processes are
            left behind, whether the limit was met, and seconds: of all, from the first end to
        the last, and of processor time.
    """
    what = (job.arguments, job.environment, job.world_size)
    started, cpu = time.monotonic(), _children_cpu_s()
    ranks, launcher = Ranks(), None
    if job.launcher_s is None:
        ranks.start(*what, job.log)
    else:
        launcher = _launch(ranks, *what, job.log)
        job.launcher_s += time.monotonic() - started
    first_end, hung, elapsed = None, False, 0.0
    while ranks.alive() or job.twin_s is not None:
        elapsed = time.monotonic() - started
        if job.twin_s is not None and (elapsed >= job.twin_s or not ranks.alive()):
            ranks.start(*what, f"{job.log}.twin")
            job.twin_s = None
        ranks.look(elapsed)
        first_end = elapsed if ranks.codes and first_end is None else first_end
        alive = ranks.alive()
        ranks.wake(elapsed, job.wake_s)
        if job.kill and elapsed >= job.kill[1]:
            ranks.signal(signal.SIGKILL, [job.kill[0]] if job.kill[0] in alive else [])
            job.kill = None
        if launcher is not None and elapsed >= job.launcher_s:
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            launcher = None
        if alive and elapsed >= job.limit_s:
            ranks.signal(signal.SIGKILL if hung else signal.SIGUSR2, alive)
            hung, job.limit_s = True, job.limit_s + (60 if hung else 2)
        if launcher is None:
            _wait_for_an_end([ranks.pids[rank] for rank in alive])
        else:
            # It does not wait for its ranks: one that has ended would be seen to end forever.
            time.sleep(LOOK_S)
    codes = [ranks.codes[rank] for rank in range(len(ranks.pids))]
    return {
        "codes": codes[: job.world_size],
        "twin_codes": codes[job.world_size :],
        "hung": hung,
        "seconds": elapsed,
        "survivor_s": elapsed - first_end,
        "cpu_s": _children_cpu_s() - cpu,
        "left": _left_behind(),
    }


def _left_behind() -> int:
    """Processes that outlive the ranks which started them; waits a while for those that are about
    to end."""
    end = time.monotonic() + LEFT_S
    try:
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(LOOK_S / 10)
    except ChildProcessError:
        return 0
    return len(psutil.Process().children())


def _wait_for_an_end(pids: list[int]) -> None:
    """Until one of the processes has ended, or `LOOK_S`."""
    handles = []
    try:
        for pid in pids:
            handles.append(os.pidfd_open(pid))
        select.select(handles, [], [], LOOK_S)
    except ProcessLookupError:
        pass  # it has ended, and was not waited for by its launcher
    finally:
        for handle in handles:
            os.close(handle)


def _launch(
    ranks: Ranks, arguments: list[str], environment: dict[str, str], world_size: int, log: str
) -> int:
    """Start the ranks below a launcher; its process id, once they all know theirs."""
    reader, writer = os.pipe()

    def launcher() -> int:
        own = Ranks()
        own.start(
            arguments,
            environment | {"TORCHELASTIC_RUN_ID": "campaign"},
            world_size,
            log,
            record=writer,
        )
        os.write(writer, json.dumps(own.pids).encode() + b"\n")
        while True:
            signal.pause()

    pid = _fork(launcher, f"{log}.launcher")
    os.close(writer)
    with os.fdopen(reader) as told:
        lines = [json.loads(told.readline()) for _ in range(world_size + 1)]
    ranks.pids = next(line for line in lines if isinstance(line, list))
    return pid


def _run(arguments: list[str], environment: dict[str, str], record: int | None) -> int:
    """What a rank does."""
    os.environ |= environment
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if record is not None:
        importlib.import_module("rlp.process.launcher").watch_from_the_start()
        os.write(record, b"0\n")
        os.close(record)
    return importlib.import_module(PROGRAM).main(arguments)


PROGRAM = sys.argv[2] if len(sys.argv) > 2 else "train"


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _fork(act: Callable[[], int], log: str) -> int:
    """The id of a new process, which ends with the code that `act` returns."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = act()
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    ctypes.CDLL(None).prctl(
        PR_SET_CHILD_SUBREAPER, 1
    )  # ranks whose launcher is killed become children of this process
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(REPOSITORY))
    for name in (*PRELOADED, *sys.argv[3:]):
        importlib.import_module(name)
    importlib.import_module("rlp.run.ending").write_report = lambda runs, path: (
        importlib.import_module("rlp.process.files").write_atomically(
            path, b"", point="report.torn_page"
        )
    )  # half of a tiny run's time, and not at stake
    importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(
        sys.argv[1]
    )  # compiles a thousand regular expressions
    gc.freeze()  # the collector touches every object, and a fork would copy them all
    for line in sys.stdin:
        print(json.dumps(run_ranks(Job(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
