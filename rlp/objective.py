"""The RLP objective: reward, advantage and clipped surrogate, equation by equation.

Pure tensor functions. Nothing here knows about models, tokenizers, devices or ranks, so every line
can be checked against the paper (arXiv 2510.01265, version 2) with a pencil.

Dimensions
    M  positions;  G  thoughts per position (the group);  N = M * G
    L  thought tokens, padded to the longest;  H  target tokens

Log-probabilities, rewards and advantages are in nats.
"""

import torch
from torch import Tensor


def log_evidence(target_logprob: Tensor) -> Tensor:
    """Mean log-probability of the H target tokens.

        S = 1/H sum_h log p(x_{t+h} | context, x_t .. x_{t+h-1})               (eqs. 3 and 4; H = 1)

    Args:
        target_logprob: [..., H].

    Returns:
        [...], nats per token.
    """
    return target_logprob.mean(dim=-1)


def information_gain(reasoned_logprob: Tensor, baseline_logprob: Tensor) -> Tensor:
    """Reward of each thought: how much it raised the log-probability of what came next.

        r(c) = S_pred(c) - S_ema                                                 (eq. 5)

    Args:
        reasoned_logprob: [M, G], S_pred.
        baseline_logprob: [M], S_ema, one number for all thoughts of a position.

    Returns:
        [M, G].
    """
    return reasoned_logprob - baseline_logprob[:, None]


def with_language(reward: Tensor, share: Tensor, weight: float) -> Tensor:
    """A reward that pays for the script of a thought too: r(c) + lambda * share(c).

    Args:
        reward: [M, G], eq. 5 or another.
        share: [M, G] from 0 to 1, letters of the thought that are of the target script.
        weight: lambda, in the unit of the reward.

    Returns:
        [M, G].
    """
    return reward + weight * share


def greedy_match(matched: Tensor) -> Tensor:
    """A control: 1 where the most probable continuation after the thought is the real one, else 0.

    Nothing is generated for it and nothing but the thought is trained.

    Args:
        matched: [M, G] bool.

    Returns:
        [M, G].
    """
    return matched.float()


def prefix_match(tokens: Tensor, mask: Tensor, ended: Tensor, target: Tensor) -> Tensor:
    """Reward of reinforcement pre-training (RPT, arXiv 2506.08007, eq. 3): 1 where the predicted
    tokens are the first of the real ones, else 0.

    The paper compares bytes, and asks that the match ends where a token of the real continuation
    ends; of token ids the second always holds, and text that is right but cut into other tokens is
    wrong. A prediction may be shorter than the target: it ends with the end-of-sequence token,
    which is part of it only where the document has one there too.

    Args:
        tokens: [M, G, H].
        mask: [M, G, H] bool, True on predicted tokens, the first ones of each row.
        ended: [M, G] bool, whether the last predicted one is the end-of-sequence token.
        target: [M, H], the real tokens.

    Returns:
        [M, G].
    """
    wrong, place = mask & (tokens != target[:, None]), mask.cumsum(dim=2)
    # An end after something was said need not stand in the document.
    last = place == mask.sum(dim=2, keepdim=True)
    end = ended[..., None] & last & (place > 1)
    return (mask[..., 0] & ~(wrong & ~end).any(dim=2)).float()


def exact_match(tokens: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Reward for a verifiable answer: 1 where all H predicted tokens are the real ones, else 0.
    Arguments and shape as in `prefix_match`."""
    return ((tokens == target[:, None]) & mask).all(dim=2).float()


def group_relative_advantage(reward: Tensor) -> Tensor:
    """Advantage of each thought over the other thoughts for the same position.

        A_i = G / (G - 1) * (r_i - mean_j r_j)                                   (eq. 7)

    The factor undoes the shrinkage of a mean that includes r_i itself; the result equals the
    leave-one-out advantage r_i - mean_{j != i} r_j, so it is unbiased. There is no division by the
    group's standard deviation: rewards stay in nats, and a group whose thoughts all help equally
    contributes nothing. Whatever is the same for the whole group, the baseline above all, cancels.

    Args:
        reward: [M, G], with G >= 2.

    Returns:
        [M, G]. Each row sums to zero.
    """
    group_size = reward.shape[1]
    if group_size < 2:
        raise ValueError(
            f"group_relative_advantage compares siblings: G must be >= 2, got {group_size}."
        )
    return (reward - reward.mean(dim=1, keepdim=True)) * (group_size / (group_size - 1))


def clipped_surrogate(
    logprob: Tensor,
    behavior_logprob: Tensor,
    mask: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_cap: float | None = None,
) -> Tensor:
    """Loss of each thought: the clipped policy-gradient surrogate, averaged over its tokens.

        rho_u = exp(log pi(l_u) - log pi_old(l_u))
        gain  = min(rho_u * A, clip(rho_u, 1 - eps_l, 1 + eps_h) * A)
        gain  = max(gain, c * A) where A < 0 and there is a cap c
        loss  = -1/|c| sum_u gain                                                      (eq. 8)

    On-policy every rho is 1, so the value is -A and sums to zero over a group; its gradient does
    not.
    Only `logprob` carries a gradient: the paper's stop-gradient is the detach of the advantage.

    Args:
        logprob: [N, L], log pi of the sampled tokens at the sampling temperature.
        behavior_logprob: [N, L], the same when they were sampled.
        mask: [N, L] bool, True on sampled tokens, at least one per thought.
        advantage: [N].
        ratio_cap: c, above 1, for log-probabilities that another program has sampled by. For A < 0
            the gain has no bound below: a ratio that is wrong by a factor counts by that factor.
            Dual-clip PPO (arXiv 1912.09729, eq. 5). Without it, eq. 8 as it stands.

    Returns:
        [N].
    """
    advantage = advantage.detach()
    log_ratio = (logprob - behavior_logprob).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    if ratio_cap is not None:
        bounded = torch.maximum(gain, ratio_cap * advantage[:, None])
        gain = torch.where(advantage[:, None] < 0, bounded, gain)
    return -mean_over_tokens(gain, mask)


def kl_to_start(logprob: Tensor, start_logprob: Tensor, mask: Tensor) -> Tensor:
    """KL of the policy to the starting checkpoint on the sampled tokens, averaged over each
    thought's tokens.

        exp(d) - d - 1,  d = log p_start(l_u) - log pi(l_u)

    Never negative, unbiased for KL(pi || p_start) under samples of pi (Schulman's k3 estimator).
    Its gradient on those samples is that of KL(p_start || pi): the sampling itself is not
    differentiated.

    Args:
        logprob, start_logprob: [N, L], at the sampling temperature.
        mask: [N, L] bool.

    Returns:
        [N], nats.
    """
    difference = (start_logprob - logprob).masked_fill(~mask, 0.0)
    return mean_over_tokens(difference.exp() - difference - 1, mask)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[N, L] -> [N], the mean over each thought's sampled tokens."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)
