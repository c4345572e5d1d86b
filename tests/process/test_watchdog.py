"""A run that hangs shows where; what is merely long is no stall; nobody is left behind."""

import gzip
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock

import rlp.process.preemption
import rlp.process.watchdog
import rlp.run.checks
from rlp.config import RunConfig
from rlp.data import lines, unpacked
from rlp.process.exit_codes import DONE, PEER_LOST, STALLED
from rlp.process.faults import VARIABLE, forget_passages
from rlp.process.progress import Progress
from rlp.process.ranks import COLLECTIVES_S
from rlp.process.watchdog import Watchdog
from tests import REPOSITORY
from tests.faults.harness import LIMIT_S, SETTINGS
from tests.process.stopping import wait_for
from tests.training import open_run, tiny_config, train


def test_a_stalled_rank_shows_every_stack_and_the_run_ends(harness):
    """Rank 1 sleeps in a backward; rank 0 waits for it in a collective. Both show where, and what
    they were doing."""
    answer = harness.start(
        harness.folder / "stalled",
        ranks=2,
        fault="backward:3:stall@rank1",
        settings={"run.watchdog_s": 8},
    )
    assert answer["codes"] == [STALLED, STALLED] and not answer["hung"], answer["text"]
    for rank in (0, 1):
        for text in (
            (harness.folder / f"stalled.log.rank{rank}").read_text(),
            (harness.folder / "stalled" / "logs" / f"rank_{rank}.log").read_text(),
        ):
            assert re.search(rf"rank {rank} of 2: .*train.*its threads:", text)
            assert "Thread 0x" in text and "in train_step" in text
    assert "in fault" in (harness.folder / "stalled.log.rank1").read_text()


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_was_stopped_for_too_long_says_so_when_it_wakes(harness, stopped):
    """Its peer shows what it waited in, and ends; whichever of the two keeps the store where ranks
    meet."""
    name = f"stopped_{stopped}"
    answer = harness.start(
        harness.folder / name,
        ranks=2,
        fault=f"backward:3:stop@rank{stopped}",
        settings={"run.watchdog_s": 10},
    )
    said = [(harness.folder / f"{name}.log.rank{rank}").read_text() for rank in (0, 1)]
    assert answer["codes"][1 - stopped] == STALLED and answer["codes"][stopped] == PEER_LOST, (
        answer["text"]
    )
    assert re.search(
        rf"rank {1 - stopped} of 2: no progress for \d+ s in train .*its threads:",
        said[1 - stopped],
    )
    assert re.search(
        r"This process stood still for \d+ s .*, longer than run.watchdog_s=10: the others have"
        r" waited .*run.resume=auto",
        said[stopped],
    )
    assert "Traceback" not in answer["text"]


def test_a_run_of_one_process_that_is_stopped_and_continued_goes_on(harness):
    """Ctrl-Z and `fg`, more than twice as long as the watchdog waits, twice."""
    answer = harness.start(
        harness.folder / "continued",
        fault="backward:3:stop,score:9:stop",
        settings={"run.watchdog_s": 5},
        wake_s=12,
    )
    assert answer["codes"] == [DONE], answer["text"]
    assert (harness.folder / "continued" / "journal.jsonl").read_bytes() == (
        harness.reference(1, {}) / "journal.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    "looks, silent, stood",
    [
        ([(1, 0), (1, 0)], 2, 0),  # nothing is marked
        ([(1, 0), (60, 0)], 2, 59),  # stopped for 59 s between two looks
        ([(1, 0), (60, 55)], 61, 0),  # busy with something that holds Python's lock
        ([(2, 0), (2, 0)], 4, 0),  # looks are late on a busy machine
    ],
)
def test_time_in_which_the_process_stands_still_is_no_stall(
    tmp_path, ranks, monkeypatch, looks, silent, stood
):
    """Of each look: seconds since the last, and of a processor."""
    watchdog, now, used = Watchdog(ranks, RunConfig(dir=str(tmp_path), watchdog_s=100)), 0.0, 0.0
    watchdog.mark()
    for passed, worked in [(0, 0), *looks]:
        now, used = now + passed, used + worked
        monkeypatch.setattr(rlp.process.watchdog.time, "monotonic", lambda now=now: now)
        monkeypatch.setattr(rlp.process.watchdog.time, "process_time", lambda used=used: used)
        watchdog._look()
    assert (watchdog._silent_s, watchdog._stood_still_s) == (silent, stood)


