"""The trainer of REDI on a tiny model: its loss beside one computed without it, which tokens
count, the alarm in a training, and the stage in all its losses."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerState
from trl import DPOConfig

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.post.pipeline_config import RediStage
from rlp.post.redi import CollapseAlarm, CollapseError
from rlp.post.redi_trainer import RediTrainer, _Watch
from rlp.post.stages.interface import StageError, StageStopped, Work
from rlp.post.stages.redi import contrast
from rlp.post.stages.rows import read_rows
from rlp.post.stages.trl_training import QUIET
from rlp.process.faults import VARIABLE, InjectedFault, forget_passages
from rlp.process.ranks import start_ranks
from tests.tiny_models import architecture, word_tokenizer

PAIRS = [
    {"prompt": "w1 w2 <think>", "chosen": "w3 w4 </think> w5", "rejected": "w3 w6 w7 </think> w8"},
    {"prompt": "w9 <think>", "chosen": "w3 w4 w5 </think> w6", "rejected": "w3 w4 w5 </think> w7"},
    {"prompt": "w2 w9 <think>", "chosen": "</think> w1", "rejected": "w4 </think> w1"},
]
FIRST_WRONG = [1, 4, 0]
"""Tokens of the rejected before the first wrong one."""

FIELDS = {item.name for item in dataclasses.fields(DPOConfig)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("redi") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture("qwen3")).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def trainer(model, tmp_path, rows=PAIRS, **named):
    settings = QUIET | {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "save_strategy": "no",
    }
    settings |= {name: named.pop(name) for name in list(named) if name in FIELDS}
    args = DPOConfig(**settings)
    return RediTrainer(str(model), args, Dataset.from_list(list(rows)), **named)


def logprobs(model, prompt, trace):
    """Of each token of a trace and its end after a prompt, by a forward pass of its own."""
    tokenizer = word_tokenizer()
    before = tokenizer(prompt, return_tensors="pt").input_ids
    behind = tokenizer(trace + "<eos>", return_tensors="pt").input_ids
    ids = torch.cat([before, behind], dim=1)
    scores = model(input_ids=ids).logits.log_softmax(-1)[0, before.shape[1] - 1 : -1]
    return scores.gather(1, behind[0, :, None])[:, 0]


def loss_by_hand(model, alpha, negative):
    total = 0.0
    for row, first in zip(PAIRS, FIRST_WRONG):
        chosen, rejected = (logprobs(model, row["prompt"], row[x]) for x in ("chosen", "rejected"))
        counted = rejected if negative == "all" else rejected[first : first + 1]
        total = total - chosen.mean() + alpha * counted.mean()
    return total / len(PAIRS)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def loss_of(made):
    batch = made.data_collator([made.train_dataset[index] for index in range(len(PAIRS))])
    return made.compute_loss(made.model, batch)


@pytest.mark.parametrize(
    "alpha, negative", [(0.0, "all"), (0.8, "all"), (1.0, "all"), (0.8, "first_wrong")]
)
def test_the_trainer_has_the_loss_and_gradient_of_the_function(model, tmp_path, alpha, negative):
    """On log-probabilities of single rows, without padding and without TRL. With alpha 0 this is
    the gradient of SFT on the chosen."""
    made = trainer(model, tmp_path, alpha=alpha, negative=negative)
    plain = AutoModelForCausalLM.from_pretrained(model)
    loss, expected = loss_of(made), loss_by_hand(plain, alpha, negative)
    assert_close(loss, expected)
    assert made.ref_model is None

    ours, theirs = gradients(made.model, loss), gradients(plain, expected)
    for name, value in ours.items():
        assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_may_say_where_it_goes_wrong(model, tmp_path):
    """By a character of the rejected; else it is where the two depart."""
    row = PAIRS[0]
    assert trainer(model, tmp_path, [row], negative="first_wrong").train_dataset[0][
        "negative_mask"
    ] == [0, 1, 0, 0, 0, 0]
    assert trainer(model, tmp_path, [row], negative="after_wrong").train_dataset[0][
        "negative_mask"
    ] == [0, 0, 1, 1, 1, 1]
    said = row | {"first_wrong": row["rejected"].index("w7")}
    assert trainer(model, tmp_path, [said], negative="first_wrong").train_dataset[0][
        "negative_mask"
    ] == [0, 0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="first_wrong must be the index of a character"):
        trainer(model, tmp_path, [row | {"first_wrong": 99}], negative="first_wrong")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rows": [PAIRS[0], PAIRS[0] | {"rejected": "w3 w4 </think> w5"}]}, "1 of 2 pairs have"),
        ({"rows": PAIRS[1:2], "max_length": 5}, "1 of 1 pairs have .* within max_length 5"),
        ({"rows": PAIRS[1:2], "max_length": 2}, "no pair is left"),
        ({"alpha": 2}, "alpha must be from 0"),
        ({"negative": "some"}, "negative must be one of all, first_wrong, after"),
        ({"loss_type": "ipo"}, "loss_type belongs to the loss of DPO"),
        ({"truncation_mode": "keep_end"}, "keep_start"),
    ],
)
def test_pairs_and_settings_that_teach_nothing_are_refused(model, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        trainer(model, tmp_path, **change)


def test_a_training_is_logged_and_a_planted_collapse_stops_it(model, tmp_path):
    """Right and wrong traces that differ in one token, and a wrong one that weighs as much at a
    high rate; with alpha 0 the same training is silent."""
    named = {"max_steps": 40, "learning_rate": 3e-2, "tell": print}
    healthy = trainer(model, tmp_path, alpha=0.0, **named)
    healthy.train()
    logged = [line for line in healthy.state.log_history if "loss" in line]
    assert len(logged) == 40
    for line in logged:
        assert line["loss"] == pytest.approx(-line["redi/chosen_logprob"], rel=1e-4, abs=1e-5)
        assert line["grad_norm"] >= 0 and line["redi/rejected_logprob"] < 0

    with pytest.raises(CollapseError, match="collapse at step .* has fallen from .* Lower alpha"):
        trainer(model, tmp_path, alpha=1.0, **named).train()

    told = []
    named |= {"tell": told.append, "stop_on_collapse": False}
    trainer(model, tmp_path, alpha=1.0, **named).train()
    (said,) = told
    assert "collapse at step" in said and "norm of the gradient" in said


def work_of(model, folder, rows=PAIRS, **named):
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RediStage(
        kind="redi",
        data=[str(data)],
        **{"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2} | named,
    )
    return Work(settings, 0, str(model), folder / "work", start_ranks(), tell=lambda said: None)


def made_by(work):
    """Weights and log of a finished stage, without times."""
    made = contrast(work)
    return (
        [one.step for one in made.kept],
        [(one.path / "model.safetensors").read_bytes() for one in made.kept],
        (work.folder / "steps.jsonl").read_text(),
        made.spent.flops,
    )


def test_a_stage_that_is_interrupted_ends_as_one_that_is_not(model, tmp_path, monkeypatch):
    """In the middle, and where all is made but for the log; the alarm knows what was before."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    expected = made_by(work_of(model, one, keep_steps=[1]))
    assert expected[0] == [1, 4] and len(expected[2].splitlines()) == 4

    for fault, error in (
        ("stage.after_step:1:term", StageStopped),
        ("stage.after_step:2:raise", InjectedFault),
        ("stage.torn_steps:1:raise", InjectedFault),
    ):
        forget_passages()
        monkeypatch.setenv(VARIABLE, fault)
        with pytest.raises(error):
            contrast(work_of(model, other, keep_steps=[1]))
        assert not (other / "work" / "steps.jsonl").exists()
    monkeypatch.delenv(VARIABLE)
    assert made_by(work_of(model, other, keep_steps=[1])) == expected


