"""What controls are rewarded for: greedy match and the placebos, and whose thoughts those think."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from rlp.algorithm import predict, think
from rlp.compare.placebos import overwritten
from rlp.config import ConfigError
from rlp.model.layout import repeated_layout
from rlp.model.scoring import score
from rlp.model.thoughts import Thoughts
from rlp.objective import group_relative_advantage
from rlp.trainer import begin_step
from tests.training import assert_same_run, open_run, read_lines, tiny_config, train, write_corpus


def told_groups(folder: Path, name: str) -> torch.Tensor:
    """[M, G] of the first step, thoughts in the order of their advantage; one micro-batch, all
    thoughts told."""
    groups: dict = {}
    for line in read_lines(folder / "thoughts.jsonl"):
        if line["step"] == 1:
            groups.setdefault((line["document"], line["position"]), []).append(line[name])
    return torch.tensor(list(groups.values()), dtype=torch.float64)


ALL_TOLD = {"budget__steps": 1, "logging__thoughts": 64, "optim__micro_batch_size": 4}


def test_greedy_match_rewards_the_right_greedy_token(trained):
    """The reward that is told is the one that the advantage is made of, 0 or 1; the gain stands
    beside it."""
    folder = trained("greedy", reward__kind="greedy_match", target__horizon=1, **ALL_TOLD)
    line = read_lines(folder / "metrics.jsonl")[0]
    same = read_lines(trained("rlp", **ALL_TOLD) / "metrics.jsonl")[0]
    assert line["gain/mean"] == same["gain/mean"] == same["reward/mean"]
    rewards = told_groups(folder, "reward")
    assert set(rewards.flatten().tolist()) <= {0.0, 1.0} and line["reward/mean"] == line[
        "reward/positive_frac"
    ] == float(rewards.mean())
    torch.testing.assert_close(
        group_relative_advantage(rewards), told_groups(folder, "advantage"), atol=1e-6, rtol=0
    )
    steps = told_groups(folder, "advantage").unique() * 3
    # G = 4 and rewards of 0 or 1: 4/3 (r - mean) is a multiple of 1/3.
    torch.testing.assert_close(steps, steps.round(), atol=1e-6, rtol=0)


def test_shuffled_rewards_belong_to_another_position(trained):
    """No position keeps the advantages that its own rewards would give, and all advantages are
    given to somebody."""
    folder = trained("shuffled", reward__placebo="shuffled_reward", **ALL_TOLD)
    own = group_relative_advantage(told_groups(folder, "gain")).sort(dim=1).values
    given = told_groups(folder, "advantage").sort(dim=1).values
    torch.testing.assert_close(
        group_relative_advantage(told_groups(folder, "reward")).sort(dim=1).values,
        given,
        atol=1e-6,
        rtol=0,
    )
    assert not torch.isclose(own, given, atol=1e-6).all(dim=1).any()
    for group in given:
        assert torch.isclose(own, group, atol=1e-5).all(dim=1).sum() == 1


def test_foreign_thoughts_are_scored_in_the_place_of_ones_own(
    tmp_path, model_folder, corpus, ranks
):
    """The reward of thought g of a position is the gain that thought g of the position before it
    gives here."""
    config = tiny_config(
        tmp_path / "foreign",
        model_folder,
        corpus,
        reward__placebo="foreign_thought",
        position__per_document=1,
        **ALL_TOLD,
    )
    run = open_run(config, ranks)
    step, parts = begin_step(run, 0.0), run.parts
    whole = predict(parts, step, think(parts, step))
    (batch,) = parts.cut.update(whole)
    documents, positions, thoughts = batch.documents, batch.positions, batch.thoughts
    run.judge.begin(parts, step.number, whole, [batch])
    got = run.judge.ahead(0)
    exchanged = repeated_layout(
        documents,
        positions,
        thoughts.exchanged(thoughts[-1:]),
        run.opened.setup.thought_format,
        lm=False,
        no_think=False,
        device=run.ranks.device,
    )
    reasoned = rearrange(
        score(parts.engine.policy, exchanged).target.mean(dim=1), "(m g) -> m g", g=4
    ).detach()
    torch.testing.assert_close(
        got, reasoned - batch.baseline_logprob[:, None], atol=1e-5, rtol=1e-4
    )
    assert torch.equal(run.judge.fed(0, got), got)


def told_thoughts(rows: list[list[list[int]]], closed: list[list[bool]]) -> Thoughts:
    """Thoughts of these words [M, G, *], some with a close marker, 3, behind them."""
    longest = max(len(row) for group in rows for row in group) + 1
    tokens = torch.zeros(len(rows), len(rows[0]), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for m, g in np.ndindex(*tokens.shape[:2]):
        row = rows[m][g] + [3] * closed[m][g]
        tokens[m, g, : len(row)], mask[m, g, : len(row)] = torch.tensor(row), True
    unknown = torch.zeros(tokens.shape)
    return Thoughts(tokens, mask, unknown, unknown, ~torch.tensor(closed))


def test_other_words_have_ones_own_length_and_end():
    """Cut, filled on from the next thoughts of the group, and, where these have no word, nothing;
    the close marker, sampled or forced, stays one's own."""
    own = told_thoughts([[[7, 7, 7, 7, 7], [7]], [[8, 8], [8, 8, 8]]], [[True, False]] * 2)
    other = told_thoughts([[[10, 11, 12], [20]], [[], []]], [[False, True], [True, True]])
    got = overwritten(own, other, 1)
    assert got.tokens[0][got.mask[0]].tolist() == [10, 11, 12, 20, 10, 3, 20]
    assert got.tokens[1][got.mask[1]].tolist() == [3, 3]
    assert torch.equal(got.mask[0], own.mask[0]) and torch.equal(got.truncated[0], own.truncated[0])
    assert not got.truncated[1].any()


