"""One token per row, drawn by inverse CDF.

Dimensions
    R  rows;  V  vocabulary
"""

import torch
from torch import Tensor

from rlp_kernels import draw_tokens


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, *, form: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF at the sampling temperature, from the whole distribution.

    The logits of a sampler are float32 at least: a token drawn from narrower ones is not the
    policy's.

    Args:
        logits: [R, V] float32.
        uniform: [R] float64 in [0, 1).
        form: of `rlp_kernels.draw_tokens`.

    Returns:
        token [R] int64; its log-probability and the distribution's entropy [R] float32, nats.
    """
    return draw_tokens(logits, uniform, temperature, form=form)


MOST_PROBABLE = 1024
"""Tokens that a nucleus is looked for among first: a sort of a whole vocabulary takes as long as a
small model's forward."""


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits of the tokens that hold a share of the mass, and -inf for all others (top-p).

    Kept are the most probable tokens, as few as hold at least `top_p` at the sampling temperature,
    and those as probable as the last of them. What `draw` draws from the result is the distribution
    cut off there and made to sum to 1 again.

    Args:
        logits: [R, V] float32.
        top_p: in (0, 1]; 1 keeps all, and nothing is computed.

    Returns:
        [R, V] float32.
    """
    if top_p >= 1:
        return logits
    whole = (logits / temperature).logsumexp(dim=1, keepdim=True)
    for size in (MOST_PROBABLE, logits.shape[1]):
        largest = logits.topk(min(size, logits.shape[1]), dim=1).values
        reached = (largest / temperature - whole).exp().cumsum(dim=1) >= top_p
        if reached.any(dim=1).all():
            break
    # Rounding may leave the sum of all just below top_p: the last one is then the smallest.
    last = torch.where(reached.any(dim=1), reached.int().argmax(dim=1), largest.shape[1] - 1)
    return logits.masked_fill(logits < largest.gather(1, last[:, None]), -torch.inf)