def test_a_collapse_that_was_told_of_before_a_resume_stops_where_that_is_asked_for():
    state = TrainerState(log_history=[{"redi/chosen_logprob": float("nan")}])
    told = {"redi/chosen_logprob": float("nan")}
    watch = _Watch(CollapseAlarm(), True, print)
    watch.on_train_begin(None, state, None)
    with pytest.raises(CollapseError, match="is nan"):
        watch.on_log(None, state, None, told)

    said = []
    watch = _Watch(CollapseAlarm(), False, said.append)
    watch.on_train_begin(None, state, None)
    watch.on_log(None, state, None, told)
    assert not said  # once is enough


def test_a_collapse_fails_the_stage_and_leaves_what_was_kept(model, tmp_path):
    named = {"alpha": 1.0, "learning_rate": 3e-2, "steps": 40, "batch_size": 3}
    with pytest.raises(StageError, match="collapse at step .* What was kept on the way"):
        contrast(work_of(model, tmp_path, **named, keep_steps=[5]))
    assert (tmp_path / "work" / "models" / "step_5" / "ledger.json").is_file()


def test_every_loss_of_the_stage_sees_both_traces_of_a_pair(model, tmp_path):
    """DPO at its first step has a margin of 0: -log sigmoid(0). SimPO, beta 2 and margin 0.5: -log
    sigmoid(2 (chosen - rejected - 0.5)) of means a token. A reference costs a third more."""
    plain, flops = AutoModelForCausalLM.from_pretrained(model), {}
    means = [
        [logprobs(plain, row["prompt"], row[name]).mean().item() for name in ("chosen", "rejected")]
        for row in PAIRS
    ]
    gaps = torch.tensor([chosen - rejected for chosen, rejected in means])
    expected = {
        "redi": loss_by_hand(plain, 0.8, "all").item(),
        "dpo": torch.tensor(2.0).log().item(),
        "simpo": -torch.nn.functional.logsigmoid(2 * (gaps - 0.5)).mean().item(),
    }
    for loss, value in expected.items():
        (tmp_path / loss).mkdir()
        beta = 2.0 if loss == "simpo" else 0.1
        work = work_of(model, tmp_path / loss, steps=1, batch_size=3, loss=loss, beta=beta)
        flops[loss] = contrast(work).spent.flops
        (logged,) = [json.loads(x) for x in (work.folder / "steps.jsonl").read_text().splitlines()]
        assert logged["loss"] == pytest.approx(value, rel=1e-4), loss
        assert logged["grad_norm"] > 0
    assert flops["redi"] == flops["simpo"] == pytest.approx(flops["dpo"] * 3 / 4)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"rejected": "w3 w4 </think> w5"}, "jsonl:2: .* are equal, as in 1 of 2 rows"),
        ({"chosen": ""}, "chosen is"),
        ({"chosen": 7}, "chosen is 7"),
        ({"first_wrong": "w6"}, "in every row or in none, got 'w6'"),
    ],
)
def test_rows_that_are_no_pairs_are_refused_with_their_line(model, tmp_path, row, said):
    rows = [PAIRS[0] | ({"first_wrong": 3} if "first_wrong" in row else {}), PAIRS[0] | row]
    with pytest.raises(DataError, match=said):
        read_rows(work_of(model, tmp_path, rows).settings)


@pytest.mark.parametrize(
    "named, said",
    [
        ({"alpha": 1.5}, "alpha"),
        ({"loss": "ppo"}, "loss"),
        ({"negative": "first"}, "negative"),
        ({"beta": 0.0}, "beta"),
        ({"margin": -1.0}, "margin"),
        ({"drop": 0.0}, "drop"),
        ({"max_tokens": 1}, "max_tokens"),
    ],
)
def test_settings_that_can_not_be_are_refused(model, tmp_path, named, said):
    with pytest.raises(ConfigError, match=said):
        work_of(model, tmp_path, **named)
