"""No update is made from a number that is not finite, on whichever rank; what is merely odd is
handled."""

import json
import re

import pytest
import torch

import rlp.sampling.growth
import rlp.step.loss
from rlp.config import OptimConfig
from rlp.learn.guard import Guard, NumericsError
from rlp.process.exit_codes import BAD_NUMERICS, DONE
from rlp.process.faults import VARIABLE, forget_passages
from rlp.run.saved import save
from rlp.trainer import loop, take_step
from tests.training import masters, open_run, read_lines, tiny_config

POISON = {
    2: ("score.target", 2, "nan", "reward/mean"),
    4: ("score.thought", 2, "inf", "policy/ratio_max_deviation"),
    6: ("rollout.logprob", 1, "nan", "policy/ratio_max_deviation"),
    8: ("score.no_think", 4, "nan", "baseline/logprob"),
    10: ("loss", 2, "inf", "the loss"),
    12: ("gradient", 2, "nan", "the gradient"),
}
"""By step: where, passages of the place in a step on one rank, what, and what is named for it."""


def faults(rank: int) -> str:
    """All of `POISON`, on one rank."""
    return ",".join(
        f"{point}:{(step - 1) * passages + 1}:{action}@rank{rank}"
        for step, (point, passages, action, _) in POISON.items()
    )


def test_nothing_that_is_not_finite_on_one_rank_moves_a_weight_on_any(harness):
    """Reward, ratio, behavior log-probability, baseline, loss and gradient, each in a step of its
    own: refused, named, counted, and the steps between are made."""
    settings = {
        "budget.steps": 13,
        "data.held_out": "[]",
        "evaluation.every_n_steps": 0,
        "checkpoint.every_n_steps": 0,
        "optim.batch_size": 4,
        "optim.micro_batch_size": 1,
    }
    answer = harness.start(
        harness.folder / "poisoned", ranks=2, fault=faults(rank=1), settings=settings
    )
    assert answer["codes"] == [DONE] * 2, answer["text"]
    journal = read_lines(harness.folder / "poisoned" / "journal.jsonl")
    for before, line in zip(journal, journal[1:]):
        assert line["applied"] == (line["step"] not in POISON), line
        assert (line["state"] == before["state"]) == (line["step"] in POISON), line
    said = {
        int(line.split()[1][:-1]): line
        for line in answer["text"].splitlines()
        if "update refused" in line and "documents of rank 1" in line
    }
    assert {step: named in said[step] for step, (*_, named) in POISON.items()} == dict.fromkeys(
        POISON, True
    ), said
    assert read_lines(harness.folder / "poisoned" / "metrics.jsonl")[-1]["optim/skipped"] == len(
        POISON
    )


def test_three_steps_in_a_row_without_an_update_stop_the_run_with_a_sound_checkpoint(harness):
    """On every rank, with exit code 4; the checkpoint holds the weights from before, and
    continues."""
    settings = {"data.held_out": "[]", "evaluation.every_n_steps": 0}
    answer = harness.start(
        harness.folder / "in_a_row", ranks=2, fault="loss:5-:nan@rank1", settings=settings
    )
    assert answer["codes"] == [BAD_NUMERICS] * 2, answer["text"]
    states = [line["state"] for line in read_lines(harness.folder / "in_a_row" / "journal.jsonl")]
    assert len(states) == 5 and len(set(states[1:])) == 1 and states[0] != states[1]
    assert "3 steps in a row made no update (the last is step 5)" in answer["text"]
    assert re.search(r"The newest sound checkpoint is \S*/step_5\.", answer["text"])
    answer = harness.start(harness.folder / "in_a_row", ranks=2, settings=settings)
    assert answer["codes"] == [DONE] * 2 and "step_5 at step 5" in answer["text"], answer["text"]


def test_a_bad_step_counts_once_however_many_updates_it_makes(harness):
    """Four updates from the same thoughts are refused together; the run goes on, and the checkpoint
    knows that it was one step."""
    settings = {
        "data.held_out": "[]",
        "evaluation.every_n_steps": 0,
        "optim.updates_per_rollout": 4,
        "budget.steps": 2,
    }
    answer = harness.start(
        harness.folder / "two_bad_steps",
        fault="score.target:1:nan,score.target:17:nan",
        settings=settings,
    )
    assert answer["codes"] == [DONE], answer["text"]
    assert [answer["text"].count(f"step {step}: update refused") for step in (1, 2)] == [4, 4]
    saved = json.loads(
        (harness.folder / "two_bad_steps" / "checkpoints" / "step_2" / "meta.json").read_text()
    )
    assert saved["state"]["guard"]["in_a_row"] == 2 and saved["state"]["guard"]["skipped"] == 8


