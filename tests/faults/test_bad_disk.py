"""Runs whose disk fails at each write: what is lost is said, what is saved stays, and nothing is
made twice."""

import ast
import itertools
import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest

from rlp.learn.checkpoint import newest_checkpoint
from rlp.process.faults import COMMAND_POINTS, FAULT_POINTS
from tests import REPOSITORY
from tests.faults.harness import SAVE_EVERY, STEPS, Attempt, Case
from tests.faults.playing import damage, played

SHORT = {
    "budget.steps": 2,
    "checkpoint.every_n_steps": 1,
    "checkpoint.keep": 1,
    "evaluation.every_n_steps": 0,
}

BAD_DISK = {
    "folder.torn_config": ("", 2, "can not be created"),
    "folder.torn_environment": ("", 2, "can not be created"),
    "folder.before_rename": ("", 2, "can not be created"),
    "folder.before_discard": ("rollout:1:raise,", 1, "fault at rollout"),
    "lock.torn_owner": ("", 2, "can not be created"),
    "lock.before_rename": ("rollout:2:kill", 74, "can not be written to"),
    "lock.beat": ("", 0, "6 steps|2 steps"),
    "lock.before_release": ("", 0, "2 steps"),
    "append.before_line": ("", 0, "lines wait in memory"),
    "append.torn_line": ("", 0, "lines wait in memory"),
    "resume.before_truncate": ("save.before_folder:2:kill", 74, "its logs could not be cut back"),
    "save.before_folder": ("", 0, "the checkpoint could not be written"),
    "save.torn_part": ("", 0, "the checkpoint could not be written"),
    "save.torn_meta": ("", 0, "the checkpoint could not be written"),
    "save.torn_complete": ("", 0, "the checkpoint could not be written"),
    "save.before_rename": ("", 0, "the checkpoint could not be written"),
    "purge.before_old": ("", 0, "an old checkpoint could not be removed"),
    "purge.before_delete": ("", 0, "an old checkpoint could not be removed"),
    "export.torn_weights": ("", 74, "the export could not be written"),
    "export.torn_format": ("", 74, "the export could not be written"),
    "export.torn_card": ("", 74, "the export could not be written"),
    "export.before_rename": ("", 74, "the export could not be written"),
    "end.torn_ledger": ("", 74, "the end of the run could not be written"),
    "end.torn_summary": ("", 74, "the end of the run could not be written"),
    "report.torn_page": ("", 0, "the report could not be written"),
}
"""Of each write of a run: the fault of an attempt before, or with it (a comma at its end), its exit
code, and what it says."""

ELSEWHERE = {"save.before_aside", "resume.before_aside", "append.torn_rank_log"}
"""`test_a_damaged_checkpoint_that_can_not_be_set_aside`, `test_what_libraries_say_may_be_lost`."""


