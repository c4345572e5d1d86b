"""Results of an experiment: what a line holds, what is refused or missing, what is claimed."""

import json

import pytest

from rlp.config import ConfigError
from rlp.measure.results_file import Layout, add_result, add_results, read_results
from rlp.process.faults import InjectedFault
from rlp.process.schemas import PLAIN

LAYOUT = Layout(("arm", "seed", "stage", "temperature"), ("accuracy", "gain"), {"curve": PLAIN})


def line(arm="rlp", seed=0, stage="pretrain", temperature=1.0, accuracy=0.5, **more):
    identity = {"arm": arm, "seed": seed, "stage": stage, "temperature": temperature}
    return identity | {"accuracy": accuracy, "gain": None} | more


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def test_lines_are_added_and_chosen(path):
    assert read_results(path, LAYOUT).lines == ()
    for seed in (0, 1):
        add_result(path, LAYOUT, line(seed=seed, accuracy=0.5 + seed / 10, curve=[1, 2]))
        add_result(path, LAYOUT, line(seed=seed, temperature=0.3))
    results = read_results(path, LAYOUT)
    assert results.values("temperature") == [1.0, 0.3] and results.values("seed") == [0, 1]
    assert results.where(temperature=1).by_seed("rlp", "accuracy") == {0: 0.5, 1: 0.6}
    assert results.where(temperature=1).by_seed("rlp", "gain") == {}
    assert results.has(arm="rlp", seed=1) and not results.has(arm="rlp", seed=2)
    with pytest.raises(ConfigError, match="two lines for one seed.*temperature 1.0; and .*0.3"):
        results.by_seed("rlp", "accuracy")
    with pytest.raises(ValueError, match="panel: lines of results.jsonl are identified by arm"):
        results.where(panel="held_out")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"seed": "0"}, "wrong value: seed is '0', expected a whole number"),
        ({"accuracy": "good"}, "wrong value: accuracy is 'good', expected a number"),
        ({"accuracy": float("inf")}, "wrong value: accuracy is inf"),
        ({"acuracy": 0.5}, "an unknown 'acuracy'. Did you mean 'accuracy'?"),
    ],
)
def test_a_line_that_is_not_of_the_layout_is_refused(path, wrong, said):
    """In the file by its number, and before it is added; the file stays as it was."""
    with pytest.raises(ConfigError, match=said):
        add_result(path, LAYOUT, line() | wrong)
    assert not path.exists()
    path.write_text(json.dumps(line()) + "\n" + json.dumps(line(seed=1) | wrong) + "\n")
    with pytest.raises(ConfigError, match=f"line 2 has .*{said}"):
        read_results(path, LAYOUT)


def test_a_name_that_is_lacking_is_named(path):
    short = line()
    del short["gain"], short["stage"]
    path.write_text(json.dumps(short) + "\n")
    with pytest.raises(ConfigError, match="line 1 has no stage, gain"):
        read_results(path, LAYOUT)


def test_nothing_stands_twice_and_nothing_is_written_over(path):
    add_result(path, LAYOUT, line())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="has a line of arm rlp, seed 0, stage pretrain, temp"):
        add_result(path, LAYOUT, line(accuracy=0.9))
    assert path.read_bytes() == before
    path.write_bytes(2 * before)
    with pytest.raises(ConfigError, match="line 2 is of arm rlp, seed 0.* as line 1 is"):
        read_results(path, LAYOUT)


def test_half_a_line_is_made_again_and_a_whole_one_is_ended(path, monkeypatch):
    """A crash leaves the first half of a line; an editor takes the end of the last."""
    add_result(path, LAYOUT, line())
    monkeypatch.setenv("RLP_FAULT", "results.torn_line:1:raise")
    with pytest.raises(InjectedFault):
        add_result(path, LAYOUT, line(seed=1))
    monkeypatch.delenv("RLP_FAULT")
    assert not path.read_bytes().endswith(b"\n")
    add_result(path, LAYOUT, line(seed=1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    add_result(path, LAYOUT, line(seed=2))
    assert read_results(path, LAYOUT).lines == (line(), line(seed=1), line(seed=2))


def test_lines_of_one_stage_are_added_together_or_not_at_all(path):
    """One that can not be added keeps the others out too."""
    add_results(path, LAYOUT, [line(), line(temperature=0.3)])
    before = path.read_bytes()
    for wrong in (line(temperature=0.3), line(seed=1), line(seed=2) | {"gain": "much"}):
        with pytest.raises(ConfigError, match="a line of arm rlp|wrong value"):
            add_results(path, LAYOUT, [line(seed=1), wrong])
    assert path.read_bytes() == before
    assert [one["temperature"] for one in read_results(path, LAYOUT).lines] == [1.0, 0.3]


def test_what_is_missing_is_said_in_one_message(path):
    for arm, seed in (("rlp", 0), ("rlp", 1), ("cpt", 0)):
        add_result(path, LAYOUT, line(arm, seed))
    results = read_results(path, LAYOUT)
    assert results.missing(["rlp"], [0, 1]) == ""
    results.require(["rlp"], [0, 1])
    with pytest.raises(ConfigError) as error:
        results.require(["rlp", "cpt", "base"], [0, 1, 2])
    assert "no line of rlp (seed 2); cpt (seeds 1, 2); base (all 3 seeds)." in str(error.value)


def test_the_claim_is_written_from_the_lines(path):
    for seed in range(6):
        for arm, accuracy in (("rlp", 0.9), ("cpt", 0.5)):
            add_result(path, LAYOUT, line(arm, seed, accuracy=accuracy + seed / 100))
    claim = read_results(path, LAYOUT).claim("rlp", {"rlp": "RLP", "cpt": "CPT"}, "accuracy")
    assert claim == "RLP is above CPT (exact paired test, 6 seeds, Holm over 1 arm)."
