"""A run that is asked to stop saves and says so; one that hangs shows where; none leaves a process
behind."""

import datetime
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

import rlp.checks
import rlp.process.preemption
import rlp.process.watchdog
import train as program
from rlp.config import ConfigError, RunConfig, parse_moment
from rlp.data import lines, unpacked
from rlp.process.faults import VARIABLE, forget_passages
from rlp.process.launcher import LAUNCHER_GONE
from rlp.process.preemption import SAME_KEYPRESS_S, SIGNALS, Deadline, Preemption, steady_time
from rlp.process.progress import Progress
from rlp.process.ranks import COLLECTIVES_S
from rlp.process.watchdog import STALLED, Watchdog
from rlp.trainer import Run
from tests import REPOSITORY
from tests.faults.harness import LIMIT_S, SETTINGS, Attempt
from tests.training import TINY, read_lines, tiny_config


@pytest.fixture(autouse=True)
def handlers():
    """A run that was asked to stop ignores signals on its way out; the tests have their own
    back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stops(harness, name: str, fault: str, *, ranks: int = 1, settings: dict | None = None) -> dict:
    """The answer of a run that ends with exit code 75 on every rank."""
    answer = harness.start(harness.folder / name, ranks=ranks, fault=fault, settings=settings)
    assert answer["codes"] == [program.PREEMPTED] * ranks, answer["text"]
    assert "run.resume=auto" in answer["text"]
    return answer


def assert_continues_as_if_nothing_had_been(harness, name: str, *, ranks: int = 1) -> None:
    """Continued, the run leaves what an uninterrupted one leaves, byte for byte."""
    from tests.faults.harness import SAME_BYTES

    answer = harness.start(harness.folder / name, ranks=ranks)
    assert answer["codes"] == [program.DONE] * ranks, answer["text"]
    for file in SAME_BYTES:
        assert (harness.folder / name / file).read_bytes() == (
            harness.reference(ranks, {}) / file
        ).read_bytes(), file


def test_sigterm_loses_no_step_wherever_it_comes(harness):
    """Before thoughts are sampled, between micro-batches, in a save, in the last evaluation: saved
    as after the last whole step."""
    folder = harness.folder / "asked"
    for fault, step in (
        ("rollout:4:term", 2),
        ("backward:3:term", 2),
        ("save.before_meta:1:term", 4),
        ("evaluation:1:term", 6),
    ):
        text = stops(harness, "asked", fault)["text"]
        assert (
            f"step {step} is saved" in text
            and (folder / "checkpoints" / f"step_{step}" / "COMPLETE").exists()
        ), text
    assert_continues_as_if_nothing_had_been(harness, "asked")


def test_an_evaluation_that_was_stopped_is_made_when_the_run_continues(harness):
    """Before the first step, and in the middle of the run."""
    stops(harness, "evaluation", "evaluation:1:term")
    stops(harness, "evaluation", "evaluation:2:term")
    assert_continues_as_if_nothing_had_been(harness, "evaluation")


def test_a_signal_to_one_rank_stops_both_in_the_middle_of_long_thoughts(harness):
    """The rank that was not signalled would think for minutes: it hears of it and leaves off."""
    endless = {
        "thought.max_thought_tokens": 30_000,
        "thought.close_marker": "w1 w2 w3 w4 w5 w6 w7",
        "data.held_out": "[]",
        "evaluation.every_n_steps": 0,
    }
    answer = stops(harness, "one_rank", "rollout:1:term@rank1", ranks=2, settings=endless)
    assert (
        "asked to stop (SIGTERM): step 0 is saved; the step begun after it is not counted"
        in answer["text"]
    )


def test_a_rank_that_leaves_before_its_first_forward_leaves_nobody_waiting(harness):
    """Sharded weights are gathered for sampling; what one rank runs there is no other rank's
    business."""
    stops(
        harness,
        "first_forward",
        "evaluation:1:term@rank0",
        ranks=2,
        settings={"engine.zero_stage": 3},
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks(ranks, number):
    signal.signal(number, signal.SIG_DFL)
    with Preemption(ranks) as preemption:
        signal.raise_signal(number)
        assert preemption.reason == number.name


def test_a_hangup_that_was_ignored_at_the_start_stays_ignored(ranks):
    """As `nohup` has it: the terminal may go."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Preemption(ranks) as preemption:
        signal.raise_signal(signal.SIGHUP)
        assert not preemption.requested