def looked(watchdog: Watchdog) -> None:
    """Wait until the watchdog has seen what was marked so far."""
    wait_for(lambda: watchdog._marks_seen == watchdog._marks)


@pytest.fixture
def bark(monkeypatch) -> list[int]:
    """Exit codes with which a watchdog would have ended this process."""
    ended = []
    monkeypatch.setattr(rlp.process.watchdog.os, "_exit", ended.append)
    return ended


class StopHere(Exception):
    """A test has seen enough."""


def stop_here(*_: object) -> None:
    raise StopHere


def test_unpacking_and_finding_lines_for_longer_than_the_watchdog_waits_is_no_stall(
    tmp_path, model_folder, ranks, bark, monkeypatch
):
    """Four times as long, piece by piece, with the watchdog looking at each."""
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "w1 w2 w3 w4 w5 w6 w7 w8"}\n' * 20))
    config = tiny_config(tmp_path / "run", model_folder, packed, run__watchdog_s=1)
    monkeypatch.setattr(unpacked, "UNPACKED", tmp_path / "unpacked")
    with Watchdog(ranks, config.run) as watchdog:

        def slowly(path, plain):
            with gzip.open(path) as file:
                for line in file:
                    plain.write(line)
                    looked(watchdog)

        def lines_slowly(file, found):
            for _ in range(8):
                found.advance(0)
                looked(watchdog)
            return ends(file, found)

        ends = lines.line_ends
        monkeypatch.setitem(unpacked.UNPACKERS, ".gz", slowly)
        monkeypatch.setattr(lines, "line_ends", lines_slowly)
        monkeypatch.setattr(
            watchdog, "working", lambda phase: nullcontext()
        )  # pieces alone are to count
        monkeypatch.setattr(rlp.run.checks, "choose_layout", stop_here)  # what comes after the data
        with pytest.raises(StopHere):
            open_run(config, ranks, watchdog=watchdog)
    assert not bark


def test_a_rank_that_waits_for_another_to_unpack_counts_what_that_one_writes(tmp_path, monkeypatch):
    """And goes on with the file when the other has it."""
    monkeypatch.setattr(unpacked, "UNPACKED", tmp_path)
    monkeypatch.setattr(unpacked, "LOOK_S", 0.02)
    moved, name = [], "x"
    with FileLock(tmp_path / "x.lock") as held:

        def grow(amount):
            moved.append(amount)
            (tmp_path / f"{name}.1.partial").write_bytes(b"." * 100 * (1 + len(moved)))
            if len(moved) == 3:
                held.release(force=True)

        (tmp_path / f"{name}.1.partial").write_bytes(b"." * 100)
        with unpacked.waited_for(
            FileLock(tmp_path / "x.lock"),
            Path("corpus.gz"),
            "x.*.partial",
            lambda *what: Moved(grow),
        ):
            assert moved == [100, 100, 100]


class Moved(Progress):
    """Tells a test what was done."""

    def __init__(self, grow):
        super().__init__("")
        self.advance = grow


def test_what_a_library_computes_or_reads_is_progress_while_it_works(tmp_path, ranks, bark):
    """Nothing else marks anything then; a library that only waits has stalled."""
    with Watchdog(ranks, RunConfig(dir=str(tmp_path), watchdog_s=1)) as watchdog:
        with watchdog.working("model"):
            begun = time.process_time()
            while time.process_time() - begun < 3:
                pass
            assert not bark
            wait_for(lambda: bark)
    assert set(bark) == {STALLED}


