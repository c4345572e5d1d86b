"""A pipeline that is killed, and started again until it is done, leaves what one that was never
interrupted leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_plan import Costs
from rlp.post.pipeline_tasks import every_task
from rlp.post.traces import read_traces
from rlp.process.ranks import start_ranks
from tests import REPOSITORY
from tests.post.pipelines import LIMIT_S, Pipelines, differing

KILLED = -signal.SIGKILL

FAULTS = (
    # The disk is full where the first model of SFT is kept.
    ("stage.before_model:1:enospc", 1),
    ("stage.after_step:1:term", 75),  # step 3 of SFT, which no checkpoint is due at
    ("stage.after_step:2:kill", KILLED),  # SFT, behind a model that is kept
    ("stage.torn_checkpoint:4:kill", KILLED),  # RLVR
    ("stage.torn_rollouts:1:kill", KILLED),  # RLVR, in the step that it goes on with
    ("pipeline.torn_manifest:1:kill", KILLED),  # RLVR is done, and nobody has been told
)
"""Each strikes in a start of its own, which ends with this code."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory):
    made = Pipelines(tmp_path_factory.mktemp("pipelines"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(pipelines: Pipelines) -> Path:
    """The folder of a pipeline that nobody has killed."""
    code, said = pipelines.start(pipelines.write("undisturbed"))
    assert code == 0, said
    return pipelines.folder / "undisturbed"


def test_a_pipeline_that_fails_and_is_killed_ends_as_an_undisturbed_one(pipelines, undisturbed):
    """Weights, tokens, costs and figures bit for bit, and no file more or less. A stage that fails
    leaves those before it standing, and says how to go on."""
    config, told = pipelines.write("killed"), []
    for fault, expected in FAULTS:
        code, said = pipelines.start(config, fault=fault)
        assert code == expected, f"{fault}: {said}"
        saved = pipelines.folder / "killed/seed_0/rlp+sft/work/checkpoints/checkpoint-3/ledger.json"
        assert saved.exists() or code != 75, f"{fault}: {said}"
        told.append(said)
    assert "rlp+sft: FAILED: [Errno 28] No space left on device" in told[0]
    assert "1 stages failed, 1 that need them wait" in told[0] and "Traceback" not in told[0]
    assert "asked to stop, and saved. Start the same command again" in told[1]
    code, said = pipelines.start(config)
    assert code == 0 and "3 of 4 stages are done" in said, said
    assert differing(pipelines.folder / "killed", undisturbed) == []


def test_a_finished_stage_whose_inputs_changed_is_refused(pipelines, undisturbed):
    """With what changed and where, and nothing is written."""
    config = pipelines.folder / "undisturbed.yaml"
    before = config.read_text()
    config.write_text(before.replace("steps: 5", "steps: 6"))
    rows = pipelines.world / "0_rlvr.jsonl"
    code, said = pipelines.start(config)
    assert code == 2 and "settings.steps was 5, now 6" in said and "seed_0/rlp+sft is" in said

    assert (undisturbed / "pipeline.yaml").read_text() == before

    config.write_text(before)
    told = rows.read_text()
    rows.write_text(told.replace("north", "south", 1))
    code, said = pipelines.start(config)
    assert code == 2 and "rlp+sft+rlvr is finished" in said and "0_rlvr.jsonl was" in said

    rows.write_text(told)
    code, said = pipelines.start(config)
    assert code == 0 and "4 of 4 stages are done, 0 are left" in said


def test_a_ledger_counts_what_a_stage_has_done(undisturbed):
    """A row of SFT is 12 words of the question, `faces`, a thought of 12 words in its markers, the
    answer, a full stop and the end: 30 tokens. A prompt of RLVR is 14, and each of 4 steps has 8
    completions, which the paper charges at their budget of 16."""
    ledger = TaskFolder(undisturbed / "seed_0" / "rlp+sft").ledger()
    assert (ledger.optimizer_steps, ledger.input_tokens) == (5, 5 * 4 * 30)
    assert (ledger.generated_tokens, ledger.rewarded_tokens) == (0, 0)
    assert ledger.paper_flops == ledger.input_tokens and ledger.flops > 0

    ledger = TaskFolder(undisturbed / "seed_0" / "rlp+sft+rlvr").ledger()
    completions = 4 * 2 * 4
    assert (ledger.optimizer_steps, ledger.input_tokens) == (4, completions * 14)
    assert 0 < ledger.generated_tokens == ledger.rewarded_tokens <= completions * 16
    assert ledger.paper_flops == completions * (14 + 16)


def test_the_rollouts_of_rlvr_are_traces(undisturbed):
    """All 4 steps of 8 completions, in their order, with the reward that they were given."""
    path = undisturbed / "seed_0" / "rlp+sft+rlvr" / "work" / "rollouts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    for row, trace in zip(rows, read_traces(path)):
        assert (trace.prompt, trace.text) == (row["prompt"], row["completion"])
        assert (trace.right, trace.cut) == (row["right"] > 0, row["truncated"])
        assert row["right"] in (0.0, 1.0) and trace.prompt.endswith("<think>")


def test_what_a_stage_kept_on_its_way_cost_its_part(undisturbed):
    """The model of step 3 of 5 steps of equal rows; the run's from its log."""
    (early, _), (last, _) = TaskFolder(undisturbed / "seed_0" / "rlp+sft").kept()
    assert (early.step, last.step) == (3, 5)
    assert early.spent.flops == pytest.approx(last.spent.flops * 3 / 5)
    (early, _), (last, _) = TaskFolder(undisturbed / "seed_0" / "rlp").kept()
    assert (early.step, last.step) == (2, 4) and 0 < early.spent.flops < last.spent.flops


def test_a_plan_bounds_what_a_stage_costs(pipelines, undisturbed):
    """Steps are exact and FLOPs an upper bound, before anything has run."""
    pipeline = load_pipeline(pipelines.write("planned"))
    tasks = every_task(pipeline)
    costs = Costs(tasks, pipeline, start_ranks())
    for task in tasks[1:]:
        cost, spent = costs.of(task), TaskFolder(undisturbed / task.name).ledger()
        assert not cost.is_measured and cost.steps == spent.optimizer_steps
        assert spent.flops <= cost.flops <= 10 * spent.flops, task.name
        assert cost.seconds > 0


@pytest.mark.slow
def test_stages_side_by_side_make_what_one_after_the_other_makes(pipelines, undisturbed):
    """In two processes, of which one is killed while it works: its stage fails, is told, and is
    there after the next start."""
    config = pipelines.write("side_by_side")
    command = [sys.executable, "-m", "rlp", "pipeline", str(config), "--workers", "2"]
    killed = os.environ | {"RLP_FAULT": "stage.after_step:1:kill"}
    done = subprocess.run(command, env=killed, text=True, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 1, done.stderr
    assert "rlp+sft: FAILED: the process that did it has ended with signal SIGKILL" in done.stdout
    done = subprocess.run(command, text=True, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert differing(pipelines.folder / "side_by_side", undisturbed) == []


@pytest.mark.slow
def test_stages_side_by_side_save_where_they_are_asked_to_stop(pipelines, undisturbed):
    """SIGTERM to the command: its processes save at the step that they are in."""
    config = pipelines.write("asked", ("steps: 5\n", "steps: 5000\n"))
    command = [sys.executable, "-m", "rlp", "pipeline", str(config), "--workers", "2"]
    began = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, cwd=REPOSITORY)
    work = pipelines.folder / "asked" / "seed_0" / "rlp+sft" / "work"
    deadline = time.monotonic() + LIMIT_S
    while not (work / "checkpoints" / "checkpoint-2").exists():
        assert began.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    began.terminate()
    said, _ = began.communicate(timeout=LIMIT_S)
    assert began.returncode == 75 and "asked to stop, and saved" in said, said
    assert "FAILED" not in said
    assert list((work / "checkpoints").glob("checkpoint-*/ledger.json"))


@pytest.mark.slow
def test_a_run_of_two_ranks_is_a_stage_as_any_other(pipelines, undisturbed):
    """Under the launcher of DeepSpeed; ranks change no more than the order of sums."""
    config = pipelines.write("ranks", ("    kind: rlp\n", "    kind: rlp\n    ranks: 2\n"))
    code, said = pipelines.start(config)
    assert code == 0, said
    folders = [path / "seed_0" / "rlp" for path in (pipelines.folder / "ranks", undisturbed)]
    one, other = (TaskFolder(folder).ledger() for folder in folders)
    assert one.input_tokens == other.input_tokens and one.flops == pytest.approx(other.flops, 0.1)


@pytest.mark.slow
def test_a_pipeline_killed_twenty_times_at_random_ends_as_an_undisturbed_one(
    pipelines, undisturbed
):
    """Killed at moments that no point of the program is chosen for. The time that a start is given
    grows, so that some start comes further than the one before it; where a pipeline is done before
    it was killed so often, another one is given less."""
    moment, most = random.Random(0), 8.0
    for attempt in range(8):
        name, kills, limit = f"random_{attempt}", 0, most / (attempt + 1)
        config = pipelines.write(name)
        while True:
            code, said = pipelines.start(config, kill_s=moment.uniform(0.1, limit))
            if code == 0:
                break
            assert code == KILLED, said
            kills, limit = kills + 1, limit * 1.04
        assert differing(pipelines.folder / name, undisturbed) == [], f"after {kills} kills"
        if kills >= 20:
            return
    raise AssertionError("no pipeline was killed twenty times before it was done")