def test_a_second_interrupt_ends_the_process_at_once(ranks, monkeypatch, capfd):
    """With a message, and from a thread: the main one may hang in a collective. The same keypress
    passed on by a launcher is not a second."""
    ended, now = [], [100.0]
    monkeypatch.setattr(rlp.process.preemption.os, "_exit", ended.append)
    monkeypatch.setattr(rlp.process.preemption.time, "monotonic", lambda: now[0])
    looks = Looks()
    with Preemption(ranks) as preemption:
        preemption._launchers = looks
        for later_s in (0.0, SAME_KEYPRESS_S):
            now[0] += later_s
            signal.raise_signal(signal.SIGINT)
            looks.wait()
        assert preemption.requested and not ended
        now[0] += 0.1
        signal.raise_signal(signal.SIGINT)
        looks.wait()
    assert ended == [rlp.process.preemption.INTERRUPTED]
    assert "Ctrl-C again" in (said := capfd.readouterr().err) and "interrupted twice" in said


class Looks:
    """In place of launchers: how often the thread has looked for them."""

    handed_over = True

    def __init__(self) -> None:
        self._seen = threading.Semaphore(0)

    def gone(self) -> None:
        self._seen.release()

    def wait(self) -> None:
        """Until all that was sent to the thread before has been dealt with: the look that goes on
        meanwhile, and a whole one."""
        while self._seen.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._seen.acquire(timeout=LIMIT_S)


def wait_for(holds, limit_s: float = LIMIT_S) -> None:
    """Until it holds."""
    end = steady_time() + limit_s
    while not holds():
        assert steady_time() < end, "waited in vain"
        time.sleep(0.05)


def test_the_run_stops_when_its_time_is_over(
    tmp_path, model_folder, corpus, ranks, monkeypatch, capsys
):
    """`checkpoint.save_by` is reached in step 3: it is given up, and step 2 is saved."""
    step, steady = program.train_step, rlp.process.preemption.steady_time

    def until_time_is_over(run):
        if run.step == 3:
            monkeypatch.setattr(rlp.process.preemption, "steady_time", lambda: steady() + 360_000)
            wait_for(lambda: run.preemption.requested)
        step(run)

    monkeypatch.setattr(program, "train_step", until_time_is_over)
    config = tiny_config(
        tmp_path / "run",
        model_folder,
        corpus,
        budget__steps=9,
        checkpoint__save_by=360_000,
        checkpoint__every_n_steps=0,
    )
    assert program.train(config, ranks) == program.PREEMPTED
    assert (
        "asked to stop (checkpoint.save_by 360000 is reached): step 2 is saved"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "COMPLETE").exists()


@pytest.mark.parametrize(
    "save_by, steady, wall, come",
    [
        ("01:00:00", 3599, 3599, False),
        ("01:00:00", 3600, 3600, True),
        ("01:00:00", 3600, 3600 - 86_400, True),
        (
            "01:00:00",
            3599,
            3599 + 86_400,
            False,
        ),  # set back; set forward: a duration is one all the same
        ("1970-01-02T01:00Z", 3599, 3599, False),
        ("1970-01-02T01:00Z", 3600, 3600, True),
        ("1970-01-02T01:00Z", 3600, 0, True),  # set back after the start: not missed
        ("1970-01-02T01:00Z", 60, 3600, True),  # set forward: it is that time
    ],
)
def test_a_clock_that_is_set_misses_no_deadline(monkeypatch, save_by, steady, wall, come):
    """Seconds after a start at midnight of 2 January 1970, on the clock that nobody sets and on the
    one on the wall."""
    monkeypatch.setattr(rlp.process.preemption.time, "time", lambda: 86_400.0)
    monkeypatch.setattr(rlp.process.preemption, "steady_time", lambda: 7.0)
    deadline = Deadline(save_by)
    monkeypatch.setattr(rlp.process.preemption.time, "time", lambda: 86_400.0 + wall)
    monkeypatch.setattr(rlp.process.preemption, "steady_time", lambda: 7.0 + steady)
    assert deadline.has_come() == come


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 90),
        ("01:30:00", 5400),
        ("100:00:01", 360_001),
        ("1970-01-01T01:00:00+00:00", 3600 - 1000),
        ("1970-01-01 00:30Z", 1800 - 1000),
    ],
)
def test_a_time_is_seconds_a_duration_or_a_date(text, seconds):
    """The first two count from the start; a date does not."""
    assert parse_moment(text, 1000.0) == 1000.0 + seconds


