"""Long work is told, and where the time of a run has gone."""

import functools
import sys
import time

import pytest

from rlp.process import console
from rlp.process import progress as progress_module
from rlp.process.progress import Pace, Progress, WallTime
from tests.measure.logs import start_log


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where the test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_long_work_is_told_every_half_minute_and_short_work_never(capsys, clock):
    said = []
    with Progress("thinking", total=40, unit="documents", say=said.append) as progress:
        for seconds in (10, 19, 1, 29, 1):
            clock[0] += seconds
            progress.advance(2)
    assert said == [
        "thinking: 6 of 40 documents in 30 s, about 2:50 left",
        "thinking: 10 of 40 documents in 1:00, about 3:00 left",
    ]
    with Progress("unpacking", unit="bytes") as progress:
        clock[0] += 31
        progress.advance(1_240_000_000)
    assert capsys.readouterr().err == "unpacking: 1.24 GB in 31 s\n"


def test_a_rank_that_does_not_speak_tells_no_progress(capsys, clock):
    with Progress("thinking", total=2, shown=False) as progress:
        clock[0] += 100
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_long_work_is_a_bar_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(
        progress_module, "tqdm", functools.partial(progress_module.tqdm, mininterval=0)
    )
    with Progress("thinking", total=4, unit="documents") as progress:
        progress._bar.delay = 0
        progress.advance(3)
    out, err = capsys.readouterr()
    assert out == "" and "thinking:  75%" in err and "3/4" in err and err.endswith("\r")


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1:00"),
        (200, "3:20"),
        (3725, "1:02:05"),
        (360_600, "4 d 04:10"),
    ],
)
def test_seconds_are_told_as_people_say_them(seconds, words):
    assert console.format_duration(seconds) == words


def test_what_is_left_follows_the_last_steps():
    """10 seconds for a tenth, then 30 for a tenth: with a window of two, 20 seconds each."""
    pace = Pace(num_steps=2)
    assert pace.left_s(0.1, 10.0, 0.9) == pytest.approx(90)
    assert pace.left_s(0.1, 30.0, 0.8) == pytest.approx(160)
    assert pace.left_s(0.1, 30.0, 0.7) == pytest.approx(210)
    assert Pace().left_s(0.0, 5.0, 1.0) is None and pace.left_s(0.1, 30.0, -0.01) == 0


def test_every_second_of_a_process_belongs_to_one_part(clock, monkeypatch):
    """Of a process that began 7 seconds ago."""
    born = time.time() - 7
    monkeypatch.setattr(progress_module.time, "time", lambda: born + 7)
    monkeypatch.setattr(progress_module.psutil.Process, "create_time", lambda process: born)
    wall = WallTime()
    clock[0] += 20
    wall.enter("training")
    clock[0] += 5
    with wall.during("evaluation"):
        clock[0] += 60
    clock[0] += 2
    assert wall.told() == "1:34: evaluation 1:00, start 27 s, training 7.0 s"
    assert wall.so_far() == pytest.approx({"start": 27, "evaluation": 60, "training": 7})


def test_a_line_comes_after_half_a_minute_where_steps_are_long(tmp_path, capsys, clock):
    """Every 2nd step, or LINE_EVERY_S after the last line; and within a step that takes as long."""
    _, log = start_log(tmp_path)
    log.step(
        1,
        {
            "reward/mean": 0.5,
            "perf/tokens_per_s": 1234.5,
            "perf/peak_memory_bytes": 6.1e9,
            "perf/left_s": 200.0,
        },
    )
    clock[0] += 40
    log.step(3, {"reward/mean": 0.5})
    clock[0] += 29
    log.still(5, "decode", 31.0)
    clock[0] += 2
    log.still(5, "decode", 33.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/4  reward +0.5000 nats  speed 1,234 tokens/s  memory 6.1 GB  left 3:20",
        "step 3/4  reward +0.5000 nats",
        "step 5: in decode, 33 s so far",
    ]