def test_other_thoughts_are_rewarded_and_trained_as_ones_own(tmp_path, model_folder, corpus, ranks):
    """The reward of a thought is the gain of the other words here; its loss is that of a policy
    which has sampled them here: every ratio is 1, and the gradient is that of their
    log-probabilities."""
    config = tiny_config(
        tmp_path / "other", model_folder, corpus, reward__placebo="other_thought", **ALL_TOLD
    )
    run = open_run(config, ranks)
    step, parts = begin_step(run, 0.0), run.parts
    sampled = think(parts, step)
    whole = predict(parts, step, run.judge.given(parts, step.number, sampled))
    (batch,) = parts.cut.update(whole)
    expected = overwritten(sampled.host, sampled.host.exchanged(sampled.host[-1:]), 1)
    assert torch.equal(batch.thoughts.tokens, expected.tokens)
    assert not torch.equal(batch.thoughts.tokens, sampled.thoughts.tokens)
    run.judge.begin(parts, step.number, whole, [batch])
    assert run.judge.ahead(0) is None

    layout, scores = parts.forward(batch)
    behavior = run.judge.behavior(0, batch, scores.thought)
    assert torch.equal(behavior, scores.thought) and not behavior.requires_grad
    plain = repeated_layout(
        batch.documents,
        batch.positions,
        expected,
        parts.thought_format,
        lm=False,
        no_think=False,
        device=ranks.device,
    )
    by_rows = score(parts.engine.policy, plain)
    torch.testing.assert_close(scores.target, by_rows.target, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.thought, by_rows.thought, atol=1e-5, rtol=1e-4)
    moved = scores.thought.detach() + 1
    assert torch.equal(run.judge.behavior(0, batch, moved), behavior)


def test_other_thoughts_cost_what_ones_own_cost(trained):
    """Token by token and FLOP by FLOP, so that a matched arm takes as many steps."""
    folders = [
        trained(name, reward__placebo=name, budget__steps=1) for name in ("none", "other_thought")
    ]
    own, other = (json.loads((folder / "ledger.json").read_text()) for folder in folders)
    assert own["flops"] == other["flops"] and own["paper_flops"] == other["paper_flops"]
    line = read_lines(folders[1] / "metrics.jsonl")[0]
    assert line["policy/ratio_max_deviation"] == 0 != line["optim/grad_norm"]


@pytest.mark.parametrize(
    "placebo",
    [
        "shuffled_reward",
        pytest.param("foreign_thought", marks=pytest.mark.slow),
        "other_thought",
    ],
)
def test_micro_batches_do_not_change_a_placebo(trained, placebo):
    """The positions of the step are exchanged: documents one by one, in pairs or all at once,
    groups whole or in slices."""
    settings = {
        "reward__placebo": placebo,
        "budget__steps": 2,
        "thought__group_size": 2,
        "optim__batch_size": 4,
    }
    folders = [
        trained(f"of_{size}", optim__micro_batch_size=size, **settings) for size in (1, 2, 4)
    ]
    folders.append(trained("slices", optim__thoughts_per_forward=1, **settings))
    by_length = {"data__max_document_tokens": 16, "optim__tokens_per_micro_batch": 60}
    folders.append(trained("by_length", **by_length, **settings))
    for folder in folders[1:]:
        assert_same_run(folders[0], folder, 1e-4)


def test_a_placebo_needs_two_positions_in_a_step(tmp_path, model_folder, ranks):
    """A position can not be exchanged with itself: refused by the config where it is sure, by the
    step where it happens."""
    short = write_corpus(tmp_path / "short.jsonl", ["w1 w2"] * 4)
    with pytest.raises(ConfigError, match="reward.placebo"):
        tiny_config(
            tmp_path / "one",
            model_folder,
            short,
            reward__placebo="shuffled_reward",
            position__per_document=1,
            optim__batch_size=1,
        )
    config = tiny_config(
        tmp_path / "two",
        model_folder,
        short,
        reward__placebo="shuffled_reward",
        position__per_document=2,
        optim__batch_size=1,
    )
    with pytest.raises(ConfigError, match="single one"):
        train(config, ranks)
