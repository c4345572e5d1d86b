"""Runs that are killed, or whose disk fails, at every named point, and continued: nothing is lost,
nothing is made twice."""

import ast
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from rlp.learn.checkpoint import CheckpointError, newest_checkpoint, open_checkpoint
from rlp.measure.journal import audit, weighted_bits
from rlp.process.faults import COMMAND_POINTS, FAULT_POINTS, TENSOR_POINTS, fault
from tests import REPOSITORY
from tests.faults.harness import SAVE_EVERY, SETTINGS, STEPS, Case, came_after_the_last_step
from tests.faults.playing import damage, played

BFLOAT16 = {"engine.dtype": "bfloat16", "budget.steps": 4}

CASES = {
    "before the first checkpoint": Case(
        (
            "folder.before_rename:1:kill",
            "evaluation:1:kill",
            "rollout:1:kill",
            "score:4:kill",
            "append.torn_line:5:kill",
            "save.before_part:1:kill",
        )
    ),
    "in the first save": Case(
        (
            "save.torn_part:1:kill",
            "save.after_shard:1:kill",
            "save.before_meta:1:kill",
            "save.before_complete:1:kill",
            "save.before_rename:1:kill",
            "save.after_rename:1:kill",
        )
    ),
    "while resuming": Case(
        (
            "rollout:5:kill",
            "resume.before_restore:1:kill",
            "resume.before_truncate:3:kill",
            "append.before_line:3:kill",
        )
    ),
    "in a step": Case(
        (
            "backward:11:kill",
            "optimizer:2:kill",
            "teacher.refresh:3:kill",
            "step.before_log:2:kill",
            "append.torn_line:9:kill",
            "append.after_line:8:kill",
            "rollout:1:raise",
            "purge.before_old:1:kill",
        )
    ),
    "at the end": Case(
        (
            "save.torn_part:3:exit",
            "purge.before_delete:1:kill",
            "export.before_write:1:kill",
            "export.before_rename:1:kill",
            "export.after_rename:1:kill",
            "summary:1:kill",
            "lock.before_release:1:kill",
        )
    ),
    "while a folder or its first checkpoint is written": Case(
        (
            "folder.torn_config:1:kill",
            "folder.torn_environment:1:kill",
            "lock.torn_owner:1:kill",
            "lock.beat:1:kill",
            "lock.torn_owner:1:kill",
            "lock.before_rename:1:kill",
            "save.before_folder:1:kill",
            "save.torn_meta:1:kill",
            "save.torn_complete:1:kill",
        )
    ),
    "while the end is written": Case(
        (
            "export.torn_weights:1:kill",
            "export.torn_format:1:kill",
            "export.torn_card:1:kill",
            "end.torn_ledger:1:kill",
            "end.torn_summary:1:kill",
            "report.torn_page:1:kill",
        )
    ),
    "the export meets a full disk, the summary a broken one": Case(
        ("export.before_rename:1:enospc", "summary:1:eio")
    ),
    "logs are refused until the run dies": Case(("append.torn_line:13-:enospc,rollout:6:kill",)),
    "bfloat16, stage 1": Case(("optimizer:3:kill",), settings=BFLOAT16),
    "bfloat16, stage 3": Case(("optimizer:3:kill",), settings=BFLOAT16 | {"engine.zero_stage": 3}),
    "one of two ranks": Case(
        ("save.torn_part:1:kill@rank1", "save.before_rename:1:kill@rank0", "backward:5:kill@rank1"),
        survived="save.torn_part:1:enospc@rank1",
        ranks=2,
    ),
    "one of two ranks, stage 3": Case(
        ("optimizer:3:kill@rank1",), ranks=2, settings={"engine.zero_stage": 3, "budget.steps": 4}
    ),
    "one of two ranks, continued on one": Case(("rollout:4:kill@rank0",), ranks=2, resume_ranks=1),
}
"""Each fault is one attempt of a run, which the next continues."""


