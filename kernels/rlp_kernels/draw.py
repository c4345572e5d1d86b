"""One token per row of logits by inverse CDF, with its log-probability and the row's entropy.

The weights of a row, exp(logits / temperature - largest), are summed tile by tile; a float64 sum
runs over the tiles' masses alone, and the search inside the one tile in which the drawn number
falls. The vocabulary is passed over a few times where float64 sums over all of it would take many.

Dimensions
    R  rows;  V  vocabulary;  W  words of a tile
"""

import importlib

import torch
from torch import Tensor

TILE = 1024
"""W. 149 tiles of a vocabulary of 151,936 words."""

FORMS = ("plain", "triton")


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, *, form: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF at a temperature: the first whose cumulative probability is
    above `uniform`.

    A token of probability 0 is never drawn, whatever `uniform`. A row is its own: a NaN or +inf
    among its logits makes its log-probability and entropy NaN, and its token any in the vocabulary.
    Nothing is read back from the device, so that a CUDA graph can hold it.

    Error. With z = logits / temperature and u = 2^-24, each weight has a relative error of at most
    u (4 max |z| + 4) for float32 logits, up to a factor that the row shares, and a tile's sum one
    of 64 u more, as no chain of its additions is longer. A cumulative probability F errs by twice
    that times F (1 - F), so a token is not that of exact arithmetic only where `uniform` lies
    within

        (2 max |z| + 34) 2^-24

    of a boundary between two tokens: 5.6e-6 for |z| up to 30. Log-probability and entropy come of
    the largest z, the weights' sum and the sum of weight times z.

    Args:
        logits: [R, V] float32; float64 in the plain form.
        uniform: [R] float64 in [0, 1).
        temperature: positive.
        form: "plain", "triton", or "auto": triton for float32 on a GPU, else plain.

    Returns:
        token [R] int64; its log-probability and the distribution's entropy [R], nats, in the dtype
        of the logits, without gradient.

    Raises:
        ValueError: an argument is not as it should be.
        ImportError: the form needs Triton, which is not installed.
    """
    _check(logits, uniform, temperature)
    if form == "auto":
        form = "triton" if logits.is_cuda and logits.dtype == torch.float32 else "plain"
    if form not in FORMS:
        raise ValueError(
            f"draw_tokens: form must be one of auto, {', '.join(FORMS)}, got {form!r}."
        )
    if form == "triton":
        return _triton().draw_tokens(logits, uniform, temperature)

    logits = logits.detach()
    if logits.shape[1] <= TILE:
        return _from_one_tile(logits, uniform, temperature)
    return _from_tiles(logits, uniform, temperature, TILE)


def _check(logits: Tensor, uniform: Tensor, temperature: float) -> None:
    """Look at shapes and dtypes, not at values on the device."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"draw_tokens: logits must be [R, V], got {list(logits.shape)}.")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"draw_tokens: logits must be float32 or float64, got {logits.dtype}: a token drawn"
            " from rounded logits is not the policy's. Widen the hidden states before the head."
        )
    if uniform.shape != logits.shape[:1] or uniform.dtype != torch.float64:
        raise ValueError(
            f"draw_tokens: uniform must be [{len(logits)}] float64, one number per row of logits,"
            f" got {list(uniform.shape)} {uniform.dtype}."
        )
    if not temperature > 0:
        raise ValueError(f"draw_tokens: temperature must be positive, got {temperature}.")


def _triton():
    try:
        return importlib.import_module("rlp_kernels.triton_draw")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            "draw_tokens: form='triton' needs Triton, which is not installed: pip install triton,"
            " or write form='plain'."
        ) from error


def _from_one_tile(
    logits: Tensor, uniform: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a small vocabulary, where every operator costs more than its numbers, and an index with
    brackets as much as an operator."""
    last = logits.shape[1] - 1
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    probs = logprobs.exp()
    cumulative = probs.cumsum(dim=1, dtype=torch.float64)
    wanted = cumulative.narrow(1, last, 1) * uniform.unsqueeze(1)
    token = _first_above(cumulative, wanted).clamp_(max=last)  # in range for a row with NaN
    logprob = logprobs.gather(1, token).squeeze(1)
    entropy = logprobs.clamp_(min=_lowest(logits)).mul_(probs).sum(dim=1).neg_()
    return token.squeeze(1), logprob, entropy


def _from_tiles(
    logits: Tensor, uniform: Tensor, temperature: float, tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    tempered = logits / temperature
    tempered.sub_(tempered.amax(dim=1, keepdim=True)).clamp_(min=_lowest(logits))
    weights = tempered.exp()
    token, total = _search(weights, uniform, tile)
    log_total = total.log()[:, 0].to(logits.dtype)
    logprob = tempered.gather(1, token)[:, 0] - log_total
    mean = tempered.mul_(weights).sum(dim=1) / total[:, 0]
    return token[:, 0], logprob, log_total - mean.to(logits.dtype)


def _lowest(logits: Tensor) -> float:
    """Where exp gives 0: what stands for -inf, which times 0 would be NaN."""
    return -110.0 if logits.dtype == torch.float32 else -800.0


def _search(weights: Tensor, uniform: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The first word [R, 1] whose cumulative weight is above `uniform` times the row's sum, and
    that sum [R, 1] float64.

    Args:
        weights: [R, V], not negative.
    """
    vocabulary = weights.shape[1]
    masses = _tile_masses(weights, tile).double()
    cumulative = masses.cumsum(dim=1)
    total = cumulative[:, -1:]
    wanted = uniform[:, None] * total
    index = _first_above(cumulative, wanted).clamp_(max=masses.shape[1] - 1)

    mass = masses.gather(1, index)
    # Below 1, as `wanted` is below the sum that ends the tile; the sum that begins it is rounded.
    share = ((wanted - cumulative.gather(1, index) + mass) / mass).clamp_(min=0)
    first = index * tile
    word = first + torch.arange(tile, device=weights.device)
    inside = weights.gather(1, word.clamp(max=vocabulary - 1)).masked_fill_(word >= vocabulary, 0)
    cumulative = inside.cumsum(dim=1, dtype=torch.float64)
    token = first + _first_above(cumulative, share * cumulative[:, -1:])
    return token.clamp_(max=vocabulary - 1), total


def _first_above(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """[R, 1] the first place of [R, Y] that is above [R, 1]: one whose own weight is not 0."""
    return torch.searchsorted(cumulative, wanted, right=True)


def _tile_masses(weights: Tensor, tile: int) -> Tensor:
    """[R, V / W, rounded up]; the last tile is what is left."""
    whole = weights.shape[1] // tile * tile
    masses = weights[:, :whole].unflatten(1, (-1, tile)).sum(dim=2)
    if whole == weights.shape[1]:
        return masses
    return torch.cat([masses, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)
