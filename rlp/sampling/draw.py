"""One token per row, drawn by inverse CDF.

Dimensions
    R  rows;  V  vocabulary
"""

import torch
from torch import Tensor


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF at the sampling temperature.

    Args:
        logits: [R, V] float32.
        uniform: [R] float64 in [0, 1).

    Returns:
        token [R] int64; its log-probability and the distribution's entropy [R] float32, nats.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    cdf = probs.double().cumsum(dim=-1)
    # The first token whose cumulative mass is above u: never one of probability zero.
    token = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logits.shape[1] - 1
    )
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(dim=-1)
    return token, logprobs.gather(1, token[:, None])[:, 0], entropy