def test_every_write_of_a_run_has_a_bad_disk():
    """A new write is given its line in the table, or this fails."""
    files = [path for path in (REPOSITORY / "rlp").rglob("*.py") if path.stem != "faults"]
    calls = [
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    handed = {
        word.value.value
        for node in calls
        for word in node.keywords
        if word.arg == "point" and isinstance(word.value, ast.Constant)
    }
    assert handed - COMMAND_POINTS.keys() <= BAD_DISK.keys() | ELSEWHERE <= FAULT_POINTS.keys()


ONE_OF_EACH = {
    ("folder.torn_config", "enospc"),
    ("lock.before_rename", "eio"),
    ("append.torn_line", "eio"),
    ("resume.before_truncate", "enospc"),
    ("save.torn_complete", "enospc"),
    ("export.torn_format", "enospc"),
    ("end.torn_summary", "eio"),
    ("report.torn_page", "enospc"),
}
"""The others take long, and run in `make test-all`."""


@pytest.mark.parametrize(
    "point, action",
    [
        pytest.param(*pair, marks=() if pair in ONE_OF_EACH else pytest.mark.slow)
        for pair in itertools.product(BAD_DISK, ("enospc", "eio"))
    ],
)
def test_a_bad_disk_at_one_write_loses_nothing(harness, point, action):
    """The run goes on, or ends with a sentence; with room again it ends as the run that had room
    from the start."""
    before, code, words = BAD_DISK[point]
    settings = SHORT | {
        "budget.steps": 3 if point.startswith("purge") else 2
    }  # what could not be removed goes after the next save
    fault = f"{before if before.endswith(',') else ''}{point}:1:{action}"
    earlier = (Attempt(before),) if before and not before.endswith(",") else ()
    case = (
        Case((*earlier, Attempt(fault, ends_with=(code,))), settings=settings)
        if code
        else Case(earlier, survived=fault, settings=settings)
    )
    outcome = played(harness, case, f"disk {point} {action}")
    assert outcome.codes[len(earlier)] == [code]
    assert re.search(words, outcome.text), outcome.text
    assert ("Traceback" in outcome.text) == (code == 1)


def test_a_stop_whose_save_fails_is_no_good_stop(harness):
    """Exit code 75 promises a checkpoint of the last step."""
    settings = SHORT | {"budget.steps": 4, "checkpoint.every_n_steps": 2}
    case = Case(
        (Attempt("rollout:5:term,save.before_folder:2-:enospc", ends_with=(74,)),),
        settings=settings,
    )
    outcome = played(harness, case, "stop without a save")
    assert (
        outcome.codes[0] == [74]
        and "could not be saved, and the checkpoint before it stands" in outcome.text
    )


@pytest.mark.parametrize("fault", ["rollout:2:raise", "evaluation:1:raise"])
def test_a_new_run_that_fails_before_its_first_step_leaves_no_folder(harness, tmp_path, fault):
    """Whatever the error is; one that is continued keeps its folder."""
    run = tmp_path / "run"
    assert harness.start(run, fault=fault, settings=SHORT)["codes"] == [1]
    assert list(tmp_path.iterdir()) == []
    assert harness.start(run, fault="rollout:4:kill", settings=SHORT)["codes"] == [-9]
    assert harness.start(run, fault="rollout:1:raise", settings=SHORT)["codes"] == [1]
    assert (run / "config.yaml").exists()


def test_a_damaged_checkpoint_that_can_not_be_set_aside(harness, ranks, tmp_path, monkeypatch):
    """A disk that is mounted read-only: said, and the one before it is used."""
    parent = tmp_path / "checkpoints"
    shutil.copytree(harness.reference(1, {}) / "checkpoints", parent)
    damage(parent / f"step_{STEPS}", "a flipped bit")
    (parent / ".tmp.step_9.left").mkdir()
    monkeypatch.setenv("RLP_FAULT", "resume.before_aside:1-:eio,purge.before_delete:1-:eio")
    said: list[str] = []
    assert newest_checkpoint(parent, ranks, said.append).step == STEPS - SAVE_EVERY
    assert "could not be removed" in said[0] and "could not be set aside" in said[1]


def test_lost_lines_of_a_log_are_said_and_kept(harness, tmp_path):
    """Somebody has cut metrics.jsonl while the run was not there: on the console, in alarms.jsonl,
    once."""
    run = tmp_path / "run"
    harness.start(run, fault="rollout:5:kill", settings={"checkpoint.every_n_steps": 1})
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[1:]))
    answer = harness.start(run, settings={"checkpoint.every_n_steps": 1})
    assert answer["codes"] == [0] and answer["text"].count("metrics.jsonl is not what it was") == 1
    (alarm,) = [
        line
        for line in map(json.loads, (run / "alarms.jsonl").read_text().splitlines())
        if "metrics.jsonl" in line["text"]
    ]
    assert "lines of it were lost or changed" in alarm["text"]


def test_a_damaged_evaluation_is_a_sentence(harness, tmp_path):
    """A line in the middle: exit code 3 with file and line, and the run goes on when it is
    mended."""
    run = tmp_path / "run"
    harness.start(run, fault="rollout:5:kill")
    good = (run / "evaluation.jsonl").read_bytes()
    (run / "evaluation.jsonl").write_bytes(good[:20] + b"\n" + good[20:])
    answer = harness.start(run)
    assert (
        answer["codes"] == [3]
        and "evaluation.jsonl, line 1: expected a JSON object" in answer["text"]
        and "Traceback" not in answer["text"]
    )
    (run / "evaluation.jsonl").write_bytes(good)
    assert harness.start(run)["codes"] == [0]


def test_a_run_folder_that_is_renamed_ends_the_run(harness, tmp_path):
    """It does not train on into a new, broken one; where it is now it can be continued."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    renamer = threading.Thread(target=lambda: (_wait_for(run / "metrics.jsonl"), run.rename(moved)))
    renamer.start()
    answer = harness.start(run, fault="rollout:4-:slow")
    renamer.join()
    assert (
        answer["codes"] == [73]
        and "was renamed or removed" in answer["text"]
        and "Traceback" not in answer["text"]
    )
    assert not run.exists()
    assert harness.start(moved)["codes"] == [0]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
