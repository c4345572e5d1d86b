"""The objective with a pencil: every equation against the paper's numbers, its identities and its
gradients.

Pure tensors in float64. Models and sampling come in `test_toy.py`.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.objective import (
    clipped_surrogate,
    group_relative_advantage,
    information_gain,
    kl_to_start,
    log_evidence,
    mean_over_tokens,
)

# Unequal, so that a bound in the other's place shows.
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
PAPER_REWARDS = torch.tensor(
    [[-0.80, -0.60, -0.50, -0.30], [-0.80, -0.60, -0.35, -0.10], [-0.80, -0.60, -0.20, 0.05]],
    dtype=torch.float64,
)
"""Section 9.2 of the paper, version 2: rewards of four thoughts in three iterations."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_lengths(*lengths: int) -> Tensor:
    """[N, L] bool, the mask of thoughts of these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def surrogate_and_gradient(
    ratio: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    ratio_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each thought [N], and its gradient in log pi [N, L], at these importance ratios."""
    behavior_logprob = random(*ratio.shape).to(ratio) - 3
    logprob = (behavior_logprob + ratio.log()).requires_grad_()
    loss = clipped_surrogate(
        logprob,
        behavior_logprob,
        torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask,
        advantage,
        ratio_cap=ratio_cap,
        **CLIP,
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), logprob)[0]


# ---- reward: eqs. 3 to 5 ----


def test_log_evidence_is_the_mean_over_the_horizon():
    """Nats per token: with H = 1 it is eq. 3 itself, with H = 3 the mean, not the sum."""
    target_logprob = torch.tensor([[-1.0, -2.0, -6.0], [-0.5, -0.5, -0.5]], dtype=torch.float64)
    assert_close(log_evidence(target_logprob), torch.tensor([-3.0, -0.5], dtype=torch.float64))
    assert_close(log_evidence(target_logprob[:, :1]), target_logprob[:, 0])


def test_reward_is_the_log_of_how_many_times_more_probable_the_target_became():
    """Eq. 5 by hand: from 1/8 to 1/2, 1/8 and 1/16 is log 4, 0 and -log 2; each position has its
    own baseline."""
    reasoned = torch.tensor([[1 / 2, 1 / 8, 1 / 16], [1 / 2, 1 / 8, 1 / 16]], dtype=torch.float64)
    baseline = torch.tensor([1 / 8, 1 / 2], dtype=torch.float64)
    times = torch.tensor([[4, 1, 1 / 2], [1, 1 / 4, 1 / 8]], dtype=torch.float64)
    assert_close(information_gain(reasoned.log(), baseline.log()), times.log())


# ---- advantage: eq. 7 ----


def test_advantages_of_the_papers_worked_example():
    """Section 9.2, all three iterations. G / (G - 1) is 4/3: the 3/4 printed there is a misprint,
    its numbers use 4/3."""
    expected = torch.tensor(
        [
            [-1 / 3, -1 / 15, 1 / 15, 1 / 3],
            [-0.45, -11 / 60, 0.15, 29 / 60],
            [-0.55, -17 / 60, 0.25, 7 / 12],
        ],
        dtype=torch.float64,
    )
    assert_close(group_relative_advantage(PAPER_REWARDS), expected)


def test_papers_worked_example_raises_the_expected_reward_step_by_step():
    """Section 9.2: pi <- pi exp(A / 2), to the four decimals that are printed."""
    policy = torch.full((4,), 0.25, dtype=torch.float64)
    printed = [
        ([0.2101, 0.2401, 0.2566, 0.2932], -0.5500, -0.5284),
        ([0.1618, 0.2113, 0.2668, 0.3601], -0.4313, -0.3856),
        ([0.1127, 0.1681, 0.2772, 0.4420], -0.2916, -0.2244),
    ]
    for reward, (new_policy, before, after) in zip(PAPER_REWARDS, printed):
        advantage = group_relative_advantage(reward[None])[0]
        assert float(policy @ reward) == pytest.approx(before, abs=0.5e-4)
        policy = (policy.log() + 0.5 * advantage).softmax(dim=0)
        assert policy.tolist() == pytest.approx(new_policy, abs=0.5e-4)
        assert float(policy @ reward) == pytest.approx(after, abs=0.5e-4)


