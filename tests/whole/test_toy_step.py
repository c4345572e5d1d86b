"""A step of Algorithm 1 on the toy, in expectation: summed over all thoughts, against the gradient
that it estimates."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.thoughts import Thoughts
from rlp.objective import group_relative_advantage
from rlp.sampling.rollout import NoiseKey
from tests.sampled import sample_thoughts
from tests.whole.toy import (
    FIRST_WORD,
    all_thoughts,
    as_thoughts,
    baseline_logprob_of,
    evidence,
    expected_step,
    flat_gradient,
    one_position_each,
    reasoned,
    step_loss,
    toy_format,
    toy_policy,
)

# 13 ** 2 groups of the 13 thoughts over two words, 7 ** 3 of the 7 over one. Seeds whose short
# thoughts are likely enough that length matters.
STEPS = [(2, 2, 8), (1, 3, 22)]


@pytest.mark.parametrize(("num_words", "group_size", "seed"), STEPS)
def test_expected_step_is_the_gradient_of_the_length_normalised_objective(
    num_words, group_size, seed
):
    """The expected gradient of eq. 8 is that of -sum_c pi(c) (r(c) - mu) / |c|, with r and its mean
    mu held fixed.

    The mean over tokens puts 1/|c| beside the reward. The proof of section 9.1 (eq. 14) has the sum
    over tokens
    instead: where lengths differ, the step of eq. 8 is not along the gradient of E[r], though not
    far from it.
    """
    policy, prefix, target = toy_policy(num_words, seed=seed), [2, 2], FIRST_WORD
    thoughts = all_thoughts(policy, prefix, budget=2)
    reward = torch.stack(
        [reasoned(policy, prefix, thought)[target] for thought in thoughts]
    ).detach()
    probability = torch.stack([thought.probability for thought in thoughts])
    length = torch.tensor([len(thought.tokens) for thought in thoughts])
    centered = reward - probability.detach() @ reward
    of_expected_reward = flat_gradient(probability @ reward, policy)
    step = expected_step(policy, prefix, target, budget=2, group_size=group_size)
    assert_close(step, -flat_gradient(probability @ (centered / length), policy))
    assert step.abs().max() > 0.01
    assert 0.8 < torch.cosine_similarity(step, -of_expected_reward, dim=0) < 0.99


def test_expected_step_of_one_token_thoughts_is_the_gradient_of_the_expected_reward():
    """With one length for all, eq. 8 is unbiased: minus the gradient of J(theta) = E_c[r(c)], r
    held fixed (eqs. 6 and 14)."""
    policy, prefix, target = toy_policy(2), [2, 3], 3
    thoughts = all_thoughts(policy, prefix, budget=1)
    reward = torch.stack(
        [reasoned(policy, prefix, thought)[target] for thought in thoughts]
    ).detach()
    objective = torch.stack([thought.probability for thought in thoughts]) @ reward
    assert_close(
        expected_step(policy, prefix, target, budget=1, group_size=3),
        -flat_gradient(objective, policy),
    )


def test_predictor_term_completes_the_gradient_of_the_expected_reward():
    """With predictor_weight 1 nothing is held fixed: the step is minus the whole gradient of sum_c
    pi(c) log p(x | c)."""
    policy, prefix, target = toy_policy(2), [2, 3], 3
    thoughts = all_thoughts(policy, prefix, budget=1)
    objective = sum(
        thought.probability * reasoned(policy, prefix, thought)[target] for thought in thoughts
    )
    assert_close(
        expected_step(policy, prefix, target, budget=1, group_size=2, predictor_weight=1.0),
        -flat_gradient(objective, policy),
    )


def sampled_step(policy: Policy) -> tuple[list[Document], Positions, Thoughts]:
    """Three documents, a position in each, four sampled thoughts at each."""
    documents, positions = one_position_each([[3, 2, 4, 2], [2, 4, 4, 3, 2, 4], [4, 3]], [3, 4, 1])
    thoughts = sample_thoughts(
        policy,
        documents,
        positions,
        toy_format(policy),
        NoiseKey(0, 1),
        group_size=4,
        max_thought_tokens=3,
        slots=8,
    ).thoughts
    return documents, positions, thoughts


def test_loss_of_freshly_sampled_thoughts_is_zero_and_its_gradient_is_not():
    """From the sampler to the loss: what was drawn is scored as it was drawn, so every ratio is 1
    and the advantages cancel."""
    policy = toy_policy()
    loss = step_loss(policy, toy_format(policy), *sampled_step(policy))
    assert_close(loss.detach(), torch.zeros((), dtype=torch.float64))
    assert flat_gradient(loss, policy).abs().max() > 0.01


def test_step_of_several_positions_is_the_mean_of_their_steps():
    """A thought is compared with its siblings only, and every position weighs the same, however
    long its thoughts."""
    policy = toy_policy()
    documents, positions, thoughts = sampled_step(policy)
    alone = [
        step_loss(
            policy,
            toy_format(policy),
            [document],
            positions.of_documents(d, d + 1),
            thoughts[d : d + 1],
        )
        for d, document in enumerate(documents)
    ]
    assert thoughts.mask.sum(dim=(1, 2)).unique().numel() > 1
    together = flat_gradient(
        step_loss(policy, toy_format(policy), documents, positions, thoughts), policy
    )
    assert_close(together, sum(flat_gradient(loss, policy) for loss in alone) / 3)


def test_update_is_the_same_with_any_baseline():
    """EMA (or frozen: another network), self, none, not scored, or nonsense: S_ema is one number
    for a position, and cancels in eq. 7."""
    policy = toy_policy()
    thought_format = toy_format(policy)
    documents, positions, thoughts = sampled_step(policy)
    kinds = [
        baseline_logprob_of(kind, policy, documents, positions, toy_policy(seed=1))
        for kind in ("ema", "self", "none")
    ]
    assert (kinds[0] - kinds[1]).abs().min() > 0.01 and (kinds[1] - kinds[2]).abs().min() > 0.01
    unscored = flat_gradient(
        step_loss(policy, thought_format, documents, positions, thoughts), policy
    )
    for baseline_logprob in (*kinds, torch.tensor([5.0, -7.0, 0.25], dtype=torch.float64)):
        assert_close(
            flat_gradient(
                step_loss(policy, thought_format, documents, positions, thoughts, baseline_logprob),
                policy,
            ),
            unscored,
        )


def test_forced_close_marker_and_target_carry_no_policy_gradient():
    """Only sampled tokens are trained: d loss / d log-probability is A / |c| on each of them, and 0
    on every other answer of the layout."""
    policy = toy_policy()
    documents, positions = one_position_each([[3, 2, 4]], [2])
    group = all_thoughts(policy, [3, 2], budget=2)
    chosen = [
        next(thought for thought in group if thought.truncated),
        next(thought for thought in group if not thought.truncated),
    ]
    answers: list[Tensor] = []

    def watched(*arguments: object) -> Tensor:
        answers.append(policy(*arguments).detach().requires_grad_())
        return answers[-1]

    advantage = group_relative_advantage(
        evidence(policy, policy, documents, positions, [chosen]).reasoned_logprob
    )[0]
    loss = step_loss(watched, toy_format(policy), documents, positions, as_thoughts([chosen]))
    gradient = torch.autograd.grad(loss, answers[0])[0]
    lengths = [len(thought.tokens) for thought in chosen]
    expected = torch.cat(
        [
            *(-(a / length / 2).expand(length) for a, length in zip(advantage, lengths)),
            torch.zeros(2, dtype=torch.float64),
        ]
    )
    assert_close(gradient, expected)
