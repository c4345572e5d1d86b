"""Run folders and their logs: made once, written whole, cut where a checkpoint ends."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from rlp.config import ConfigError, load_config
from rlp.process.json_files import DamagedFileError, read_json, write_json
from rlp.process.lock import RunLock
from rlp.process.new_run_folder import create_run_folder
from rlp.process.run_folder import RunFolder, open_run_folder
from rlp.process.run_logs import append_json_line, cut_logs, json_lines, mark_logs, read_json_lines
from tests.process.quiet_ranks import FakeRanks, make_config


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
