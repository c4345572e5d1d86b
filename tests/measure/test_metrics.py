"""What a run writes down: once per step, whole lines, finite numbers, and never at the price of the
run."""

import importlib.machinery
import json
import logging
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import torch

from rlp.config import ConfigError
from rlp.measure import wandb_log
from rlp.measure.metrics import EVALUATION, METRICS
from rlp.process.library_logs import quiet_libraries
from rlp.process.run_logs import append_json_line, read_json_lines
from tests.measure.logs import start_log
from tests.process.quiet_ranks import FakeRanks


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
