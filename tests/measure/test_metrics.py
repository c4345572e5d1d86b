"""What a run writes down: once per step, whole lines, finite numbers, and never at the price of the
run."""

import functools
import hashlib
import importlib.machinery
import json
import logging
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    load_config,
)
from rlp.measure import wandb_log
from rlp.measure.metrics import EVALUATION, METRICS
from rlp.measure.metrics_log import MetricsLog
from rlp.process import console
from rlp.process import progress as progress_module
from rlp.process.json_files import DamagedFileError, read_json, write_json
from rlp.process.library_logs import quiet_libraries
from rlp.process.lock import RunLock
from rlp.process.new_run_folder import create_run_folder
from rlp.process.progress import Pace, Progress, WallTime
from rlp.process.run_folder import RunFolder, open_run_folder
from rlp.process.run_logs import append_json_line, cut_logs, json_lines, mark_logs, read_json_lines


@dataclass
class FakeRanks:
    """One of several ranks, without a process group; `told` is what rank 0 broadcasts."""

    rank: int = 0
    told: object = None
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self):
        return self.rank == 0

    def gather(self, value):
        return [value, value]

    def broadcast(self, value):
        return value if self.is_first else self.told


def make_config(path, **logging_settings):
    return Config(
        run=RunConfig(dir=str(path)),
        model=ModelConfig(path="tiny"),
        data=DataConfig(train=["corpus.jsonl"]),
        budget=BudgetConfig(steps=4),
        logging=LoggingConfig(every_n_steps=2, **logging_settings),
    )


def start_log(tmp_path, rank=0, **logging_settings):
    config = make_config(tmp_path / "run", **logging_settings)
    folder = (
        create_run_folder(config, FakeRanks(), RunLock(FakeRanks()))
        if rank == 0
        else RunFolder(tmp_path / "run")
    )
    return folder, MetricsLog(folder, config, FakeRanks(rank), total_hint=4)


def test_a_new_run_folder_holds_its_config_and_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = make_config(tmp_path / "runs" / "first")
    folder = create_run_folder(config, FakeRanks(), RunLock(FakeRanks()))
    assert load_config(folder.config_yaml) == config
    environment = read_json(folder.environment_json)
    assert environment["packages"]["torch"] == torch.__version__ and environment["world_size"] == 2
    assert "hf_secret" not in folder.environment_json.read_text()


def test_an_existing_run_folder_is_refused_and_left_as_it_is(tmp_path):
    config = make_config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(
        ConfigError, match="exists and is never written over.*run.dir=OTHER.*run.resume=auto"
    ):
        create_run_folder(config, FakeRanks(), RunLock(FakeRanks()))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_refusal_of_rank_0_is_raised_on_every_rank(tmp_path):
    with pytest.raises(ConfigError, match="exists"):
        create_run_folder(
            make_config(tmp_path / "run"),
            FakeRanks(rank=1, told="run.dir exists"),
            RunLock(FakeRanks()),
        )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_below_a_file_is_refused_as_such(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can not be created"):
        create_run_folder(make_config(tmp_path / "file" / "run"), FakeRanks(), RunLock(FakeRanks()))


def test_a_folder_that_no_run_has_left_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run folder at"):
        open_run_folder(tmp_path / "absent")
    with pytest.raises(ConfigError, match="has no config.yaml"):
        open_run_folder(tmp_path)


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"summary.json: after: gain\[1\] is (nan|inf)"):
            write_json(
                tmp_path / "summary.json",
                {"after": {"gain": [0.0, value]}},
                point="end.torn_summary",
            )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "ledger.json"
    write_json(path, {"flops": 1}, point="end.torn_ledger")
    with pytest.raises(TypeError):
        write_json(path, {"flops": object()}, point="end.torn_ledger")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "folder", {"flops": 2}, point="end.torn_ledger")
    assert read_json(path) == {"flops": 1} and sorted(tmp_path.iterdir()) == [
        tmp_path / "folder",
        path,
    ]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json_line(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "reward/me')
    assert read_json_lines(path) == [{"step": 1}]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(DamagedFileError, match="metrics.jsonl, line 2: expected a JSON object"):
        read_json_lines(path)


KEPT = b'{"step":1,  "thought": "\\u00e9"}\n{"step": 2}\n{"step": 2, "document": 7}\n'


def marks_of(path: Path, content: bytes) -> dict:
    """What a checkpoint says of a log that holds the content then."""
    return {
        path.name: {
            "bytes": len(content),
            "lines": content.count(b"\n"),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    }


@pytest.mark.parametrize("marked", [b"", KEPT[: KEPT.index(b"\n") + 1], KEPT])
@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 3}\n', b'{"step": 3}\n{"step": 4, "tho', b'{"step": 2, "tho', b'{"step": 2}'],
)
def test_a_cut_keeps_the_bytes_of_the_steps_before_it(tmp_path, marked, tail):
    """Odd spacing, lines after the checkpoint was made, and a line torn off anywhere, also just
    before its newline."""
    folder = RunFolder(tmp_path)
    path = folder.thoughts_jsonl
    path.write_bytes(KEPT + tail)
    assert cut_logs(folder, 2, marks_of(path, marked)) == []
    assert path.read_bytes() == KEPT
    append_json_line(path, {"step": 3})
    assert path.read_bytes() == KEPT + b'{"step": 3}\n'
    assert (
        mark_logs(folder, 3)["thoughts.jsonl"]
        == marks_of(path, path.read_bytes())["thoughts.jsonl"]
    )
    assert mark_logs(folder, 2)["thoughts.jsonl"] == marks_of(path, KEPT)["thoughts.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        KEPT[: KEPT.index(b"\n") + 1],
        KEPT[KEPT.index(b"\n") + 1 :],
        KEPT.replace(b"7", b"8"),
        KEPT[:-1],
    ],
)
def test_lost_and_changed_lines_of_a_log_are_said(tmp_path, content):
    """A log that is gone, emptied, cut, beheaded or edited since the checkpoint: not sewn over, and
    no reason to stop."""
    folder = RunFolder(tmp_path)
    if content is not None:
        folder.thoughts_jsonl.write_bytes(content)
    (found,) = cut_logs(folder, 2, marks_of(folder.thoughts_jsonl, KEPT))
    left = (content or b"").count(b"\n")
    assert (
        "thoughts.jsonl is not what it was when the checkpoint of step 2 was made: it had 3 lines"
        f" ({len(KEPT)} bytes) then, and has {left} " in found
    )


