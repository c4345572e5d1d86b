"""A run that is asked to stop saves and says so; one that hangs shows where; none leaves a process
behind."""

import datetime
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import rlp.process.preemption
import rlp.process.watchdog
import rlp.trainer
from rlp.config import ConfigError, parse_moment
from rlp.process.exit_codes import PEER_LOST, PREEMPTED
from rlp.process.preemption import SAME_KEYPRESS_S, SIGNALS, Deadline, Preemption
from tests import REPOSITORY
from tests.faults.harness import LIMIT_S, Attempt
from tests.process.stopping import Looks, assert_continues_as_if_nothing_had_been, stops, wait_for
from tests.training import TINY, read_lines, tiny_config, train


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


@pytest.mark.parametrize("stage", [1, 3])
def test_a_signal_to_one_rank_stops_both_between_passes(harness, stage):
    """Of four micro-batches a rank: where passes are its own the rank leaves by itself and is
    waited for; where they are collectives both leave after the same one."""
    answer = stops(
        harness,
        f"passes_{stage}",
        "backward:1:term@rank1",
        ranks=2,
        settings={"engine.zero_stage": stage, "optim.batch_size": 8},
    )
    assert "step 0 is saved; the step begun after it is not counted" in answer["text"]


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


@pytest.mark.parametrize("every, made", [(0, 2), (2, 3)])
def test_the_run_stops_when_its_time_is_over(
    tmp_path, model_folder, corpus, ranks, monkeypatch, capsys, every, made
):
    """`checkpoint.save_by` is reached in the step after these: it is given up, and what was made is
    saved, also where a checkpoint of fewer steps is there."""
    step, steady = rlp.trainer.take_step, rlp.process.preemption.steady_time

    def until_time_is_over(run):
        if run.state.step == made:
            monkeypatch.setattr(rlp.process.preemption, "steady_time", lambda: steady() + 360_000)
            wait_for(lambda: run.host.preemption.requested)
        step(run)

    monkeypatch.setattr(rlp.trainer, "take_step", until_time_is_over)
    config = tiny_config(
        tmp_path / "run",
        model_folder,
        corpus,
        budget__steps=9,
        checkpoint__save_by=360_000,
        checkpoint__every_n_steps=every,
    )
    assert train(config, ranks) == PREEMPTED
    assert (
        f"asked to stop (checkpoint.save_by 360000 is reached): step {made} is saved"
        in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "checkpoints" / f"step_{made}" / "COMPLETE").exists()


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
        train(
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
    assert f"exits with return code = {PREEMPTED}" in text


@pytest.mark.parametrize(
    "after_s, ends",
    [(0.0, {PEER_LOST, PREEMPTED}), (0.6, {PEER_LOST, PREEMPTED})],
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