SLOW = ("bfloat16, stage 1", "one of two ranks, stage 3")
"""Whose mechanisms other cases have too."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES],
)
def test_a_run_that_dies_is_continued_as_if_it_had_not(harness, name):
    """Journal, metrics, thoughts, evaluations and export are the uninterrupted run's, bit for bit;
    at most the steps since the last save are made again; a survivor ends by itself, within
    seconds."""
    case = CASES[name]
    outcome = played(harness, case, name)
    assert max(outcome.survivor_s, default=0) < SETTINGS["run.watchdog_s"]
    assert max(outcome.lost_steps) <= SAVE_EVERY
    for asked, codes in zip(case.faults, outcome.codes):
        if "kill" in asked:
            assert -9 in codes, (asked, codes)


def test_every_writer_may_fail_without_stopping_the_run(harness):
    """A full and a broken disk at shard, meta.json, rename, purge and logs: said each time, and the
    next save works."""
    refused = [
        "save.torn_part:1:enospc",
        "save.before_meta:1:eio",
        "save.before_complete:1:enospc",
        "save.before_rename:1:eio",
        "append.torn_line:12-15:enospc",
        "append.before_line:30:eio",
        "purge.before_old:1:enospc",
    ]
    outcome = played(
        harness,
        Case(
            survived=",".join(refused),
            settings={"checkpoint.every_n_steps": 1, "checkpoint.keep": 1},
        ),
        "writers",
    )
    assert outcome.text.count("the checkpoint could not be written") == 4
    assert "an old checkpoint could not be removed" in outcome.text
    assert "lines wait in memory" in outcome.text


def test_a_checkpoint_is_not_made_without_the_log_lines_before_it(harness):
    """Else a crash after it would leave a hole in the metrics that no resume fills."""
    case = Case(("append.before_line:3-:enospc,rollout:7:kill",))
    outcome = harness.play(case, "no_logs")
    assert outcome.problems == []
    assert outcome.text.count("could not be written") == 2
    assert "begins again at step 0" in outcome.text


DAMAGES = (
    "a flipped bit",
    "a truncated part",
    "an empty part",
    "a deleted part",
    "a changed meta.json",
    "an empty meta.json",
    "a deleted COMPLETE",
    "a COMPLETE that is no text",
    "an empty folder",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(harness, ranks, tmp_path, kind):
    """It is said and set aside, never deleted; where none is good there is no start from scratch,
    at this try or the next."""
    parent = tmp_path / "checkpoints"
    shutil.copytree(harness.reference(1, {}) / "checkpoints", parent)
    damage(parent / f"step_{STEPS}", kind)
    said: list[str] = []
    assert newest_checkpoint(parent, ranks, said.append).step == STEPS - SAVE_EVERY
    assert len(said) == 1 and len(list(parent.glob(f"set_aside.step_{STEPS}.*"))) == 1
    damage(parent / f"step_{STEPS - SAVE_EVERY}", kind)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No good checkpoint is left"):
            newest_checkpoint(parent, ranks, said.append)
    assert len(list(parent.glob("set_aside.*"))) == 2


def test_a_checkpoint_that_another_one_replaces_goes_last(harness, ranks, tmp_path):
    """With `keep: 1` the only other checkpoint stands until the new one is complete."""
    run = tmp_path / "run"
    harness.start(run, fault="save.before_rename:2:kill", settings={"checkpoint.keep": 1})
    assert open_checkpoint(run / "checkpoints" / "step_2").step == 2
    answer = harness.start(run, settings={"checkpoint.keep": 1})
    assert answer["codes"] == [0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{STEPS}"]


def test_a_run_past_its_first_checkpoint_does_not_begin_again(harness, tmp_path):
    """Its checkpoints were deleted: stop, and leave all as it is. A complete run has nothing to
    do."""
    run = tmp_path / "run"
    harness.start(run, fault="rollout:5:kill")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    answer = harness.start(run)
    assert answer["codes"] == [2] and "run.resume=never for a new run" in answer["text"]
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "summary.json").write_text("{}")
    answer = harness.start(run)
    assert answer["codes"] == [0] and "nothing to do" in answer["text"]


def test_a_complete_run_keeps_what_it_logged_after_its_last_checkpoint(harness, tmp_path):
    """The disk was full at every save but the first, and not at the end."""
    run = tmp_path / "run"
    answer = harness.start(run, fault="save.before_meta:2-:enospc")
    assert answer["codes"] == [0] and "could not be written" in answer["text"]
    logs = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}

    (run / ".report.html.0123456789abcdef.partial").write_text("half")  # a crash at the very end
    answer = harness.start(run)
    assert answer["codes"] == [0] and "nothing to do" in answer["text"]
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == logs
    assert not list(run.glob(".*.partial"))


def test_another_model_or_tokenizer_in_the_same_place_is_refused(harness, tmp_path):
    """The config names the same folder, and what is in it has changed."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(harness.model, model)
    settings = {"model.path": str(model), "budget.steps": 2}
    harness.start(run, fault="summary:1:kill", settings=settings)
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace('"w7"', '"x7"'))
    answer = harness.start(run, settings=settings)
    assert (
        answer["codes"] == [2]
        and "the tokenizer (model.tokenizer, else model.path) changed" in answer["text"]
    )
    (model / "tokenizer.json").write_text(text)
    described = json.loads((model / "config.json").read_text())
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import architecture

    other = architecture("qwen3")
    other.intermediate_size = described["intermediate_size"] + 8
    AutoModelForCausalLM.from_config(other).save_pretrained(model)
    answer = harness.start(run, settings=settings)
    assert (
        answer["codes"] == [2] and "the config of the model in model.path changed" in answer["text"]
    )


@pytest.fixture(scope="module")
def interrupted(harness) -> Path:
    """A run of two ranks under stage 1 that died in step 3."""
    harness.start(
        harness.folder / "interrupted",
        ranks=2,
        fault="rollout:4:kill",
        settings={"budget.steps": 4},
    )
    return harness.folder / "interrupted"


