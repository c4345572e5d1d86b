"""Token log-probabilities, entropy and argmax in bounded memory: tiles of logits, on any device.

Twins of `reference.py`, same signatures and meaning. The [N, V] logits exist one tile at a
time; the softmax is folded up from tiles as they pass (the online softmax of Milakov and
Gimelshein, arXiv 1805.02867), and the backward pass computes each tile a second time instead
of keeping it. Beyond inputs and gradients the memory is a few tiles, whatever N and V are.

The vocabulary is the outer loop, the rows the inner one. In the backward pass the head's
gradient for one vocabulary tile is then complete before the next begins: it accumulates in
one float32 tile and is cast once. The order of tiles is fixed and nothing is atomic, so
reruns are equal to the bit.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary
    R  rows of a tile
    W  vocabulary of a tile

Logits, log-probabilities and entropies are in nats and are float32, or float64 where the
inputs are float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlp_kernels.reference import widened

# 1024 rows x 4096 words x 4 bytes = 16 MiB; the backward pass holds about five such tiles.
ROW_TILE = 1024
VOCABULARY_TILE = 4096


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

    Arguments and result are those of `rlp_kernels.token_logprobs`, which checks them. The tile
    sizes bound the memory; they change the result by rounding only.
    """
    return _TokenLogprobs.apply(
        hidden, head, target, inverse_temperature, excluded, softcap, row_tile, vocabulary_tile
    )