@pytest.mark.parametrize("group_size", [2, 3, 16])  # the smallest, an odd one, the paper's
def test_advantage_is_the_reward_less_the_mean_of_the_siblings(group_size):
    """The factor G / (G - 1) turns a mean that includes r_i into the leave-one-out mean."""
    reward = random(5, group_size)
    siblings = (reward.sum(dim=1, keepdim=True) - reward) / (group_size - 1)
    assert_close(group_relative_advantage(reward), reward - siblings)


def test_advantages_of_a_group_sum_to_zero():
    """Probability moves between siblings: what one gains, others lose."""
    advantage = group_relative_advantage(random(7, 6))
    assert_close(advantage.sum(dim=1), torch.zeros(7, dtype=torch.float64))
    assert (advantage.abs().sum(dim=1) > 0.1).all()


def test_groups_do_not_see_each_other():
    """A position where every thought fares better is not a better thought."""
    reward = random(2, 4)
    assert_close(
        group_relative_advantage(torch.stack([reward[0], reward[1] + 10]))[0],
        group_relative_advantage(reward)[0],
    )


def test_advantage_ignores_the_no_think_baseline():
    """S_ema shifts a whole group, so it cancels: only siblings are compared."""
    reasoned_logprob = random(3, 4)
    with_baseline = group_relative_advantage(information_gain(reasoned_logprob, random(3, seed=1)))
    assert_close(with_baseline, group_relative_advantage(reasoned_logprob))


def test_advantage_is_not_divided_by_the_spread_of_the_group():
    """Twice the nats are twice the advantage, and thoughts that all help equally teach nothing."""
    reward = random(3, 4)
    assert_close(group_relative_advantage(2 * reward), 2 * group_relative_advantage(reward))
    assert torch.equal(
        group_relative_advantage(torch.full((1, 4), 0.5, dtype=torch.float64)),
        torch.zeros(1, 4, dtype=torch.float64),
    )


def test_group_of_one_is_refused():
    """A thought without siblings has nothing to be compared with."""
    with pytest.raises(ValueError, match="G must be >= 2, got 1"):
        group_relative_advantage(random(3, 1))


# ---- surrogate: eq. 8 ----


def test_on_policy_loss_is_minus_the_advantage_and_sums_to_zero_over_a_group():
    """The value says nothing about progress: it is 0 by construction, while the gradient is not."""
    advantage = group_relative_advantage(PAPER_REWARDS[:1])[0]
    loss, gradient = surrogate_and_gradient(torch.ones(4, 3, dtype=torch.float64), advantage)
    assert_close(loss, -advantage)
    assert_close(loss.sum(), torch.zeros((), dtype=torch.float64))
    assert gradient.abs().max() > 0.1


def test_on_policy_gradient_is_reinforce():
    """At theta = theta_old every ratio is one, and eq. 8 is A times the mean token score."""
    advantage, mask, tokens = (
        random(4),
        of_lengths(3, 1, 2, 3),
        torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 0], [2, 0, 1]]),
    )
    logits = random(4, 3, 5, seed=1).requires_grad_()
    logprob = logits.log_softmax(dim=2).gather(2, tokens[:, :, None])[:, :, 0]
    surrogate = clipped_surrogate(logprob, logprob.detach(), mask, advantage, **CLIP).sum()
    scores = torch.nn.functional.one_hot(tokens, 5) - logits.softmax(
        dim=2
    )  # d log softmax / d logits
    reinforce = (
        advantage[:, None, None] * scores * (mask / mask.sum(dim=1, keepdim=True))[:, :, None]
    )
    assert_close(torch.autograd.grad(surrogate, logits)[0], -reinforce.detach())