def test_weights_that_are_not_finite_are_never_saved(harness):
    """An update overflows, and no panel looks: two ranks end with exit code 4, and nothing stands
    under a checkpoint's name."""
    settings = {
        "data.held_out": "[]",
        "evaluation.every_n_steps": 0,
        "optim.learning_rate": 1e37,
        "optim.weight_decay": 100,
        "engine.zero_stage": 1,
    }
    answer = harness.start(harness.folder / "overflow", ranks=2, settings=settings)
    assert answer["codes"] == [BAD_NUMERICS] * 2, answer["text"]
    assert re.search(
        r"not finite: \S+, \S+, \S+ and \d+ more\. No checkpoint is made of them; step 2 is not"
        r" saved\. There is no checkpoint in ",
        answer["text"],
    )
    assert list((harness.folder / "overflow" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq", "lag"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_newest_sound_checkpoint_stands_and_is_named(
    tmp_path, model_folder, corpus, ranks, stage, kind
):
    """One value of the weights, a moment or the EMA is infinite: no save, and the message says
    which parameter, and where to go on."""
    run = open_run(
        tiny_config(tmp_path / "run", model_folder, corpus, engine__zero_stage=stage), ranks
    )
    take_step(run)
    assert save(run)
    fragment = run.parts.engine.shards.fragments()[3]
    values = (
        fragment.flat if kind == "master" else run.parts.engine.shards.state_of(fragment.flat)[kind]
    )
    fragment.view(values)[-1] = float("-inf")
    newest = tmp_path / "run" / "checkpoints" / "step_1"
    with pytest.raises(
        NumericsError,
        match=(
            f"not finite: {fragment.name}. No checkpoint is made.* newest sound checkpoint is"
            f" {newest}"
        ),
    ):
        save(run)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [newest]


@pytest.mark.parametrize(
    "stage,dtype",
    [
        (0, "float32"),
        pytest.param(1, "float32", marks=pytest.mark.slow),
        (3, "float32"),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        (2, "bfloat16"),
    ],
)
def test_a_refused_update_leaves_no_trace_at_any_stage(
    tmp_path, model_folder, corpus, ranks, stage, dtype
):
    """Weights, moments and EMA stay, the gradient is gone: the first update of all refused, the
    next two are those of a run without it."""

    def made(name: str, refuse: bool) -> list[torch.Tensor]:
        run = open_run(
            tiny_config(
                tmp_path / name, model_folder, corpus, engine__zero_stage=stage, engine__dtype=dtype
            ),
            ranks,
        )
        before, start, step = masters(run), run.opened.setup.stream.state(), run.parts.engine.step
        for refused in [True, False, False] if refuse else [False, False]:
            run.opened.setup.stream.load_state(start)
            run.state.step = 0  # the same documents and the same noise each time
            run.parts.engine.step = lambda rate, largest_norm, refused=refused: step(
                rate, largest_norm=-1.0 if refused else largest_norm
            )
            take_step(run)
            assert run.parts.guard.in_a_row == refused
            assert not refused or all(
                torch.equal(value, before[name]) for name, value in masters(run).items()
            )
        return [
            fragment.view(values).clone()
            for fragment in run.parts.engine.shards.fragments()
            for values in (
                fragment.flat,
                *(
                    run.parts.engine.shards.state_of(fragment.flat)[name]
                    for name in ("exp_avg", "exp_avg_sq", "lag")
                ),
            )
        ]

    for one, other in zip(made("refused", True), made("plain", False), strict=True):
        assert torch.equal(one, other)


def test_a_spike_is_refused_and_said(tmp_path, model_folder, corpus, ranks, monkeypatch, capsys):
    """A gradient thirty times as large as its like, in step 6; the bit-exact run goes on after a
    resume, whose window is that of the checkpoint."""
    settings = {
        "optim__spike_factor": 10,
        "optim__spike_window": 4,
        "budget__steps": 7,
        "checkpoint__every_n_steps": 5,
        "checkpoint__keep": 3,
    }
    surrogate = rlp.step.loss.clipped_surrogate
    run = open_run(tiny_config(tmp_path / "run", model_folder, corpus, **settings), ranks)
    monkeypatch.setattr(
        rlp.step.loss,
        "clipped_surrogate",
        lambda *arguments, **options: (
            surrogate(*arguments, **options) * (100 if run.state.step == 5 else 1)
        ),
    )
    assert loop(run).code == DONE
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["optim/spikes"] for line in lines] == [0, 0, 0, 0, 0, 1, 1] and lines[-1][
        "optim/skipped"
    ] == 0
    assert (
        "step 6: update refused: gradient norm" in (said := capsys.readouterr().out)
        and "optim.spike_factor" in said
        and "documents of rank 0" in said
    )
    run = open_run(
        tiny_config(
            tmp_path / "resumed",
            model_folder,
            corpus,
            **settings,
            run__resume=tmp_path / "run" / "checkpoints" / "step_5",
        ),
        ranks,
    )
    assert loop(run).code == DONE
    assert (tmp_path / "resumed" / "metrics.jsonl").read_text() == "".join(
        json.dumps(line) + "\n" for line in lines[5:]
    )


