"""How far rounding alone may take a log-probability and its gradients: from sizes, magnitudes, eps.

The error that one form makes on one machine is luck: another processor adds in another order. These
bounds hold for every order, so a test that uses them says the same everywhere. They follow one
float32 operation after the other (Higham, Accuracy and Stability of Numerical Algorithms, chapter
3; for sums, Higham and Mary, SIAM J. Sci. Comput. 41, 2019: rounding errors of n terms grow like
sqrt(n)).

Dimensions
    N  rows;  D  width;  V  vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = torch.finfo(torch.float32).eps / 2
"""Largest relative error of one rounding to float32."""

FUNCTION = 8 * UNIT
"""Of exp, log and tanh: 4 spacings, the most that CUDA's and vector libraries' documents give."""


def sum_error(terms: int) -> float:
    """Largest error of a float32 sum or dot product, relative to the sum of the magnitudes, in any
    order of adding.

    n u always holds. 6 sqrt(n) u holds but for one sum in 10**7, where rounding errors are
    independent (2 exp(-6**2 / 2) = 3e-8).
    """
    return min(terms, 6 * terms**0.5) * UNIT


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest error of each entry, float64."""

    logprob: Tensor
    """[N], nats."""
    hidden_grad: Tensor
    """[N, D]."""
    head_grad: Tensor
    """[V, D]."""

    @classmethod
    def joined(cls, parts: Sequence["Bounds"]) -> "Bounds":
        """Those of several draws, one after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class _Logits:
    """Products, cap, temperature: [N, V], with the error of each."""

    value: Tensor
    error: Tensor
    slope: Tensor
    """Of the cap."""
    slope_error: Tensor


def _logits(
    hidden: Tensor, head: Tensor, beta: Tensor, excluded: Tensor, softcap: float
) -> _Logits:
    logit = hidden @ head.T
    error = sum_error(hidden.shape[1]) * (hidden.abs() @ head.abs().T)
    slope, slope_error = torch.ones_like(logit), torch.zeros_like(logit)
    if softcap:
        error = error + UNIT * logit.abs()
        logit = softcap * torch.tanh(logit / softcap)
        error = error + (FUNCTION + UNIT) * logit.abs()
        slope = 1 - (logit / softcap).square()
        slope_error = 2 * logit.abs() / softcap**2 * error + 4 * UNIT
    logit = (
        (logit * beta)
        .scatter(1, excluded.clamp(min=0)[:, None], float("-inf"))
        .where((excluded >= 0)[:, None], logit * beta)
    )
    error = (error * beta + UNIT * logit.abs()).where(logit.isfinite(), 0.0)
    return _Logits(logit, error, slope, slope_error)


def _product_error(left: Tensor, left_error: Tensor, right: Tensor, output: torch.finfo) -> Tensor:
    """Of a product whose left factor errs, rounded to the output's dtype."""
    exact, magnitude = left @ right, left.abs() @ right.abs()
    inside = left_error @ right.abs() + 2 * sum_error(right.shape[0]) * magnitude
    return inside + output.eps / 2 * exact.abs() + output.smallest_normal * output.eps


def token_logprob_bounds(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    factor_error: float = 0.0,
) -> Bounds:
    """Bounds on `token_logprobs` in float32, and on the gradients of sum_n coefficient_n *
    logprob_n.

    Args:
        hidden, head: [N, D] and [V, D], of any dtype: what they hold counts as exact.
        factor_error: relative error of rounding the gradient of the logits to a narrow dtype
            before it is multiplied.
    """
    output = torch.finfo(hidden.dtype)
    hidden, head = hidden.detach().double(), head.detach().double()
    coefficient = coefficient.double()
    beta = inverse_temperature.double()[:, None]
    num_rows, vocabulary = len(hidden), len(head)
    of_row = torch.arange(num_rows, device=hidden.device)

    logits = _logits(hidden, head, beta, excluded, softcap)
    logit, error, slope, slope_error = logits.value, logits.error, logits.slope, logits.slope_error
    present = logit.isfinite()

    # The softmax: shift, exponentials, their sum, its logarithm.
    logprob = logit.log_softmax(dim=1)
    shift = (logit - logit.amax(dim=1, keepdim=True)).where(present, 0.0)
    probability = logprob.exp()
    log_total = -logprob.amax(dim=1)
    relative = error + UNIT * shift.abs() + FUNCTION
    # Twice for the sum: once of the terms, once for the rescaling of partial sums.
    total_error = (
        (probability * relative).sum(dim=1) + 2 * sum_error(vocabulary) + FUNCTION * (1 + log_total)
    )
    own = logprob[of_row, target]
    differences = shift[of_row, target].abs() + log_total + own.abs()
    logprob_error = error[of_row, target] + total_error + 2 * UNIT * differences

    # Gradients: (coefficient beta) slope ([v = target] - p), times head and hidden.
    weight = coefficient[:, None] * beta
    is_target = torch.zeros_like(probability).scatter(1, target[:, None], 1.0)
    difference = is_target - probability
    relative = relative + total_error[:, None] + UNIT * logprob.where(present, 0.0).abs() + FUNCTION
    grad = weight * slope * difference
    difference_error = probability * relative + UNIT * is_target
    grad_error = weight.abs() * (slope * difference_error + slope_error * difference.abs())
    grad_error = grad_error + (4 * UNIT + factor_error) * grad.abs()

    return Bounds(
        logprob_error,
        _product_error(grad, grad_error, head, output),
        _product_error(grad.T, grad_error.T, hidden, output),
    )


def assert_errs_like(plain: tuple, ours: tuple, truth: tuple, bounds: Bounds) -> None:
    """Log-probabilities and both gradients of a form, against float64 and beside the plain form.

    Each entry is held to its bound: the largest error of the plain form on one machine is luck.
    The rms error over all entries is not, and ours is at most twice the plain form's; one spacing
    of the output is forgiven.
    """
    names = ("logprob", "hidden grad", "head grad")
    held = (bounds.logprob, bounds.hidden_grad, bounds.head_grad)
    for what, p, o, t, bound in zip(names, plain, ours, truth, held, strict=True):
        error = (o.double() - t).abs()
        worst = (error / bound).nan_to_num(0.0).max()
        assert bool((error <= bound).all()), f"{what}: {worst:.3g} times what rounding can do"

        spacing = torch.finfo(p.dtype).eps * rms(t)
        assert rms(error) <= 2 * rms(p.double() - t) + spacing, what


def rms(values: Tensor) -> Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()
