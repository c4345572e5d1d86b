"""Starts runs without starting Python: this process imports everything once, and forks each rank.

    python server.py MODEL      one JSON job a line on stdin, one JSON answer a line on stdout

An import of torch, transformers and deepspeed takes 8 s of a core; a fork takes a hundredth of one.
"""

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
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}

PRELOADED = ("train", "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "transformers.models.qwen3.modeling_qwen3", "transformers.integrations.deepspeed", "scipy.stats")
"""What a run imports late; a rank inherits it."""


LOOK_S = 0.1


def run_ranks(arguments: list[str], environment: dict[str, str], world_size: int, log: str, limit_s: float, kill: tuple[int, float] | None, wake_s: float | None) -> dict:
    """Run `train.py` as ranks, and wait until all have ended.

    Args:
        log: each rank's output goes to LOG.rankN.
        limit_s: after which the rest is killed; its stacks are in the logs.
        kill: rank and seconds after the start, of a SIGKILL.
        wake_s: a rank that has stopped itself is continued so long after it; None: when all others have ended.

    Returns:
        exit codes by rank (-9: killed by SIGKILL), whether the limit was met, and seconds: of all, from the first end to the last, and of
        processor time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    distributed = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world_size > 1 else {}
    started, cpu = time.monotonic(), _children_cpu_s()
    pids = [_fork(arguments, environment | distributed | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, f"{log}.rank{rank}") for rank in range(world_size)]
    handles = [os.pidfd_open(pid) for pid in pids]
    codes: dict[int, int] = {}
    stopped: dict[int, float] = {}
    first_end, hung = None, False
    while len(codes) < world_size:
        elapsed = time.monotonic() - started
        due = min([limit_s] + ([kill[1]] if kill else []))
        # That a process stops wakes nobody.
        select.select([handle for rank, handle in enumerate(handles) if rank not in codes], [], [], min(LOOK_S, max(0.0, due - elapsed)))
        elapsed = time.monotonic() - started
        for rank, (pid, handle) in enumerate(zip(pids, handles)):
            if rank in codes or not (status := os.waitpid(pid, os.WNOHANG | os.WUNTRACED))[0]:
                continue
            if os.WIFSTOPPED(status[1]):
                stopped[rank] = elapsed
                continue
            codes[rank] = os.waitstatus_to_exitcode(status[1])
            os.close(handle)
            first_end = elapsed if first_end is None else first_end
        alive = [pid for rank, pid in enumerate(pids) if rank not in codes]
        for rank in [rank for rank, since in stopped.items() if (elapsed - since >= wake_s if wake_s is not None else len(alive) == len(stopped))]:
            os.kill(pids[rank], signal.SIGCONT)
            del stopped[rank]
        if kill and elapsed >= kill[1]:
            if kill[0] not in codes:
                os.kill(pids[kill[0]], signal.SIGKILL)
            kill = None
        if alive and elapsed >= limit_s:
            if not hung:
                hung, limit_s = True, limit_s + 2
                for pid in alive:
                    os.kill(pid, signal.SIGUSR2)
            else:
                limit_s += 60
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
    return {"codes": [codes[rank] for rank in range(world_size)], "hung": hung, "seconds": elapsed, "survivor_s": elapsed - first_end, "cpu_s": _children_cpu_s() - cpu}


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _fork(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """The process id of a new rank."""
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
        os.environ |= environment
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        code = importlib.import_module("train").main(arguments)
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
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(REPOSITORY))
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("rlp.run").write_report = lambda runs, path: importlib.import_module("rlp.files").write_atomically(path, b"", point="report.torn_page")  # half of a tiny run's time, and not at stake
    importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(sys.argv[1])  # compiles a thousand regular expressions
    gc.freeze()  # the collector touches every object, and a fork would copy them all
    for line in sys.stdin:
        print(json.dumps(run_ranks(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