def test_the_limit_of_a_spike_is_over_a_full_window_of_made_updates(ranks):
    """Until then there is none; refused ones do not count; the oldest drop out."""
    guard = Guard(OptimConfig(spike_factor=3.0, spike_window=3), ranks)
    guard.load_state({"norms": [1.0, 2.0], "skipped": 0, "spikes": 0, "in_a_row": 0})
    assert guard.largest_norm() == float("inf")
    guard.load_state({"norms": [9.0, 4.0], "skipped": 0, "spikes": 0, "in_a_row": 0})
    assert guard.largest_norm() == 3 * 4.0
    assert guard.state()["norms"] == [2.0, 9.0, 4.0]
    assert Guard(OptimConfig(spike_window=1), ranks).largest_norm() == float("inf")


def sampled(monkeypatch, token: int) -> None:
    """Every thought token is this one."""
    draw = rlp.sampling.growth.draw

    def same(logits, uniform, temperature):
        _, _, entropy = draw(logits, uniform, temperature)
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        return torch.full_like(logits[:, 0], token, dtype=torch.int64), logprobs[:, token], entropy

    monkeypatch.setattr(rlp.sampling.growth, "draw", same)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_groups_without_variance_give_a_step_without_a_gradient(trained, monkeypatch, dtype):
    """All thoughts of a group the same: advantages and gradient are zero, the step is made, and
    every number is finite."""
    sampled(monkeypatch, token=7)
    for line in read_lines(
        trained(objective__lm_weight=0, engine__dtype=dtype, baseline__kind="frozen")
        / "metrics.jsonl"
    ):
        assert line["optim/grad_norm"] == pytest.approx(
            0, abs=1e-3 if dtype == "bfloat16" else 1e-6
        )
        assert line["optim/skipped"] == 0 and line["reward/group_std"] == pytest.approx(0, abs=1e-6)


def test_empty_thoughts_are_thoughts(trained, monkeypatch):
    """The close marker at once: a thought of no token, with a log-probability, a reward and a
    gradient of the text."""
    sampled(monkeypatch, token=3)
    for line in read_lines(trained() / "metrics.jsonl"):
        assert (
            line["thought/tokens_mean"],
            line["thought/truncated_frac"],
            line["optim/skipped"],
        ) == (0, 0, 0)
        assert line["optim/grad_norm"] > 0


def test_thoughts_of_the_whole_budget_are_thoughts(trained, monkeypatch):
    """No close marker at all: every thought is cut off at its budget, and is scored and trained
    like any other."""
    sampled(monkeypatch, token=7)
    for line in read_lines(trained() / "metrics.jsonl"):
        assert (
            line["thought/tokens_mean"],
            line["thought/truncated_frac"],
            line["optim/skipped"],
        ) == (5, 1, 0)
        assert line["optim/grad_norm"] > 0


def test_a_ratio_that_the_clip_hides_is_found(trained, monkeypatch, capsys):
    """An infinite ratio with a positive advantage leaves loss and gradient finite: only a look at
    the ratio itself finds it."""
    surrogate = rlp.step.loss.clipped_surrogate
    monkeypatch.setattr(
        rlp.step.loss,
        "clipped_surrogate",
        lambda logprob, *rest, **options: surrogate(
            torch.nan_to_num(logprob, posinf=0.0), *rest, **options
        ),
    )
    monkeypatch.setenv(VARIABLE, "score.thought:1:inf")
    forget_passages()
    lines = read_lines(trained(budget__steps=2) / "metrics.jsonl")
    assert [line["optim/skipped"] for line in lines] == [1, 1]
    refusal = next(
        line for line in capsys.readouterr().out.splitlines() if "update refused" in line
    )
    assert "policy/ratio_max_deviation" in refusal and "the loss" not in refusal
