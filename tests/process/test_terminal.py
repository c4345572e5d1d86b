"""What a user meets at a terminal, whatever it can show: no traceback for a character, a key or a
path."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlp.__main__ import main as rlp_process
from rlp.cli import main
from rlp.config import ConfigError, load_config
from rlp.process.command import run_command
from rlp.process.console import printed_to
from tests import REPOSITORY


def ascii_stream() -> io.TextIOWrapper:
    """As `LC_ALL=C PYTHONIOENCODING=ascii` makes it: strict."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def test_text_that_the_terminal_lacks_is_spelled_out(monkeypatch: pytest.MonkeyPatch):
    """Chinese, an emoji and half of a surrogate pair, on both streams."""
    out, err = ascii_stream(), ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert (
        run_command(
            lambda: print("\u4e2d \U0001f600 \ud800") or print("caf\u00e9", file=sys.stderr) or 0
        )
        == 0
    )
    err.flush()
    assert (
        out.buffer.getvalue() == b"\\u4e2d \\U0001f600 \\ud800\n"
        and err.buffer.getvalue() == b"caf\\xe9\n"
    )


def test_a_run_prints_any_text_and_ends_by_ctrl_c_without_a_traceback():
    """The way of train.py, in a process of its own, because it ends it."""
    code = (
        "from rlp.process.command import run_as_process\n"
        "def main():\n    print('\\u4e2d')\n    raise KeyboardInterrupt\nrun_as_process(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "\\u4e2d\n", "interrupted\n")


def test_ctrl_c_during_the_imports_of_a_command_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys
):
    class Importing(SimpleNamespace):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "rlp.cli", Importing())
    assert rlp_process() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_pipe_that_nobody_reads_any_more_ends_a_command_silently(monkeypatch: pytest.MonkeyPatch):
    """`rlp view RUN | head -1`; a pipe of something else that broke is still an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command(lambda: print("x" * 100_000) or 0) == 141

    def broken() -> int:
        raise BrokenPipeError

    with open(os.devnull, "w") as stream, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", stream)
        run_command(broken)


LONG = "x" * 300
"""A name that no file system takes: an OSError that even root meets."""


@pytest.mark.parametrize(
    "command",
    [
        ["view", LONG],
        ["report", LONG],
        ["audit", LONG, LONG],
        ["match", LONG, "--arm", "cpt", "--out", "a.yaml"],
        ["export", LONG, "--out", "a"],
    ],
)
def test_what_the_system_refuses_is_one_sentence_with_the_path(command: list[str], capsys):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"rlp: {LONG}") and "File name too long" in said and said.count("\n") == 1
    )


def test_a_config_that_can_not_be_read_is_a_config_error():
    with pytest.raises(ConfigError, match="can not be read: File name too long"):
        load_config(LONG)
    with pytest.raises(ConfigError, match="which is a folder"):
        load_config("/")


@pytest.fixture
def run_with_steps(tmp_path: Path) -> Path:
    """The folder of a run that has saved two checkpoints, and ended."""
    for name in ("checkpoints/step_5", "checkpoints/step_20", "export"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run: {dir: x}\n")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "step, said",
    [
        (
            None,
            "is a run folder. It holds those of step 5, step 20. Write --step 20, or --step newest",
        ),
        ("7", "has no checkpoint of step 7. It holds those of step 5, step 20"),
    ],
)
def test_the_export_of_a_run_folder_tells_its_steps(
    run_with_steps: Path, capsys, step: str | None, said: str
):
    assert (
        main(["export", str(run_with_steps), "--out", "made", *(["--step", step] if step else [])])
        == 2
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "step, chosen", [("5", "step_5"), ("20", "step_20"), ("newest", "step_20")]
)
def test_a_step_of_a_run_folder_is_exported(
    run_with_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys, step: str, chosen: str
):
    monkeypatch.setattr("rlp.learn.checkpoint.open_checkpoint", lambda path: path)
    made = []
    monkeypatch.setattr(
        "rlp.learn.export.export_checkpoint", lambda checkpoint, out: made.append((checkpoint, out))
    )
    assert main(["export", str(run_with_steps), "--out", "made", "--step", step]) == 0
    assert (
        made == [(run_with_steps / "checkpoints" / chosen, Path("made"))]
        and str(run_with_steps / "checkpoints" / chosen) in capsys.readouterr().out
    )


def test_benchmarks_look_at_a_folder_before_they_ask_for_it(
    run_with_steps: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A run folder stands for its export; a checkpoint, a run that has not ended and a path with
    nothing there are said as what they are."""
    asked = []
    monkeypatch.setattr("rlp.compare.evaluate.load_tasks", lambda benchmarks: {})
    monkeypatch.setattr(
        "rlp.compare.evaluate.open_asked_model",
        lambda checkpoint, **options: (
            asked.append(checkpoint) or SimpleNamespace(marker_notes=list)
        ),
    )
    command = ["eval", "--tasks", "gsm8k", "--device", "cpu"]
    monkeypatch.setattr(
        "rlp.compare.evaluate.run_benchmarks", lambda *arguments, **options: iter(())
    )
    assert main([*command, "--think", str(run_with_steps)]) == 0 and asked == [
        str(run_with_steps / "export")
    ]
    assert "is a run folder; what is evaluated is its export" in capsys.readouterr().out
    (run_with_steps / "checkpoints" / "step_5" / "meta.json").write_text("{}")
    (run_with_steps / "export").rmdir()
    for path, words in (
        (run_with_steps, "--step newest"),
        (
            run_with_steps / "checkpoints" / "step_5",
            "is a checkpoint of a run, which becomes a model by: rlp export",
        ),
        (run_with_steps / "nothing", "no folder at"),
    ):
        assert main([*command, str(path)]) == 2
        assert words in capsys.readouterr().err
    assert len(asked) == 1


def test_all_that_is_printed_goes_to_the_log_and_to_the_terminal_again(tmp_path, capfd):
    """By Python, past it, and by a process."""
    print("before")
    with open(tmp_path / "log.txt", "w") as log, printed_to(log):
        print("by Python")
        print("aside", file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os.write(2, b"by a library\n")
        subprocess.run(["echo", "by a process"], check=True)
    print("behind")
    told = (tmp_path / "log.txt").read_text()
    assert told == "by Python\naside\nby a library\nby a process\n"
    assert capfd.readouterr() == ("before\nbehind\n", "")
