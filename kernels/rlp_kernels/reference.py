"""Token log-probabilities, entropy and argmax by definition: one [N, V] tensor, plain autograd.

These functions are the yardstick for every other form in this package. They are written
to be read, and hold several [N, V] tensors at once.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary

Logits, log-probabilities and entropies are in nats and are float32, or float64 where the
inputs are float64. Inputs narrower than float32 are widened before they are multiplied, so
no logit is ever rounded to bf16: that rounding puts 0.0136 nat rms into each log-probability,
three times the reward that a 1e-3 change of the weights makes.
"""

import torch
from torch import Tensor


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

        z       = softcap(hidden . head^T + bias)       softcap(z) = c tanh(z / c)
        logprob = log softmax(z * inverse_temperature)[target],    logit of excluded = -inf

    Arguments and result are those of `rlp_kernels.token_logprobs`, which checks them.
    """
    logits = token_logits(
        hidden,
        head,
        inverse_temperature=inverse_temperature,
        excluded=excluded,
        softcap=softcap,
        bias=bias,
    )
    return logits.log_softmax(dim=1).gather(1, target[:, None])[:, 0]


def token_logprobs_with_grad(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    wants_head: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, and by autograd the gradients of sum_n coefficient_n * logprob_n.

    Arguments and result are those of `rlp_kernels.token_logprobs_with_grad`, which checks them.
    """
    inputs = (hidden.detach().requires_grad_(), head.detach().requires_grad_(wants_head))
    settings = {
        "inverse_temperature": inverse_temperature,
        "excluded": excluded,
        "softcap": softcap,
    }

    with torch.enable_grad():
        logprob = token_logprobs(*inputs, target, **settings)

    grads = torch.autograd.grad(logprob, inputs if wants_head else inputs[:1], coefficient)
    return logprob.detach(), grads[0], grads[1] if wants_head else None


@torch.no_grad()
def paired_logprobs(
    policy_hidden: Tensor,
    policy_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    target: Tensor,
    *,
    group_size: int,
    excluded: Tensor,
    policy_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each position's target scored after G thoughts and without one, and the difference.

        reward[m, g] = log p_policy(target_m | thought g) - log p_teacher(target_m)          (eq. 5)

    Arguments and result are those of `rlp_kernels.paired_logprobs`, which checks them.
    """
    one = torch.ones(len(policy_hidden), device=target.device)
    position = torch.arange(len(policy_hidden), device=target.device) // group_size

    reasoned_logprob = token_logprobs(
        policy_hidden,
        policy_head,
        target[position],
        inverse_temperature=one,
        excluded=excluded[position],
        bias=policy_bias,
    ).reshape(-1, group_size)

    baseline_logprob = token_logprobs(
        teacher_hidden,
        teacher_head,
        target,
        inverse_temperature=one[: len(target)],
        excluded=excluded,
        bias=teacher_bias,
    )

    return reasoned_logprob, baseline_logprob, reasoned_logprob - baseline_logprob[:, None]


def token_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Entropy of each row's softmax, -sum_v p_v log p_v over the tokens not excluded: [N], nats."""
    logits = token_logits(
        hidden,
        head,
        inverse_temperature=inverse_temperature,
        excluded=excluded,
        softcap=softcap,
        bias=bias,
    )
    return torch.special.entr(logits.softmax(dim=1)).sum(dim=1)


def token_argmax(
    hidden: Tensor,
    head: Tensor,
    *,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Most probable token of each row, [N] int64; the lowest index wins ties."""
    one = torch.ones(hidden.shape[0], device=hidden.device)
    logits = token_logits(
        hidden, head, inverse_temperature=one, excluded=excluded, softcap=softcap, bias=bias
    )
    return logits.argmax(dim=1)


def token_logits(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Capped and tempered logits, [N, V], -inf at each row's excluded token."""
    # Autocast would turn the float32 product back into a bf16 one.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = widened(hidden) @ widened(head).T

    if bias is not None:
        logits = logits + widened(bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)

    token = torch.arange(head.shape[0], device=head.device)
    is_excluded = token == excluded[:, None]
    return (logits * inverse_temperature[:, None]).masked_fill(is_excluded, float("-inf"))


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of logits: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