ENDINGS = """
import ctypes, datetime, json, os, sys, time
import torch.distributed as dist
from torch.distributed import distributed_c10d
from rlp.config import RunConfig
from rlp.process.command import run_as_process
from rlp.process.ranks import start_ranks
from rlp.process.watchdog import Watchdog

def hold_the_lock():
    sleep = ctypes.PyDLL(None).usleep
    with Watchdog(ranks, RunConfig(dir=sys.argv[1], watchdog_s=2)) as watchdog:
        sys.setswitchinterval(3600)  # from here on no other thread runs that this one does not let
        watchdog.mark()
        while True:
            sleep(10_000_000)

distributed_c10d.default_pg_nccl_timeout = datetime.timedelta(minutes=10)
ranks = start_ranks(watchdog_s=2000)
limits = [
    group._get_backend(ranks.device).options._timeout.total_seconds()
    for group in (dist.group.WORLD, dist.new_group([0]))
]
limits.append(distributed_c10d.default_pg_nccl_timeout.total_seconds())

endings = {
    "held": hold_the_lock,
    "3": lambda: 3,
    "2": lambda: sys.exit(2),
    "no": lambda: sys.exit("no"),
    "error": lambda: 1 / 0,
}
codes = {}
for name, ending in endings.items():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.path.join(sys.argv[1], name), os.O_WRONLY | os.O_CREAT), 2)
        run_as_process(ending)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
print(json.dumps(limits))
"""
"""Children of a small process: a test process that has run much may be too large to fork."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory) -> tuple[dict[str, int], Path, list[float]]:
    """Exit codes of `ENDINGS` by name, the folder of what each wrote to stderr, and how long
    collectives wait, in seconds."""
    folder = tmp_path_factory.mktemp("endings")
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS, str(folder)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=LIMIT_S,
        check=True,
    )
    codes, limits = map(json.loads, done.stdout.splitlines()[-2:])
    return codes, folder, limits


def test_a_stall_that_holds_pythons_lock_is_shown_too(endings):
    """The watchdog's own thread can not run then: the process beside it shows the stacks, and ends
    it."""
    codes, folder, _ = endings
    assert codes["held"] == -signal.SIGKILL
    said = (folder / "held").read_text()
    assert "no thread of it has run Python for" in said and "in hold_the_lock" in said


def test_collectives_wait_longer_than_the_watchdog(endings):
    """In the group of all ranks, in one that is made later as DeepSpeed makes its own, and under
    NCCL, whose default is 10 minutes."""
    assert endings[2] == [2000 + COLLECTIVES_S] * 3


def test_a_rank_that_loses_another_says_so_in_one_line(harness):
    """No traceback on the screen, no wait, and an exit code of its own; the traceback is in its
    log."""
    answer = harness.start(harness.folder / "lost", ranks=2, fault="backward:3:exit@rank1")
    assert (
        answer["codes"] == [PEER_LOST, 9] and answer["survivor_s"] < SETTINGS["run.watchdog_s"]
    ), answer["text"]
    said = (harness.folder / "lost.log.rank0").read_text()
    assert "error: rank 0 of 2 lost another rank while in " in said and "run.resume=auto" in said
    assert "Traceback" not in said
    assert "Traceback" in (harness.folder / "lost" / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize("name, code", [("3", 3), ("2", 2), ("no", 1), ("error", 1)])
def test_a_process_ends_with_the_code_of_its_program(endings, name, code):
    """Without Python's own way out, which could wait for ranks that are gone; an error nobody
    caught is 1."""
    assert endings[0][name] == code


def test_an_error_that_is_no_lost_peer_is_not_called_one(
    tmp_path, model_folder, corpus, ranks, monkeypatch
):
    monkeypatch.setenv(VARIABLE, "backward:1:raise")
    forget_passages()
    with pytest.raises(RuntimeError, match="fault at backward"):
        train(tiny_config(tmp_path / "run", model_folder, corpus), ranks)