def test_each_token_of_a_thought_weighs_its_advantage_over_its_length():
    """Section 9.2: with four tokens a thought the weights are A / 4, printed as 0.0167 and
    0.0833."""
    _, gradient = surrogate_and_gradient(
        torch.ones(4, 4, dtype=torch.float64), group_relative_advantage(PAPER_REWARDS[:1])[0]
    )
    weights = torch.tensor([-1 / 12, -1 / 60, 1 / 60, 1 / 12], dtype=torch.float64)
    assert_close(gradient, -weights[:, None].expand(4, 4))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 1.5, -2.6, 0.0),  # a good token already likelier than 1 + eps_h: no further, 1.3 * 2
        (2.0, 0.5, -1.0, -1.0),  # a good token that became rarer: pulled back, however far it is
        (-2.0, 1.5, 3.0, 3.0),  # a bad token that became likelier: pushed back, however far it is
        (-2.0, 0.5, 1.6, 0.0),  # a bad token already rarer than 1 - eps_l: no further, 0.8 * -2
        (2.0, 1.25, -2.5, -2.5),
        (2.0, 0.85, -1.7, -1.7),
        (-2.0, 1.25, 2.5, 2.5),
        (-2.0, 0.85, 1.7, 1.7),  # within the bounds 0.8 and 1.3 all live
    ],
)
def test_clipping_stops_a_token_only_where_it_has_moved_far_enough_the_right_way(
    advantage, ratio, loss, gradient
):
    """Eq. 8 off-policy by hand, in the four cases of sign and side; d loss / d log pi is -rho A
    where it lives."""
    value, slope = surrogate_and_gradient(
        torch.tensor([[ratio]], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    )
    assert_close(value.item(), loss)
    assert_close(slope.item(), gradient)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (-2.0, 1.9, 3.8, 3.8),  # below the cap eq. 8 as it stands
        (-2.0, 50.0, 4.0, 0.0),  # wrong by a factor of 50: counts as 2, and pulls no more
        (-2.0, 0.5, 1.6, 0.0),
        (2.0, 50.0, -2.6, 0.0),  # bounded by the clip, cap or not
        (0.0, 50.0, 0.0, 0.0),
    ],
)
def test_a_cap_bounds_the_ratio_of_a_negative_advantage(advantage, ratio, loss, gradient):
    """max(gain, c A) for A < 0, with c = 2; without it the loss would be 100."""
    value, slope = surrogate_and_gradient(
        torch.tensor([[ratio]], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        ratio_cap=2.0,
    )
    assert_close(value.item(), loss)
    assert_close(slope.item(), gradient)


def test_a_cap_above_every_ratio_changes_no_bit():
    """On-policy, up to rounding, and off-policy below it: values and gradients in float32."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-6, 0.5):
        ratio = (spread * (2 * torch.rand(64, 16, generator=generator) - 1)).exp()
        advantage = torch.randn(64, generator=generator).index_fill(0, torch.tensor([3]), 0.0)
        plain = surrogate_and_gradient(ratio, advantage)
        capped = surrogate_and_gradient(ratio, advantage, ratio_cap=2.0)
        assert torch.equal(plain[0], capped[0]) and torch.equal(plain[1], capped[1])


def test_ratios_are_clipped_token_by_token():
    """Ratios 2 and 1/2 make a thought as probable as before; its tokens are clipped nevertheless,
    to 1.3 and 1/2."""
    loss, gradient = surrogate_and_gradient(
        torch.tensor([[2.0, 0.5]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    )
    assert_close(loss, torch.tensor([-(1.3 + 0.5) / 2], dtype=torch.float64))
    assert_close(gradient, torch.tensor([[0.0, -0.25]], dtype=torch.float64))


def test_masked_tokens_count_neither_in_value_nor_in_gradient():
    """Padding holds anything, even NaN: a thought scores as it does alone, without padding."""
    ratio, advantage, mask = random(3, 4).exp(), random(3, seed=1), of_lengths(2, 4, 1)
    loss, gradient = surrogate_and_gradient(ratio.masked_fill(~mask, math.nan), advantage, mask)
    assert torch.equal(gradient[~mask], torch.zeros(5, dtype=torch.float64))
    for n, length in enumerate((2, 4, 1)):
        alone, alone_gradient = surrogate_and_gradient(
            ratio[n : n + 1, :length], advantage[n : n + 1]
        )
        assert_close(loss[n], alone[0])
        assert_close(gradient[n, :length], alone_gradient[0])


def test_advantage_carries_no_gradient():
    """The stop-gradient of eq. 8: the reward comes from the same network, and is a constant in the
    policy's loss."""
    reward = random(1, 4).requires_grad_()
    advantage = group_relative_advantage(reward)[0]
    logprob = random(4, 3, seed=1).requires_grad_()
    loss = clipped_surrogate(
        logprob, logprob.detach(), of_lengths(3, 3, 2, 1), advantage, **CLIP
    ).sum()
    to_logprob, to_reward = torch.autograd.grad(loss, [logprob, reward], allow_unused=True)
    assert to_reward is None
    assert to_logprob.abs().max() > 0.1


# ---- KL to the starting checkpoint ----


def test_kl_estimate_is_zero_at_equality_and_positive_elsewhere():
    """exp(d) - d - 1 is never negative, sample by sample, unlike the plain log-ratio."""
    logprob, mask = random(6, 5), torch.ones(6, 5, dtype=torch.bool)
    assert torch.equal(kl_to_start(logprob, logprob, mask), torch.zeros(6, dtype=torch.float64))
    for shift in (-3.0, -1e-3, 1e-3, 3.0):
        assert (kl_to_start(logprob, logprob + shift, mask) > 0).all()


def test_kl_estimate_by_hand_and_masked():
    """d = log 2 gives 1 - log 2; padding, even NaN, does not count."""
    logprob = torch.tensor([[-1.0, -1.0, math.nan]], dtype=torch.float64)
    start_logprob = logprob + torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
    assert_close(
        kl_to_start(logprob, start_logprob, of_lengths(2, 3)[:1]),
        torch.tensor([(1 - math.log(2)) / 2], dtype=torch.float64),
    )


def two_token_thoughts(logits: Tensor) -> Tensor:
    """[16, 2] log-probability of each token of all two-token thoughts over four words, from a table
    [1 + 4, 4]: row 0 for the first token, row 1 + v for the token after v."""
    logprobs = logits.log_softmax(dim=1)
    return torch.stack(
        [
            torch.stack([logprobs[0, v], logprobs[1 + v, w]])
            for v, w in itertools.product(range(4), repeat=2)
        ]
    )


def test_kl_estimate_is_unbiased_under_samples_of_the_policy():
    """Summed exactly over all two-token thoughts: the mean over tokens is KL(pi || p_start) of the
    thought over its length."""
    logprob, start_logprob = (
        two_token_thoughts(random(5, 4)),
        two_token_thoughts(random(5, 4, seed=1)),
    )
    estimate = kl_to_start(logprob, start_logprob, torch.ones(16, 2, dtype=torch.bool))
    probability, log_ratio = logprob.sum(dim=1).exp(), (logprob - start_logprob).sum(dim=1)
    assert_close(probability @ estimate, probability @ log_ratio / 2)


def test_kl_gradient_is_that_of_the_reverse_divergence():
    """A fact of this estimator to know: its value is KL(pi || p_start), its gradient on samples of
    pi that of KL(p_start || pi).

    The gradient does not pass through the sampling: sum pi (1 - p_start / pi) grad log pi = -sum
    p_start grad log pi.
    """
    logits, start_logprob = (
        random(1, 4).requires_grad_(),
        random(1, 4, seed=1).log_softmax(dim=1)[0],
    )
    logprob = logits.log_softmax(dim=1)[0]
    estimate = kl_to_start(
        logprob[:, None], start_logprob[:, None], torch.ones(4, 1, dtype=torch.bool)
    )
    of_estimate = torch.autograd.grad(logprob.exp().detach() @ estimate, logits, retain_graph=True)[
        0
    ]
    of_reverse = torch.autograd.grad(
        start_logprob.exp() @ (start_logprob - logprob), logits, retain_graph=True
    )[0]
    of_forward = torch.autograd.grad(logprob.exp() @ (logprob - start_logprob), logits)[0]
    assert_close(of_estimate, of_reverse)
    assert (of_estimate - of_forward).abs().max() > 0.1


def test_mean_over_tokens_gives_every_thought_the_same_weight():
    """A thought of one token and one of four both count once (the 1/|c| of eq. 8)."""
    values = torch.tensor([[3.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert_close(
        mean_over_tokens(values, of_lengths(1, 4)), torch.tensor([3.0, 2.5], dtype=torch.float64)
    )