def test_a_date_without_an_offset_is_local():
    assert (
        parse_moment("2026-01-31T18:30", 0.0) == datetime.datetime(2026, 1, 31, 18, 30).timestamp()
    )


@pytest.mark.parametrize(
    "text", ["soon", "1:2:3", "10:61:00", "-5", "1.5", "2026-01-31", "2026-13-01T00:00", ""]
)
def test_what_is_no_time_is_refused(tmp_path, model_folder, corpus, text):
    with pytest.raises(
        ConfigError,
        match=(
            "checkpoint.save_by must be seconds .84600. or HH:MM:SS after the start, or a time"
            " such as"
        ),
    ):
        tiny_config(tmp_path / "run", model_folder, corpus, checkpoint__save_by=f"'{text}'")


def test_a_time_that_is_past_is_refused(tmp_path, model_folder, corpus, ranks):
    """A run that would stop at once, and again each time it is queued."""
    with pytest.raises(ConfigError, match="save_by 2020-01-01T00:00 is past"):
        program.train(
            tiny_config(
                tmp_path / "run", model_folder, corpus, checkpoint__save_by="2020-01-01T00:00"
            ),
            ranks,
        )
    assert not (tmp_path / "run").exists()


def test_ranks_whose_launcher_has_died_save_and_end(tmp_path, model_folder, corpus):
    """`deepspeed` alone is signalled, as `docker stop` and `kill` do: it dies, and leaves launch.py
    and two ranks to themselves."""
    (tmp_path / "tiny.yaml").write_text(
        f"model: {{path: {model_folder}}}\ndata: {{train: [{corpus}]}}\nrun: {{dir:"
        f" {tmp_path / 'run'}}}\n"
    )
    settings = TINY | {"budget.steps": 10_000, "checkpoint.every_n_steps": 0}
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "2",
        "--master_port",
        "29583",
        "train.py",
        str(tmp_path / "tiny.yaml"),
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    processes = []
    try:
        wait_for(lambda: "step 2/" in (tmp_path / "log").read_text() or launcher.poll() is not None)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        assert (
            len([process for process in processes if "--local_rank" in " ".join(process.cmdline())])
            == 2
        )
        launcher.terminate()
        assert launcher.wait() == -signal.SIGTERM
        gone, left = psutil.wait_procs(processes, timeout=LIMIT_S)
        assert not left
    finally:
        for process in (launcher, *(process for process in processes if process.is_running())):
            process.kill()
    text = (tmp_path / "log").read_text()
    step = int(
        re.search(
            r"asked to stop \(the launcher \(process \d+\) is gone\): step (\d+) is saved", text
        )[1]
    )
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}" / "COMPLETE").exists()
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step
    assert f"exits with return code = {program.PREEMPTED}" in text


@pytest.mark.parametrize(
    "after_s, ends",
    [(0.0, {LAUNCHER_GONE, program.PREEMPTED}), (0.6, {LAUNCHER_GONE, program.PREEMPTED})],
)
def test_ranks_whose_launcher_dies_early_end_alike_or_save(harness, after_s, ends):
    """As soon as they know it, and while the run is put together; it would last for hours. Nothing
    is left behind."""
    settings = {"budget.steps": 100_000, "data.held_out": "[]", "evaluation.every_n_steps": 0}
    answer = harness.start(
        harness.folder / f"launcher_{after_s}",
        ranks=2,
        fault=Attempt(launcher_s=after_s),
        settings=settings,
    )
    assert set(answer["codes"]) <= ends and answer["left"] == 0, answer
    assert "the launcher (process " in answer["text"] and "Traceback" not in answer["text"]


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


@pytest.mark.parametrize("stopped", [0, 1])
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
    assert (
        answer["codes"][1 - stopped] == STALLED and answer["codes"][stopped] == program.PEER_LOST
    ), answer["text"]
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
    assert answer["codes"] == [program.DONE], answer["text"]
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
        monkeypatch.setattr(rlp.checks, "choose_layout", stop_here)  # what comes after the data
        with pytest.raises(StopHere):
            Run(config, ranks, watchdog=watchdog)
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
        answer["codes"] == [program.PEER_LOST, 9]
        and answer["survivor_s"] < SETTINGS["run.watchdog_s"]
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
        program.train(tiny_config(tmp_path / "run", model_folder, corpus), ranks)
