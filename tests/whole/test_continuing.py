"""What may be otherwise in the next life of a run, what may not, and that either is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlp.config import ConfigError
from rlp.measure.report import write_report
from rlp.process.exit_codes import DONE
from tests.tiny_models import WORDS
from tests.training import open_run, read_lines, tiny_config, train, write_corpus

SMALL = {
    "budget__steps": 2,
    "checkpoint__every_n_steps": 1,
    "optim__batch_size": 2,
    "thought__group_size": 2,
    "position__per_document": 1,
    "evaluation__panel_positions": 2,
}
"""Two steps, with a checkpoint after each."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, model_folder, corpus) -> Path:
    """All that a run reads, in a folder."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(model_folder, folder / "model")
    (folder / "instruction.txt").write_text("w1 w2")
    shutil.copy(corpus, folder / "train.jsonl")
    write_corpus(folder / "held_out.jsonl", [" ".join(WORDS[8:14])] * 3)
    return folder


def life(run: Path, inputs: Path, **overrides: object) -> object:
    settings = (
        SMALL
        | {
            "thought__instruction_file": inputs / "instruction.txt",
            "data__held_out": f"[{inputs / 'held_out.jsonl'}]",
        }
        | overrides
    )
    return tiny_config(run, inputs / "model", inputs / "train.jsonl", **settings)


def lowercase(inputs: Path) -> None:
    """The vocabulary stays; the normalizer makes other ids of the same text."""
    path = inputs / "model" / "tokenizer.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}})
    )


def other_weights(inputs: Path) -> None:
    path = inputs / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] *= 1 + 2**-7  # seen in bfloat16 too
    save_file(weights, path, metadata={"format": "pt"})


def other_norm(inputs: Path) -> None:
    path = inputs / "model" / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-3
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, named, settings",
    [
        (lowercase, "the tokenizer", {}),
        pytest.param(
            lambda inputs: (inputs / "instruction.txt").write_text("w1 w3"),
            "the text of thought.instruction_file",
            {},
            marks=pytest.mark.slow,
        ),
        (
            lambda inputs: write_corpus(inputs / "held_out.jsonl", [" ".join(WORDS[8:13])] * 3),
            "the files of data.held_out",
            {},
        ),
        pytest.param(other_norm, "the config of the model", {}, marks=pytest.mark.slow),
        (
            other_weights,
            "the weights in model.path",
            {"baseline__kind": "frozen", "engine__dtype": "bfloat16"},
        ),
        pytest.param(
            other_weights,
            "the weights in model.path",
            {"objective__kl_weight": 0.1, "engine__zero_stage": 3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["normalizer", "instruction", "held_out", "config", "weights_frozen", "weights_kl"],
)
def test_inputs_that_changed_between_two_lives_are_refused_by_name(
    tmp_path, inputs, ranks, change, named, settings
):
    """The config says the same, and what it names does not: no number after the resume would belong
    to those before."""
    mine = shutil.copytree(inputs, tmp_path / "inputs")
    assert train(life(tmp_path / "run", mine, budget__steps=1, **settings), ranks) == DONE
    resume = {"run__resume": tmp_path / "run" / "checkpoints" / "step_1"} | settings
    change(mine)
    with pytest.raises(
        ConfigError, match=f"other inputs than those that the config names: {named}.* changed"
    ):
        train(life(tmp_path / "next", mine, **resume), ranks)
    assert not (tmp_path / "next").exists()


@pytest.mark.slow
def test_weights_that_are_not_read_again_may_change(tmp_path, inputs, ranks):
    """With the EMA all weights of a resumed run come from its checkpoint."""
    mine = shutil.copytree(inputs, tmp_path / "inputs")
    assert train(life(tmp_path / "straight", mine), ranks) == DONE
    other_weights(mine)
    assert (
        train(
            life(
                tmp_path / "resumed",
                mine,
                run__resume=tmp_path / "straight" / "checkpoints" / "step_1",
            ),
            ranks,
        )
        == DONE
    )
    assert (
        read_lines(tmp_path / "resumed" / "metrics.jsonl")
        == read_lines(tmp_path / "straight" / "metrics.jsonl")[1:]
    )


def test_a_resume_with_other_settings_of_what_is_to_come_says_what_changed(
    tmp_path, inputs, ranks, capsys
):
    """What a message advises is accepted: another learning rate, more bad rows, a longer budget, no
    evaluation. Each change is kept with its first step, through a further resume, and the report
    shows it."""
    run = tmp_path / "run"
    assert train(life(run, inputs), ranks) == DONE
    (run / "summary.json").unlink()
    changed = {
        "optim__learning_rate": 0.5e-2,
        "data__max_bad_fraction": 0.25,
        "optim__spike_factor": 50.0,
        "data__held_out": "[]",
        "budget__steps": 3,
    }
    assert train(life(run, inputs, run__resume="auto", **changed), ranks) == DONE

    told = {
        "data.held_out": ([str(inputs / "held_out.jsonl")], []),
        "data.max_bad_fraction": (0.01, 0.25),
        "optim.learning_rate": (1e-2, 0.5e-2),
        "optim.spike_factor": (0.0, 50.0),
        "budget.steps": (2, 3),
    }
    lines = read_lines(run / "config_changes.jsonl")
    assert {line["key"]: (line["from"], line["to"]) for line in lines} == told and {
        line["step"] for line in lines
    } == {3}
    assert "from step 3 on: optim.learning_rate is 0.005, was 0.01" in capsys.readouterr().out
    assert [line["optim/learning_rate"] for line in read_lines(run / "metrics.jsonl")] == [
        1e-2,
        1e-2,
        0.5e-2,
    ]
    assert [line["step"] for line in read_lines(run / "evaluation.jsonl")] == [0, 2]
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "optim.learning_rate" in page and "0.005" in page

    further = {
        **changed,
        "data__held_out": f"[{inputs / 'held_out.jsonl'}]",
        "budget__steps": 4,
        "run__resume": run / "checkpoints" / "step_3",
    }
    assert train(life(tmp_path / "further", inputs, **further), ranks) == DONE
    kept = read_lines(tmp_path / "further" / "config_changes.jsonl")
    assert kept[: len(lines)] == lines and {
        line["key"]: line["step"] for line in kept[len(lines) :]
    } == {"data.held_out": 4, "budget.steps": 4}
    assert [line["step"] for line in read_lines(tmp_path / "further" / "evaluation.jsonl")] == [4]


def test_a_change_that_no_step_was_made_with_is_not_kept(tmp_path, inputs, ranks):
    """Continued with another rate, stopped before its first step was saved, continued with the old
    one again."""
    run = tmp_path / "run"
    assert train(life(run, inputs), ranks) == DONE
    for name in ("summary.json", "checkpoints/step_2"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (run / "metrics.jsonl").read_bytes()
    other = open_run(life(run, inputs, run__resume="auto", optim__learning_rate=1.0), ranks)
    assert [line["key"] for line in read_lines(run / "config_changes.jsonl")] == [
        "optim.learning_rate"
    ]
    del other
    assert train(life(run, inputs, run__resume="auto"), ranks) == DONE
    assert read_lines(run / "config_changes.jsonl") == []
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_panel_that_comes_later_is_refused(tmp_path, inputs, ranks):
    """Its yardstick is the starting checkpoint, which is not there any more."""
    assert (
        train(life(tmp_path / "run", inputs, data__held_out="[]", budget__steps=1), ranks) == DONE
    )
    with pytest.raises(
        ConfigError, match="the files of data.held_out changed since, or came later"
    ):
        train(
            life(
                tmp_path / "next", inputs, run__resume=tmp_path / "run" / "checkpoints" / "step_1"
            ),
            ranks,
        )


def test_the_checksum_of_weights_does_not_depend_on_their_dtype_or_cut():
    """A bfloat16 number is a float32 number; two halves add up to the whole."""
    from rlp.measure.journal import weighted_bits

    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert weighted_bits(values, 0) == weighted_bits(values.float(), 0)
    assert (
        weighted_bits(values[:400], 0) + weighted_bits(values[400:], 400)
    ) % 2**64 == weighted_bits(values, 0)
