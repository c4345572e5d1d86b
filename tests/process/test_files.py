"""How files are written and opened: nothing planted in a folder leads a write, or a read, out of
it."""

import logging
import os
import socket
from pathlib import Path

import pytest

from rlp.config import ConfigError
from rlp.learn.checkpoint import open_checkpoint
from rlp.process import files
from rlp.process.library_logs import RankLog
from rlp.process.run_folder import FILES, open_run_folder


def plant(path: Path, kind: str, outside: Path) -> None:
    """Put something that is no file in the place of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "socket":
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        socket.socket(socket.AF_UNIX).bind(path.name)
    else:
        {
            "symbolic link": lambda: path.symlink_to(outside),
            "FIFO": lambda: os.mkfifo(path),
            "folder": path.mkdir,
        }[kind]()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder in ("run/checkpoints/step_1", "run/export", "run/logs", "outside"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    (tmp_path / "outside" / "file").write_text("precious\n")
    return tmp_path / "run"


INNER = (
    "logs/rank_0.log",
    "checkpoints/step_1/meta.json",
    "checkpoints/step_1/shard_00000-00000.safetensors",
    "export/model.safetensors",
    ".report.html.1.partial",
)


@pytest.mark.parametrize("kind", ["symbolic link", "FIFO", "socket"])
@pytest.mark.parametrize("name", [*FILES, *INNER, "checkpoints/step_2", "notes"])
def test_what_is_no_file_in_a_run_folder_is_refused_by_name(run: Path, name: str, kind: str):
    """Before anything is read or written there: `rlp report` and a resume would follow the one and
    wait for the others."""
    plant(run / name, kind, run.parent / "outside" / "file")
    with pytest.raises(ConfigError, match="is a(n)? " + kind) as refused:
        open_run_folder(run)
    assert str(run / name) in str(refused.value)
    assert (run.parent / "outside" / "file").read_text() == "precious\n"


def test_a_folder_that_another_rank_renames_while_it_is_looked_at_is_no_fault(
    run: Path, monkeypatch
):
    """A claim of the lock is made under a passing name."""
    passing = run / "lock" / ".tmp.2.abc"
    passing.mkdir(parents=True)
    scan = os.scandir

    def late(folder: Path):
        if Path(folder) == passing:
            passing.rename(run / "lock" / "2")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", late)
    open_run_folder(run)
    assert (run / "lock" / "2").is_dir()


@pytest.mark.parametrize("name", ["checkpoints", "export", "logs"])
def test_a_link_or_a_file_in_place_of_a_folder_is_refused(run: Path, name: str):
    for folder in ("checkpoints/step_1", "checkpoints", "export", "logs"):
        if folder.startswith(name):
            (run / folder).rmdir()
    (run / name).symlink_to(run.parent / "outside")
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
        open_run_folder(run)
    (run / name).unlink()
    (run / name).write_text("")
    with pytest.raises(ConfigError, match=f"{name} is a file; expected a folder"):
        open_run_folder(run)


def test_a_folder_in_place_of_a_file_is_refused(run: Path):
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="metrics.jsonl is a folder; expected a file"):
        open_run_folder(run)


def test_a_run_folder_may_itself_be_reached_by_a_link(run: Path):
    """Who names the path has made the link; Weights & Biases makes some below its own folder, which
    nobody here reads."""
    (run / "logs" / "wandb").mkdir()
    (run / "logs" / "wandb" / "latest-run").symlink_to("run-1")
    (run.parent / "link").symlink_to(run)
    assert open_run_folder(run.parent / "link").config_yaml.read_text() == "run: {}\n"


def test_what_is_made_below_a_link_is_made_where_it_leads(tmp_path: Path):
    """`runs` may stand for a folder on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    with files.new_folder(tmp_path / "runs" / "new", point="world.before_rename") as new:
        files.write_new(new / "file", b"told", point="world.torn_file")
    files.write_atomically(tmp_path / "runs" / "other", b"more", point="world.torn_file")
    files.append(tmp_path / "runs" / "other", b"!", point="world.torn_file")
    assert (tmp_path / "disk" / "new" / "file").read_bytes() == b"told"
    assert (tmp_path / "disk" / "other").read_bytes() == b"more!"