@pytest.mark.parametrize(
    "content",
    [
        b'{"loss": 1}\n',
        b'{"step": 1.0}\n',
        b"[1]\n",
        b"\0\n",
        b'{"step": 1}\n{"st\n{"step": 2}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_line_that_can_not_be_placed_stops_before_a_log_is_changed(tmp_path, content):
    """Line and advice are said; what the other logs hold too much is still there."""
    folder = RunFolder(tmp_path)
    folder.metrics_jsonl.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    folder.evaluation_jsonl.write_bytes(content)
    with pytest.raises(
        DamagedFileError,
        match=r"evaluation.jsonl, line \d: expected a JSON object.*Mend or remove the line",
    ):
        cut_logs(folder, 1, marks_of(folder.evaluation_jsonl, b"another\n"))
    assert folder.metrics_jsonl.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_lines_of_a_step_that_was_given_up_are_not_in_the_mark(tmp_path):
    """Its thoughts were logged before the stop; the checkpoint is of the step before."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 2):
        append_json_line(folder.thoughts_jsonl, {"step": step})
    mark = mark_logs(folder, 1)
    assert mark["thoughts.jsonl"]["lines"] == 1
    assert cut_logs(folder, 1, mark) == []
    assert folder.thoughts_jsonl.read_bytes() == b'{"step": 1}\n'


def test_a_log_that_starts_again_at_zero_is_emptied(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics_jsonl.write_bytes(b"no JSON\n")
    (tmp_path / ".summary.json.0.partial").write_bytes(b"half")
    assert cut_logs(folder, -1, {}) == []
    assert folder.metrics_jsonl.read_bytes() == b"" and [
        path.name for path in tmp_path.iterdir()
    ] == ["metrics.jsonl"]


def test_a_resume_over_a_large_log_needs_memory_for_a_line(tmp_path):
    """50 MB of lines of 10 kB: a line, the file's buffers and the checksum are well below 1 MB,
    with or without a mark."""
    folder = RunFolder(tmp_path)
    line = json.dumps({"step": 1, "detail": "x" * 10_000}).encode() + b"\n"
    digest = hashlib.sha256()
    with folder.bad_documents_jsonl.open("wb") as file:
        for _ in range(5_000):
            file.write(line)
            digest.update(line)
    mark = {
        "bad_documents.jsonl": {
            "bytes": 5_000 * len(line),
            "lines": 5_000,
            "sha256": digest.hexdigest(),
        }
    }
    tracemalloc.start()
    try:
        assert cut_logs(folder, 1, mark) == []
        assert (
            len(
                cut_logs(
                    folder, 1, {"bad_documents.jsonl": mark["bad_documents.jsonl"] | {"sha256": ""}}
                )
            )
            == 1
        )
        assert sum(1 for _ in json_lines(folder.bad_documents_jsonl)) == 5_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_step_is_one_line_in_table_order_with_the_clock_apart(tmp_path):
    folder, log = start_log(tmp_path)
    log.step(
        1, {"perf/step_s": 2.5, "lm/loss": 3.0, "baseline/logprob": None, "reward/mean": -0.25}
    )
    assert folder.metrics_jsonl.read_text() == '{"step": 1, "reward/mean": -0.25, "lm/loss": 3.0}\n'
    assert folder.timing_jsonl.read_text() == '{"step": 1, "perf/step_s": 2.5}\n'


def test_an_unknown_metric_is_refused_with_the_nearest_name(tmp_path):
    _, log = start_log(tmp_path)
    with pytest.raises(
        ValueError, match="unknown metric 'rewards/mean'. Did you mean 'reward/mean'"
    ):
        log.step(1, {"rewards/mean": 0.0})
    with pytest.raises(ValueError, match="Did you mean 'gain_over_start_nats'"):
        log.evaluation(0, {"gain_over_start": 0.0})


def test_a_metric_that_is_no_finite_number_is_refused_on_every_rank(tmp_path):
    start_log(tmp_path)
    _, log = start_log(tmp_path, rank=1)
    for value in (float("nan"), True, "0.5", torch.tensor(0.5)):
        with pytest.raises(ValueError, match="reward/mean must be a finite number"):
            log.step(1, {"reward/mean": value})


def test_only_rank_0_writes_and_speaks(tmp_path, capfd):
    folder, _ = start_log(tmp_path)
    _, log = start_log(tmp_path, rank=1)
    log.step(1, {"reward/mean": 0.5})
    log.evaluation(1, {"panel_positions": 4})
    log.say("hello")
    log.close()
    assert not folder.metrics_jsonl.exists() and not folder.evaluation_jsonl.exists()
    assert "".join(capfd.readouterr()) == ""


def test_without_a_terminal_there_is_a_line_at_the_first_step_and_every_n(tmp_path, capsys):
    _, log = start_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.step(step, {"reward/mean": 0.5, "optim/grad_norm": 2.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "4/4"]
    assert lines[0] == "step 1/4  reward +0.5000 nats  grad 2"


def test_on_a_terminal_there_is_a_bar_and_lines_go_above_it(tmp_path, capsys, monkeypatch):
    _, log = start_log(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.step(3, {"reward/mean": 0.5, "thought/tokens_mean": 12.0, "perf/step_s": 1.0})
    log.say("saved")
    log.close()
    out, err = capsys.readouterr()
    assert out == "saved\n" and "3/4" in err and "reward +0.5000 nats, thought 12 tokens" in err


def test_every_metric_has_a_definition_and_a_unit_where_it_needs_one():
    assert all(metric.definition.endswith(".") for metric in (METRICS | EVALUATION).values())
    assert {name for name, metric in METRICS.items() if metric.unit == "fraction"} == {
        name for name in METRICS if name.endswith("_frac")
    }


class FakeWandb(types.ModuleType):
    """Weights & Biases that fails where it is told to."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.fails, self.inits, self.logged, self.finished = fails, [], [], False

    def Settings(self, **settings):
        return settings

    def init(self, *, mode, dir, **settings):
        self.inits.append(mode)
        self._break("online" if mode == "online" else "offline")
        assert dir.endswith("run/logs")
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self._break("log")
        self.logged.append(values)

    def finish(self):
        self._break("finish")
        self.finished = True

    def _break(self, part):
        if part in self.fails:
            raise OSError(f"{part} is down")


def run_with_wandb(tmp_path, monkeypatch, mode, fails=()):
    wandb = FakeWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder, log = start_log(tmp_path, wandb=mode)
    for step in (1, 2):
        log.step(step, {"reward/mean": 0.5, "perf/step_s": 1.0})
    log.evaluation(2, {"panel_positions": 4})
    log.close()
    assert [line["step"] for line in read_json_lines(folder.metrics_jsonl)] == [1, 2]
    return wandb


def test_wandb_gets_steps_and_evaluations(tmp_path, monkeypatch):
    wandb = run_with_wandb(tmp_path, monkeypatch, "offline")
    assert wandb.logged == [
        {"step": 1, "reward/mean": 0.5, "perf/step_s": 1.0},
        {"step": 2, "reward/mean": 0.5, "perf/step_s": 1.0},
        {"step": 2, "evaluation/panel_positions": 4},
    ]
    assert wandb.finished


def test_wandb_goes_offline_where_its_server_can_not_be_reached(tmp_path, monkeypatch, capsys):
    wandb = run_with_wandb(tmp_path, monkeypatch, "online", fails=("online",))
    assert wandb.inits == ["online", "offline"] and len(wandb.logged) == 3
    assert (
        capsys.readouterr().out.count(
            "could not start online (OSError: online is down); continuing offline."
        )
        == 1
    )


@pytest.mark.parametrize("fails", [("online", "offline"), ("log",), ("finish",), ("log", "finish")])
def test_a_run_goes_on_without_wandb(tmp_path, monkeypatch, capsys, fails):
    run_with_wandb(tmp_path, monkeypatch, "online", fails=fails)
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert len(said) == (2 if "offline" in fails else 1)


@pytest.mark.parametrize("part", ["online", "log", "finish"])
def test_a_run_does_not_wait_for_wandb_that_hangs(tmp_path, monkeypatch, capsys, part):
    """Whatever call does not return: steps go on at once, the end waits for its patience and says
    so."""
    wandb, released = FakeWandb(), threading.Event()
    wandb._break = lambda asked: released.wait(60) if asked == part else None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb_log, "FINISH_PATIENCE_S", 0.2)
    folder, log = start_log(tmp_path, wandb="online")
    start = time.monotonic()
    for step in range(1, 50):
        log.step(step, {"reward/mean": 0.5})
    log.close()
    assert time.monotonic() - start < 20
    assert (
        "Weights & Biases hangs; it is left behind after 0.2 s. metrics.jsonl is complete."
        in capsys.readouterr().out
    )
    assert len(read_json_lines(folder.metrics_jsonl)) == 49
    released.set()


def test_what_waits_for_wandb_is_bounded(tmp_path, monkeypatch, capsys):
    """A tracker that takes nothing fills no memory: it is switched off, once."""
    wandb, released = FakeWandb(), threading.Event()
    wandb._break = lambda asked: released.wait(60)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(wandb_log, "MAX_WAITING", 5)
    _, log = start_log(tmp_path, wandb="online")
    for step in range(1, 20):
        log.step(step, {"reward/mean": 0.5})
    log.close()
    assert (
        capsys.readouterr().out.count(
            "Weights & Biases hangs: 5 lines wait for it; it is switched off."
        )
        == 1
    )
    released.set()


def test_wandb_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        start_log(tmp_path, wandb="offline")


@pytest.fixture
def restored_logging():
    """Loggers as they were."""
    names = ["transformers", "datasets", "torch", "torch.inner", "py.warnings", "DeepSpeed"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.handlers, logger.filters, logger.propagate) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (handlers, filters, propagate) in zip(loggers, before):
        logger.handlers, logger.filters, logger.propagate = handlers, filters, propagate


def test_libraries_speak_to_the_log_file_only(tmp_path, capfd, restored_logging):
    """An inner logger with a handler of its own, as torch has; one whose handler comes later, as
    DeepSpeed's does; a warning."""
    folder, _ = start_log(tmp_path)
    logging.getLogger("torch.inner").addHandler(logging.StreamHandler())
    quiet_libraries(folder, FakeRanks(rank=1))
    logging.getLogger("DeepSpeed").addHandler(logging.StreamHandler(sys.stdout))
    for name in ("torch.inner", "transformers.models", "DeepSpeed"):
        logging.getLogger(name).error("chatter of %s", name)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("chatter of python", stacklevel=1)
    written = (folder.logs / "rank_1.log").read_text()
    assert all(
        written.count(f"chatter of {name}") >= 1
        for name in ("torch.inner", "transformers.models", "DeepSpeed", "python")
    )
    assert "".join(capfd.readouterr()) == ""


def test_importing_these_modules_imports_neither_deepspeed_nor_wandb():
    code = (
        "import sys, rlp.cli; print([name for name in ('deepspeed', 'wandb') if name in"
        " sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_lines_are_plain_json_that_other_programs_read(tmp_path):
    """ASCII, one object a line, whatever characters a model writes, unpaired surrogates too."""
    thought = "\u00e9 \u2028 \ud800 \n \x00"
    append_json_line(tmp_path / "thoughts.jsonl", {"thought": thought})
    content = (tmp_path / "thoughts.jsonl").read_bytes()
    assert (
        content.isascii()
        and content.count(b"\n") == 1
        and json.loads(content) == {"thought": thought}
    )


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