@torch.no_grad()
def token_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Entropy of each row's softmax, [N], nats, in one pass over the vocabulary.

    With m the largest logit so far, Z = sum_v exp(z_v - m) and U = sum_v exp(z_v - m) (z_v - m),

        entropy = log Z - U / Z

    When m grows by d, both sums shrink by exp(-d), and U also loses d for every unit of Z.
    """
    logits = _Logits(hidden, head, inverse_temperature, excluded, softcap)
    maximum, total = logits.empty_softmax()
    weighted = torch.zeros_like(total)
    for columns in _tiles(head.shape[0], vocabulary_tile):
        for rows in _tiles(hidden.shape[0], row_tile):
            tile = logits.tempered(logits.capped(rows, columns), rows, columns)
            raised = torch.maximum(maximum[rows], tile.amax(dim=1))
            drop = maximum[rows] - raised
            shifted = tile.sub_(raised[:, None])
            weight = shifted.exp()
            shifted.masked_fill_(logits.is_excluded(rows, columns), 0.0)  # 0 * -inf is NaN
            weighted[rows] = (weighted[rows] + total[rows] * drop) * drop.exp() + (weight * shifted).sum(dim=1)
            total[rows] = total[rows] * drop.exp() + weight.sum(dim=1)
            maximum[rows] = raised
    return total.log() - weighted / total


@torch.no_grad()
def token_argmax(
    hidden: Tensor,
    head: Tensor,
    *,
    excluded: Tensor,
    softcap: float = 0.0,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Most probable token of each row, [N] int64; the lowest index wins ties."""
    one = torch.ones(hidden.shape[0], device=hidden.device)
    logits = _Logits(hidden, head, one, excluded, softcap)
    best, _ = logits.empty_softmax()
    token = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for columns in _tiles(head.shape[0], vocabulary_tile):
        for rows in _tiles(hidden.shape[0], row_tile):
            tile = logits.tempered(logits.capped(rows, columns), rows, columns)
            tile_best, tile_token = tile.max(dim=1)
            higher = tile_best > best[rows]
            token[rows] = torch.where(higher, tile_token + columns.start, token[rows])
            best[rows] = torch.where(higher, tile_best, best[rows])
    return token


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` with a backward pass that computes the logits again, tile by tile.

    What is kept between the passes is the inputs themselves and one log-sum-exp per row, as its two
    parts, the largest logit and the log of the sum. The
    head is kept as the parameter, never as a view or a cast of it: ZeRO-3 releases its storage
    after the forward pass and gathers it again before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        inverse_temperature: Tensor,
        excluded: Tensor,
        softcap: float,
        row_tile: int,
        vocabulary_tile: int,
    ) -> Tensor:
        logits = _Logits(hidden, head, inverse_temperature, excluded, softcap)
        maximum, total = logits.empty_softmax()
        target_logit = torch.zeros_like(total)
        for columns in _tiles(head.shape[0], vocabulary_tile):
            for rows in _tiles(hidden.shape[0], row_tile):
                tile = logits.tempered(logits.capped(rows, columns), rows, columns)
                target_logit[rows] += _pick(tile, target[rows], columns)
                raised = torch.maximum(maximum[rows], tile.amax(dim=1))
                weight = tile.sub_(raised[:, None]).exp_()
                total[rows] = total[rows] * (maximum[rows] - raised).exp() + weight.sum(dim=1)
                maximum[rows] = raised

        # The log-sum-exp stays in two parts. Near probability one, the difference of two large
        # numbers would lose the digits of a small log-probability, which log_softmax keeps.
        log_total = total.log()
        ctx.save_for_backward(hidden, head, target, inverse_temperature, excluded, maximum, log_total)
        ctx.softcap, ctx.row_tile, ctx.vocabulary_tile = softcap, row_tile, vocabulary_tile
        ctx.head_shape = head.shape
        return (target_logit - maximum) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, logprob_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, target, inverse_temperature, excluded, maximum, log_total = ctx.saved_tensors
        if head.shape != ctx.head_shape:
            raise ValueError(
                f"token_logprobs backward: head was {list(ctx.head_shape)} in the forward pass and is "
                f"{list(head.shape)} here. Under ZeRO-3, gather the head before the backward pass reaches it."
            )
        logits = _Logits(hidden, head, inverse_temperature, excluded, ctx.softcap)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(widened(hidden)) if wants_hidden else None
        head_grad = torch.empty_like(head) if wants_head else None
        for columns in _tiles(head.shape[0], ctx.vocabulary_tile):
            head_tile = widened(head[columns])
            head_tile_grad = torch.zeros_like(head_tile) if wants_head else None
            for rows in _tiles(hidden.shape[0], ctx.row_tile):
                logit_grad = _logit_grad(logits, target, maximum, log_total, logprob_grad, rows, columns)
                # `out=` rather than `addmm_`, which torch.utils.flop_counter does not count.
                if wants_hidden:
                    torch.addmm(hidden_grad[rows], logit_grad, head_tile, out=hidden_grad[rows])
                if wants_head:
                    torch.addmm(head_tile_grad, logit_grad.T, widened(hidden[rows]), out=head_tile_grad)
            if wants_head:
                head_grad[columns] = head_tile_grad
        if wants_hidden:
            hidden_grad = hidden_grad.to(hidden.dtype)
        return hidden_grad, head_grad, None, None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Logits:
    """The [N, V] logits of one call, computed tile by tile and never held whole."""

    hidden: Tensor
    """[N, D]."""
    head: Tensor
    """[V, D]."""
    inverse_temperature: Tensor
    """[N] float32."""
    excluded: Tensor
    """[N] int64, -1 for none."""
    softcap: float
    """c in c tanh(z / c); 0 for none."""

    def empty_softmax(self) -> tuple[Tensor, Tensor]:
        """Largest logit and sum of exponentials, each [N], before any tile was seen.

        The largest logit starts at the most negative finite number: -inf would make the first
        difference NaN in a tile whose only token is excluded.
        """
        dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        num_rows = self.hidden.shape[0]
        maximum = torch.full((num_rows,), torch.finfo(dtype).min, dtype=dtype, device=self.hidden.device)
        return maximum, torch.zeros_like(maximum)

    def capped(self, rows: slice, columns: slice) -> Tensor:
        """softcap(hidden . head^T) of a tile, [R, W], float32 from the accumulator on."""
        hidden, head = self.hidden[rows], self.head[columns]
        # Autocast would turn the float32 product back into a bf16 one.
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
                logits = torch.mm(hidden, head.T, out_dtype=torch.float32)
            else:
                logits = torch.mm(widened(hidden), widened(head).T)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def tempered(self, capped: Tensor, rows: slice, columns: slice) -> Tensor:
        """The logits that enter the softmax: capped * inverse_temperature, -inf where excluded, [R, W]."""
        logits = capped * self.inverse_temperature[rows, None]
        return logits.masked_fill_(self.is_excluded(rows, columns), float("-inf"))

    def is_excluded(self, rows: slice, columns: slice) -> Tensor:
        """[R, W] bool, True at each row's excluded token."""
        return _is_token(self.excluded[rows], columns)


def _logit_grad(
    logits: _Logits,
    target: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    logprob_grad: Tensor,
    rows: slice,
    columns: slice,
) -> Tensor:
    """Gradient with respect to hidden . head^T of one tile, [R, W].

        d logprob / dz_v = ([v = target] - p_v) * inverse_temperature * (1 - (softcap(z_v) / c)^2)

    The last factor is the slope of the soft cap, one where there is none.
    """
    capped = logits.capped(rows, columns)
    shifted = logits.tempered(capped, rows, columns).sub_(maximum[rows, None])
    probability = shifted.sub_(log_total[rows, None]).exp_()
    is_target = _is_token(target[rows], columns)
    grad = probability.neg_().add_(is_target)
    grad.mul_((logprob_grad[rows] * logits.inverse_temperature[rows])[:, None])
    if logits.softcap:
        slope = capped.div_(logits.softcap).square_().neg_().add_(1.0)
        grad.mul_(slope)
    return grad


def _tiles(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length)."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _is_token(token: Tensor, columns: slice) -> Tensor:
    """[R, W] bool, True where the column is the row's token."""
    return torch.arange(columns.start, columns.stop, device=token.device) == token[:, None]


def _pick(tile: Tensor, token: Tensor, columns: slice) -> Tensor:
    """Each row's logit at its token, [R], and 0 where the token lies in another tile."""
    local = token - columns.start
    inside = (local >= 0) & (local < tile.shape[1])
    picked = tile.gather(1, local.clamp(0, tile.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~inside, 0.0)