def test_a_link_in_a_checkpoint_is_refused(run: Path):
    """Also where the checkpoint is all that was handed over."""
    (run / "checkpoints" / "step_1" / "COMPLETE").symlink_to(run.parent / "outside" / "file")
    with pytest.raises(ConfigError, match="COMPLETE is a symbolic link"):
        open_checkpoint(run / "checkpoints" / "step_1")


WRITES = {
    "append": lambda path: files.append(path, b"new\n", point="append.torn_line"),
    "cut": lambda path: files.cut(path, 0, point="resume.before_truncate"),
    "touch": lambda path: files.touch(path, point="append.torn_line"),
    "open_log": lambda path: files.open_log(path).__enter__(),
    "read": files.read_bytes,
}


@pytest.mark.parametrize("kind", ["symbolic link", "FIFO", "socket", "folder"])
@pytest.mark.parametrize("write", WRITES)
def test_an_opening_follows_nothing_and_waits_for_nothing(run: Path, write: str, kind: str):
    """The folder was checked a moment ago, and somebody has changed it since."""
    plant(run / "metrics.jsonl", kind, run.parent / "outside" / "file")
    with pytest.raises(ConfigError, match="metrics.jsonl is a"):
        WRITES[write](run / "metrics.jsonl")
    assert (run.parent / "outside" / "file").read_text() == "precious\n"


def test_a_device_is_refused():
    """/dev/zero never ends."""
    with pytest.raises(ConfigError, match="/dev/zero is a device"):
        files.read_bytes(Path("/dev/zero"))


def test_a_replacement_is_written_under_a_name_that_nobody_knows(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even the right guess of it only stops the write: a temporary file is always a new one."""
    outside = run.parent / "outside" / "file"
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (run / ".report.html.guessed.partial").symlink_to(outside)
    with pytest.raises(FileExistsError):
        files.write_atomically(run / "report.html", b"page", point="report.torn_page")
    assert outside.read_text() == "precious\n" and not (run / "report.html").exists()


def test_a_replacement_takes_the_place_of_a_link_and_not_of_its_target(run: Path):
    """`rlp report --out LINK`."""
    (run / "page").symlink_to(run.parent / "outside" / "file")
    files.write_atomically(run / "page", b"page", point="report.torn_page")
    assert (run / "page").read_bytes() == b"page" and not (run / "page").is_symlink()
    assert (run.parent / "outside" / "file").read_text() == "precious\n"


@pytest.mark.parametrize("action", ["enospc", "eio", "raise"])
def test_a_write_that_fails_leaves_what_was_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, action: str
):
    """The old file, whole, and nothing else; a new folder not at all."""
    (run / "summary.json").write_text("old")
    before = sorted(run.iterdir())
    monkeypatch.setenv(
        "RLP_FAULT", f"end.torn_summary:1-:{action},splice.before_rename:1-:{action}"
    )
    with pytest.raises((OSError, RuntimeError), match="fault|left on device|Input/output"):
        files.write_atomically(run / "summary.json", b"new content", point="end.torn_summary")
    with pytest.raises((OSError, RuntimeError)):
        with files.new_folder(run / "made", point="splice.before_rename") as new:
            files.write_new(new / "file", b"content", point="splice.torn_config")
    assert (run / "summary.json").read_text() == "old" and sorted(run.iterdir()) == before


def test_what_libraries_say_may_be_lost(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """On a full disk, or where the folder has gone: a run does not end for its libraries' words,
    and prints no traceback."""
    handler = RankLog(run / "logs" / "rank_0.log")
    record = logging.LogRecord("torch", logging.WARNING, "file", 1, "a \udc80 word", None, None)
    handler.emit(record)
    assert (run / "logs" / "rank_0.log").read_text() == "a \\udc80 word\n"
    monkeypatch.setenv("RLP_FAULT", "append.torn_rank_log:1-:enospc")
    handler.emit(record)
    (run / "logs").rename(run / "gone")
    handler.emit(record)
    assert capsys.readouterr().err == ""