@pytest.mark.parametrize("ranks, stage", [(1, 1), (1, 3), (2, 2)])
def test_a_checkpoint_goes_on_elsewhere_with_the_same_numbers(harness, interrupted, ranks, stage):
    """Saved on two ranks under stage 1: every number of every later step within 1e-5 in float32,
    with the same documents and thoughts."""
    run = harness.folder / f"elsewhere_{ranks}_{stage}"
    shutil.copytree(interrupted, run)
    answer = harness.start(
        run, ranks=ranks, settings={"engine.zero_stage": stage, "budget.steps": 4}
    )
    assert answer["codes"] == [0] * ranks, answer["text"]
    assert "at step 2" in answer["text"]
    found = audit(run, harness.reference(1, {}), tolerance=1e-5)
    assert found == [f"step {step} is missing" for step in range(5, STEPS + 1)]


def test_the_journal_tells_runs_apart(harness, tmp_path):
    """A missing, a repeated and a changed step are found, each by what it is."""
    reference = harness.reference(1, {})
    assert audit(reference, reference) == []
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(reference / "config.yaml", other)
    lines = [json.loads(line) for line in (reference / "journal.jsonl").read_text().splitlines()]
    lines[1]["documents"], lines[2]["state"], lines[3]["numbers"]["optim/grad_norm"] = (
        "0" * 16,
        "0" * 16,
        (1.5).hex(),
    )
    (other / "journal.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines[:4], lines[3]])
    )
    found = audit(other, reference)
    for expected in (
        "step 4 is there 2 times",
        "step 5 is missing",
        "step 6 is missing",
        "step 2: documents is 0",
        "step 3: state is 0",
        "step 4: optim/grad_norm is 1.5",
    ):
        assert any(difference.startswith(expected) for difference in found), (expected, found)
    assert len(found) == 6


def test_the_state_digest_does_not_depend_on_how_a_tensor_is_cut():
    """Sums of the pieces that ranks own add up to that of the whole; a changed bit, and a changed
    order, are seen."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = weighted_bits(values, 0)
    for cut in (1, 333, 999):
        assert (weighted_bits(values[:cut], 0) + weighted_bits(values[cut:], cut)) % 2**64 == whole
    changed = values.clone()
    changed.view(torch.int32)[500] ^= 1
    assert len({whole, weighted_bits(changed, 0), weighted_bits(values.flip(0), 0)}) == 3


def calls_of(path: Path) -> set[str]:
    """Names of the points that a file calls, or hands to what writes for it (`point=`)."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    called = [
        node.args[0]
        for node in calls
        if isinstance(node.func, ast.Name)
        and node.func.id in ("fault", "poisoned", "poisoned_gradient")
    ]
    handed = [word.value for node in calls for word in node.keywords if word.arg == "point"]
    return {name.value for name in [*called, *handed] if isinstance(name, ast.Constant)}


def test_every_point_of_the_tables_is_in_the_code_and_the_reverse():
    files = [path for path in (REPOSITORY / "rlp").rglob("*.py") if path.stem != "faults"]
    expected = FAULT_POINTS.keys() | COMMAND_POINTS.keys() | TENSOR_POINTS.keys()
    assert set().union(*(calls_of(path) for path in [*files, REPOSITORY / "train.py"])) == expected


NOT_KILLED_AT = {
    "folder.before_discard",
    "resume.before_aside",
    "save.before_aside",
    "append.torn_rank_log",
}
"""Points of a run that no run of the harness comes to by itself: each is before a single rename, or
in what libraries say."""


def test_every_point_is_killed_at_in_some_case():
    asked = itertools.chain.from_iterable(case.faults for case in CASES.values())
    assert {
        text.split(":")[0] for text in asked if ":kill" in text
    } == FAULT_POINTS.keys() - NOT_KILLED_AT


@pytest.mark.parametrize(
    "text", ["nowhere:1:kill", "rollout:1:explode", "rollout:kill", "rollout:1:nan", "loss:1:kill"]
)
def test_a_misspelled_fault_is_refused(monkeypatch, text):
    """Else a test that meant to break something breaks nothing, and passes."""
    monkeypatch.setenv("RLP_FAULT", text)
    with pytest.raises(ValueError, match="RLP_FAULT"):
        fault("rollout")


def test_a_stop_that_comes_after_the_last_step_is_told_from_one_before_it():
    """The first lets a run be complete; the second has to be obeyed."""
    late = "step 5/6  reward\nstep 6/6  reward\nfault at score, passage 25, rank 0: hup\n"
    early = "step 5/6  reward\nfault at score, passage 21, rank 0: hup\nstep 6/6  reward\n"
    assert came_after_the_last_step(late) and not came_after_the_last_step(early)
    assert not came_after_the_last_step("step 1/16  reward\nfault at score, passage 2, rank 0: hup")
