"""`draw.draw_tokens` in two launches: a pass over the logits tile by tile, then one tile of a row.

Dimensions
    R  rows;  V  vocabulary;  W  words of a tile;  X  tiles of a row
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlp_kernels.draw import TILE
from rlp_kernels.triton_form import INTERPRETED


def draw_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, *, tile: int = TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """As `draw.draw_tokens`, which checks the arguments.

    Args:
        tile: W, a power of 2.
    """
    if logits.dtype == torch.float64:
        raise ValueError(
            "draw_tokens: form='triton' sums tiles in float32, and logits are float64: write"
            " form='plain'."
        )
    if not logits.is_cuda and not INTERPRETED:
        raise ValueError(
            f"draw_tokens: form='triton' runs on CUDA tensors, and logits are on {logits.device}:"
            " write form='plain', or set TRITON_INTERPRET=1 in the environment before Python"
            " starts, to interpret the kernels on the CPU."
        )

    num_rows, vocabulary = logits.shape
    num_tiles = triton.cdiv(vocabulary, tile)
    tiles = logits.new_empty(3, num_rows, num_tiles)
    token = logits.new_empty(num_rows, dtype=torch.int64)
    logprob, entropy = logits.new_empty(2, num_rows)
    if not num_rows:
        return token, logprob, entropy

    with torch.cuda.device_of(logits):
        tile_kernel[(num_rows * num_tiles,)](
            *tiles, logits,
            vocabulary, num_tiles, *logits.stride(), temperature,
            TILE=tile, num_warps=4,
        )  # fmt: skip  # arguments by kind
        pick_kernel[(num_rows,)](
            token, logprob, entropy, logits, uniform, *tiles,
            vocabulary, num_tiles, *logits.stride(), uniform.stride(0), temperature,
            TILE=tile, TILES=triton.next_power_of_2(num_tiles), num_warps=4,
        )  # fmt: skip  # arguments by kind
    return token, logprob, entropy


@triton.jit
def tile_kernel(
    maximum, mass, moment, logits,
    vocabulary, num_tiles, row_stride, column_stride, temperature,
    TILE: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """Of each tile of each row, [R, X]: the largest z, sum of e = exp(z - largest), sum of
    e (z - largest)."""
    place = tl.program_id(0).to(tl.int64)
    row, tile = place // num_tiles, place % num_tiles
    tempered = _tempered(
        logits + row * row_stride, tile, vocabulary, column_stride, temperature, TILE
    )
    largest = tl.max(tempered, 0)
    below, weight = _weights(tempered, largest)
    tl.store(maximum + place, largest)
    tl.store(mass + place, tl.sum(weight, 0))
    tl.store(moment + place, tl.sum(tl.where(weight == 0.0, 0.0, weight * below), 0))


@triton.jit
def pick_kernel(
    token, logprob, entropy, logits, uniform, maximum, mass, moment,
    vocabulary, num_tiles, row_stride, column_stride, uniform_stride, temperature,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """The tile that the number of a row falls in, and the word in it."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    place, is_tile = row * num_tiles + tiles, tiles < num_tiles
    largest = tl.load(maximum + place, mask=is_tile, other=float("-inf"))
    tile_mass = tl.load(mass + place, mask=is_tile, other=0.0)
    tile_moment = tl.load(moment + place, mask=is_tile, other=0.0)

    # A tile of nothing but -inf has mass 0; one with NaN has mass NaN, and passes it on.
    row_largest = tl.max(largest, 0)
    is_empty = tile_mass == 0.0
    below = largest - row_largest
    scale = tl.exp(below).to(tl.float64)
    weight = tl.where(is_empty, 0.0, tile_mass.to(tl.float64) * scale)
    total = tl.sum(weight, 0)
    mean = tl.sum(tl.where(is_empty, 0.0, (tile_moment + tile_mass * below) * scale), 0) / total

    wanted = tl.load(uniform + row * uniform_stride) * total
    tile, left = _first_above(weight, tiles, wanted, TILES)
    share = left / tl.sum(tl.where(tiles == tile, weight, 0.0), 0)
    tempered = _tempered(
        logits + row * row_stride, tile, vocabulary, column_stride, temperature, TILE
    )
    _, word_weight = _weights(tempered, tl.sum(tl.where(tiles == tile, largest, 0.0), 0))
    word_weight = word_weight.to(tl.float64)
    words = tl.arange(0, TILE)
    word, _ = _first_above(word_weight, words, share * tl.sum(word_weight, 0), TILE)

    log_total = tl.log(total)
    picked = tl.sum(tl.where(words == word, tempered, 0.0), 0)
    tl.store(token + row, tl.minimum(tile * TILE + word, vocabulary - 1).to(tl.int64))
    tl.store(logprob + row, (picked - row_largest) - log_total.to(tl.float32))
    tl.store(entropy + row, (log_total - mean).to(tl.float32))


@triton.jit
def _tempered(row, tile, vocabulary, column_stride, temperature, TILE: tl.constexpr):
    """z of a tile, [W], -inf beyond the vocabulary."""
    column = tile * TILE + tl.arange(0, TILE)
    logits = tl.load(row + column * column_stride, mask=column < vocabulary, other=float("-inf"))
    # As exact as torch's; the plain sign would round by twice as much.
    return tl.div_rn(logits, tl.zeros_like(logits) + temperature)


@triton.jit
def _weights(tempered, largest):
    """z - largest and its exponential; a tile of nothing but -inf weighs 0."""
    below = tempered - tl.where(largest == float("-inf"), 0.0, largest)
    return below, tl.exp(below)


@triton.jit
def _first_above(weight, places, wanted, SIZE: tl.constexpr):
    """The first place whose cumulative weight is above `wanted`, and how much of `wanted` is left
    in it.

    Only places with a weight count: parallel partial sums may rise by rounding where nothing is
    added, or end below a sum in another order. Where none is above, it is the last with a weight.
    """
    cumulative = tl.cumsum(weight, 0)
    above = tl.min(tl.where((cumulative > wanted) & (weight > 0.0), places, SIZE), 0)
    last = tl.max(tl.where(weight > 0.0, places, 0), 0)
    place = tl.where(above == SIZE, last, above)
    return place, wanted - tl.sum(tl.where(places == place, cumulative - weight, 0.0), 0)
