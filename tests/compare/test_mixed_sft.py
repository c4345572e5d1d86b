"""Rounds of mixed SFT: what they cost together, what each begins with, and what is kept of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlp.compare.mixed_sft import MixedSft, iterate
from rlp.config import Config, ConfigError, load_config
from rlp.process.exit_codes import DONE, PREEMPTED
from rlp.process.json_files import DamagedFileError
from tests.training import read_lines, tiny_config, train

FINE = ("optim.batch_size=2", "optim.micro_batch_size=2")
"""Steps that are small against the run that is matched."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, corpus, ranks) -> Path:
    """An RLP run with a panel."""
    folder = tmp_path_factory.mktemp("finished") / "rlp"
    settings = {"budget__steps": 12, "data__held_out": f"[{corpus}]"}
    quiet = {"evaluation__every_n_steps": 0, "logging__every_n_steps": 1000}
    assert train(tiny_config(folder, model_folder, corpus, **settings, **quiet), ranks) == DONE
    return folder


def asking(finished: Path, **settings: object) -> MixedSft:
    usual = {"run": str(finished), "documents": 4, "learning_rate": 1e-3, "overrides": FINE}
    return MixedSft(**usual | settings)


def trains(ranks: object, configs: list[Config]) -> Callable[[Config], int]:
    """What runs a config, and keeps it."""

    def run(config: Config) -> int:
        configs.append(config)
        return train(config, ranks)

    return run


def test_rounds_spend_together_what_the_run_has_spent(finished, tmp_path, ranks, capsys):
    """Three of them: each thinks with the model of the one before it about the next documents,
    trains at the asked rate on thoughts and targets, and ends at its third; the last one asserts
    the match, and its ledger holds all."""
    configs, out = [], tmp_path / "rounds"
    code, run = iterate(asking(finished), out, ranks, trains(ranks, configs))
    assert code == DONE and run.path == out / "round_3" / "run"
    assert capsys.readouterr().out.rstrip().endswith(": matched")
    assert {config.optim.learning_rate for config in configs} == {1e-3}
    assert {config.data.loss_field for config in configs} == {"loss_spans"}
    assert [config.match.ledger is None for config in configs] == [True, True, False]

    whole = json.loads((finished / "ledger.json").read_text())
    before, documents = {"flops": 0.0}, []
    for number in (1, 2, 3):
        folder = out / f"round_{number}"
        splicing = load_config(folder / "spliced" / "config.yaml")
        start = load_config(finished / "config.yaml").model.path
        expected = start if number == 1 else str(out / f"round_{number - 1}" / "run" / "export")
        assert splicing.model.path == configs[number - 1].model.path == expected
        documents += [line["document"] for line in read_lines(folder / "spliced/documents.jsonl")]
        made, spent = (
            json.loads((folder / of / "ledger.json").read_text()) for of in ("spliced", "run")
        )
        assert before["flops"] < made["flops"] < spent["flops"]
        assert spent["flops"] == pytest.approx(whole["flops"] * number / 3, rel=0.01)
        before = spent
    assert len(set(documents)) == len(documents) == 12

    lines = read_lines(out / "rounds.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[2]["flops"] == before["flops"] and "gain_over_start_nats" in lines[2]


def test_an_interrupted_iteration_goes_on(finished, tmp_path, ranks):
    """Stopped before the second round trains: the first one is kept as it is, and what was spliced
    too."""
    asked, configs = asking(finished, rounds=2), []
    run = trains(ranks, configs)

    def stopped(config: Config) -> int:
        return run(config) if not configs else PREEMPTED

    out = tmp_path / "rounds"
    code, last = iterate(asked, out, ranks, stopped)
    assert code == PREEMPTED and last.path == out / "round_2" / "run"
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    code, last = iterate(asked, out, ranks, run)
    assert code == DONE and len(configs) == 2
    assert {path: path.stat().st_mtime_ns for path in kept if path.name != "rounds.jsonl"} == {
        path: time for path, time in kept.items() if path.name != "rounds.jsonl"
    }


def test_what_can_not_be_iterated_is_refused(finished, tmp_path, ranks):
    """Each with its own words; a folder that is there stays as it is."""

    def refused(words: str, out: Path = tmp_path / "out", **settings: object) -> None:
        with pytest.raises(ConfigError, match=words):
            iterate(asking(finished, **settings), out, ranks, trains(ranks, []))

    refused("--rounds must be at least 1", rounds=0)
    refused("--learning-rate must be above 0", learning_rate=0.0)
    refused("--loss must be one of all, thought_and_target", loss="thought")
    refused("is not finished", run=str(tmp_path))
    refused("optim.learning_rate is set by the rounds", overrides=("optim.learning_rate=1",))
    assert not (tmp_path / "out").exists()
    refused("--documents 60: with their thoughts .* are spent before round 1", documents=60)
    refused("was begun with documents 60, got 4", documents=4)
    (tmp_path / "out" / "mixed_sft.json").write_text("[]")
    with pytest.raises(DamagedFileError, match="mixed_sft.json: the value is"):
        iterate(asking(finished), tmp_path / "out", ranks, trains(ranks, []))

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "file").write_text("precious")
    refused("is no folder of rlp mixed-sft", foreign)
    assert [path.name for path in foreign.iterdir()] == ["file"]

    half = tmp_path / "half"
    iterate(asking(finished, rounds=1), half, ranks, lambda config: PREEMPTED)
    (half / "round_1" / "spliced" / "ledger.json").unlink()
    refused("round_1/spliced has no ledger.json", half, rounds=1)


def test_steps_that_are_too_large_are_told_before_a_round_is_trained(finished, tmp_path, ranks):
    configs = []
    with pytest.raises(ConfigError, match="can not be sure to spend what the run has"):
        iterate(asking(finished, overrides=()), tmp_path / "out", ranks, trains(ranks, configs))
    assert not configs
