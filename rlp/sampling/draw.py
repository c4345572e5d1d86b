"""One token per row, drawn by inverse CDF.

Dimensions
    R  rows;  V  vocabulary
"""

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
