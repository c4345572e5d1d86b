"""A pipeline that is killed, and started again until it is done, leaves what one that was never
interrupted leaves."""

import random
import signal
from pathlib import Path

import pytest

from tests.post.pipelines import Pipelines, differing

KILLED = -signal.SIGKILL

FAULTS = (
    # The disk is full where the first model of SFT is kept.
    ("stage.before_model:1:enospc", 1),
    ("stage.after_step:2:kill", KILLED),  # SFT, behind a model that is kept
    ("stage.torn_checkpoint:6:kill", KILLED),  # RLVR
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
        told.append(said)
    assert "rlp+sft: FAILED: [Errno 28] No space left on device" in told[0]
    assert "1 stages failed, 1 that need them wait" in told[0] and "Traceback" not in told[0]
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

    config.write_text(before)
    told = rows.read_text()
    rows.write_text(told.replace("north", "south", 1))
    code, said = pipelines.start(config)
    assert code == 2 and "rlp+sft+rlvr is finished" in said and "0_rlvr.jsonl was" in said

    rows.write_text(told)
    code, said = pipelines.start(config)
    assert code == 0 and "4 of 4 stages are done, 0 are left" in said


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
