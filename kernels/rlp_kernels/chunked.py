"""Token log-probabilities, entropy and argmax in bounded memory: tiles of logits, on any device.

Twins of `reference.py`, same signatures and meaning. The [N, V] logits exist one tile at a
time; the softmax is folded up from tiles as they pass (the online softmax of Milakov and
Gimelshein, arXiv 1805.02867), and the backward pass computes each tile a second time instead
of keeping it. Beyond inputs and gradients the memory is a few tiles, whatever N and V are.

The vocabulary is the outer loop, the rows the inner one. In the backward pass the head's
gradient for one vocabulary tile is then complete before the next begins: it accumulates in
one float32 tile and is cast once. The order of tiles is fixed and nothing is atomic, so
reruns are equal to the bit.

`gradients` and `gradients_in_forward` are the two orders of that loop; the forms on a GPU use
them too and bring their own ways to make a tile and to multiply it.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary
    R  rows of a tile
    W  vocabulary of a tile

Logits, log-probabilities and entropies are in nats and are float32, or float64 where the
inputs are float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlp_kernels.reference import widened

# 1024 rows x 4096 words x 4 bytes = 16 MiB; the backward pass holds about five such tiles.
ROW_TILE = 1024
VOCABULARY_TILE = 4096

# 3,533 rows of a 151,936-word vocabulary. Each row tile adds to the [V, D] float32 gradient of the
# head once, 8 D V bytes beside 6 R D V operations: fewer rows would make that traffic the cost.
MAX_KEPT_BYTES = 2 * 2**30


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

    Arguments and result are those of `rlp_kernels.token_logprobs`, which checks them. The tile
    sizes bound the memory; they change the result by rounding only.
    """
    return _TokenLogprobs.apply(
        hidden,
        head,
        bias,
        target,
        inverse_temperature,
        excluded,
        softcap,
        row_tile,
        vocabulary_tile,
    )


@torch.no_grad()
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
    row_tile: int | None = None,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and, in the same pass, the gradients of sum_n coefficient_n * logprob_n.

    Arguments and result are those of `rlp_kernels.token_logprobs_with_grad`. `row_tile` is how
    many rows keep all their logits at once; by default as many as fit `MAX_KEPT_BYTES`.
    """
    logits = _Logits(hidden, head, None, inverse_temperature, excluded, softcap)

    def softmax(rows: slice, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maximum, total = (part[rows] for part in logits.empty_softmax())
        target_logit = torch.zeros_like(total)

        for columns in tiles(head.shape[0], vocabulary_tile):
            kept[:, columns] = logits.capped(rows, columns)
            tile = logits.tempered(kept[:, columns], rows, columns)
            _fold(tile, target[rows], columns, maximum, total, target_logit)

        log_total = total.log_()
        return (target_logit - maximum) - log_total, maximum, log_total

    def logit_grad(
        kept: Tensor, maximum: Tensor, log_total: Tensor, rows: slice, columns: slice
    ) -> Tensor:
        return _logit_grad(
            logits, kept, target[rows], maximum, log_total, coefficient[rows], rows, columns
        )

    return gradients_in_forward(
        hidden,
        head,
        softmax=softmax,
        logit_grad=logit_grad,
        accumulate=accumulate,
        dtype=product_dtype(hidden),
        wants_head=wants_head,
        row_tile=row_tile or kept_rows(head.shape[0]),
        vocabulary_tile=vocabulary_tile,
    )


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


@torch.no_grad()
def token_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Entropy of each row's softmax, [N], nats, in one pass over the vocabulary.

    With m the largest logit so far, Z = sum_v exp(z_v - m) and U = sum_v exp(z_v - m) (z_v - m),

        entropy = log Z - U / Z

    When m grows by d, both sums shrink by exp(-d), and U also loses d for every unit of Z.
    """
    logits = _Logits(hidden, head, bias, inverse_temperature, excluded, softcap)
    maximum, total = logits.empty_softmax()
    weighted = torch.zeros_like(total)

    for columns in tiles(head.shape[0], vocabulary_tile):
        for rows in tiles(hidden.shape[0], row_tile):
            tile = logits.tempered(logits.capped(rows, columns), rows, columns)
            raised = torch.maximum(maximum[rows], tile.amax(dim=1))
            drop = maximum[rows] - raised
            shifted = tile.sub_(raised[:, None])
            weight = shifted.exp()
            shifted.masked_fill_(logits.is_excluded(rows, columns), 0.0)  # 0 * -inf is NaN

            before = (weighted[rows] + total[rows] * drop) * drop.exp()
            weighted[rows] = before + (weight * shifted).sum(dim=1)
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
    bias: Tensor | None = None,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Most probable token of each row, [N] int64; the lowest index wins ties."""
    one = torch.ones(hidden.shape[0], device=hidden.device)
    logits = _Logits(hidden, head, bias, one, excluded, softcap)
    best, _ = logits.empty_softmax()
    token = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)

    for columns in tiles(head.shape[0], vocabulary_tile):
        for rows in tiles(hidden.shape[0], row_tile):
            tile = logits.tempered(logits.capped(rows, columns), rows, columns)
            tile_best, tile_token = tile.max(dim=1)
            higher = tile_best > best[rows]
            token[rows] = torch.where(higher, tile_token + columns.start, token[rows])
            best[rows] = torch.where(higher, tile_best, best[rows])

    return token


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` with a backward pass that computes the logits again, tile by tile.

    What is kept between the passes is the inputs themselves and one log-sum-exp per row, as its two
    parts, the largest logit and the log of the sum. The head is kept as the parameter, never as a
    view or a cast of it: ZeRO-3 releases its storage after the forward pass and gathers it again
    before the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        target: Tensor,
        inverse_temperature: Tensor,
        excluded: Tensor,
        softcap: float,
        row_tile: int,
        vocabulary_tile: int,
    ) -> Tensor:
        logits = _Logits(hidden, head, bias, inverse_temperature, excluded, softcap)
        maximum, total = logits.empty_softmax()
        target_logit = torch.zeros_like(total)

        for columns in tiles(head.shape[0], vocabulary_tile):
            for rows in tiles(hidden.shape[0], row_tile):
                tile = logits.tempered(logits.capped(rows, columns), rows, columns)
                _fold(tile, target[rows], columns, maximum[rows], total[rows], target_logit[rows])

        # The log-sum-exp stays in two parts. Near probability one, the difference of two large
        # numbers would lose the digits of a small log-probability, which log_softmax keeps.
        log_total = total.log()
        ctx.save_for_backward(
            hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total
        )
        ctx.softcap, ctx.row_tile, ctx.vocabulary_tile = softcap, row_tile, vocabulary_tile
        ctx.head_shape = head.shape
        return (target_logit - maximum) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, logprob_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total = (
            ctx.saved_tensors
        )
        refuse_released(head, bias, ctx.head_shape)
        logits = _Logits(hidden, head, bias, inverse_temperature, excluded, ctx.softcap)

        def logit_grad(rows: slice, columns: slice) -> Tensor:
            capped = logits.capped(rows, columns)
            row_softmax = (target[rows], maximum[rows], log_total[rows], logprob_grad[rows])
            return _logit_grad(logits, capped, *row_softmax, rows, columns)

        input_grads = gradients(
            hidden,
            head,
            logit_grad=logit_grad,
            accumulate=accumulate,
            dtype=product_dtype(hidden),
            wanted=ctx.needs_input_grad[:3],
            row_tile=ctx.row_tile,
            vocabulary_tile=ctx.vocabulary_tile,
        )
        return *input_grads, *[None] * 6


def gradients(
    hidden: Tensor,
    head: Tensor,
    *,
    logit_grad: Callable[[slice, slice], Tensor],
    accumulate: Callable[[Tensor, Tensor, Tensor], None],
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
    row_tile: int,
    vocabulary_tile: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in hidden, head and bias from tiles of the gradient in the logits.

    Each tile is made, multiplied and dropped.

    Args:
        logit_grad: (rows, columns) to the gradient of that tile of logits, [R, W].
        accumulate: (total, left, right) adds left @ right to the float32 total, in place.
        dtype: what the two factors of a product are in.
        wanted: whether hidden, head and bias need a gradient.
        row_tile, vocabulary_tile: R and W.

    Returns:
        [N, D], [V, D] and [V] in the inputs' dtype, None where not wanted.
    """
    wants_hidden, wants_head, wants_bias = wanted
    hidden_grad = _zeros(hidden) if wants_hidden else None
    head_grad = torch.empty_like(head) if wants_head else None
    bias_grad = hidden.new_zeros(head.shape[0], dtype=wide_dtype(hidden)) if wants_bias else None

    for columns in tiles(head.shape[0], vocabulary_tile):
        head_tile = head[columns].to(dtype)
        head_tile_grad = _zeros(head_tile) if wants_head else None

        for rows in tiles(hidden.shape[0], row_tile):
            grad = logit_grad(rows, columns).to(dtype)
            if wants_hidden:
                accumulate(hidden_grad[rows], grad, head_tile)
            if wants_head:
                accumulate(head_tile_grad, grad.T, hidden[rows].to(dtype))
            if wants_bias:
                bias_grad[columns] += grad.sum(dim=0, dtype=bias_grad.dtype)

        if wants_head:
            head_grad[columns] = head_tile_grad

    if wants_hidden:
        hidden_grad = hidden_grad.to(hidden.dtype)
    if wants_bias:
        bias_grad = bias_grad.to(hidden.dtype)
    return hidden_grad, head_grad, bias_grad


def gradients_in_forward(
    hidden: Tensor,
    head: Tensor,
    *,
    softmax: Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]],
    logit_grad: Callable[[Tensor, Tensor, Tensor, slice, slice], Tensor],
    accumulate: Callable[[Tensor, Tensor, Tensor], None],
    dtype: torch.dtype,
    wants_head: bool,
    row_tile: int,
    vocabulary_tile: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and gradients, the logits of one row tile kept from the one to the other.

    Two passes over the vocabulary for each tile of rows: the first makes the logits, keeps them
    and folds up the softmax; the second turns them into their gradient and multiplies it. The
    rows are the outer loop, so the gradient of the head grows as a whole, [V, D] in float32.

    Args:
        softmax: (rows, kept) fills kept with the capped logits of those rows, [R, V], and gives the
            log-probability, the largest tempered logit and the log of the sum, each [R].
        logit_grad: (a tile of kept, maximum, log_total, rows, columns) to the gradient, [R, W].
        accumulate, dtype, row_tile, vocabulary_tile: as in `gradients`.

    Returns:
        [N] float32, [N, D] in hidden's dtype, and [V, D] in head's, or None.
    """
    num_rows, vocabulary = hidden.shape[0], head.shape[0]
    kept = hidden.new_empty(min(row_tile, num_rows), vocabulary, dtype=wide_dtype(hidden))
    logprob = hidden.new_empty(num_rows, dtype=wide_dtype(hidden))
    hidden_grad = torch.empty_like(hidden)
    head_grad = _zeros(head) if wants_head else None

    for rows in tiles(num_rows, row_tile):
        row_kept = kept[: rows.stop - rows.start]
        logprob[rows], maximum, log_total = softmax(rows, row_kept)

        row_hidden = hidden[rows].to(dtype)
        row_hidden_grad = _zeros(row_hidden)
        for columns in tiles(vocabulary, vocabulary_tile):
            grad = logit_grad(row_kept[:, columns], maximum, log_total, rows, columns).to(dtype)
            accumulate(row_hidden_grad, grad, head[columns].to(dtype))
            if wants_head:
                accumulate(head_grad[columns], grad.T, row_hidden)
        hidden_grad[rows] = row_hidden_grad

    return logprob, hidden_grad, head_grad.to(head.dtype) if wants_head else None


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the sum of bf16 factors, which only a GPU has here, stays float32."""
    # `out=` rather than `addmm_`, which torch.utils.flop_counter does not count.
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What the gradient of the logits is multiplied in.

    That is bf16 for bf16 inputs on a GPU, else float32, or float64 for float64 inputs.

    Rounding that gradient to bf16 makes the rms error of the result 1.3 to 1.4 times the plain
    form's, which is the rounding of its output (emulated on a CPU: N 64 to 2048, V 2048 to 32,768),
    and keeps the tensor cores. fp16 inputs stay in float32: three more bits in the output would
    make the same rounding 7 times, and fp16 itself has no room for probabilities below 6e-8.
    """
    if hidden.is_cuda and hidden.dtype == torch.bfloat16:
        return torch.bfloat16
    return wide_dtype(hidden)


def kept_rows(vocabulary: int, max_bytes: int = MAX_KEPT_BYTES) -> int:
    """How many rows of float32 logits fit in `max_bytes`, a multiple of 128 where that many fit."""
    rows = max(1, max_bytes // (4 * vocabulary))
    return rows // 128 * 128 or rows


def refuse_released(head: Tensor, bias: Tensor | None, shape: torch.Size) -> None:
    """Refuse a head or bias that was released after the forward pass and not gathered again.

    Raises:
        ValueError: one is no longer of the shape that it had there.
    """
    for name, parameter, expected in (("head", head, shape), ("bias", bias, shape[:1])):
        if parameter is not None and parameter.shape != expected:
            raise ValueError(
                f"token_logprobs backward: {name} was {list(expected)} in the forward pass and is"
                f" {list(parameter.shape)} here. Under ZeRO-3, gather the {name} before the"
                " backward pass reaches it."
            )


@dataclass(frozen=True, slots=True)
class _Logits:
    """The [N, V] logits of one call, computed tile by tile and never held whole."""

    hidden: Tensor
    """[N, D]."""
    head: Tensor
    """[V, D]."""
    bias: Tensor | None
    """[V]; None for none."""
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
        dtype, num_rows = wide_dtype(self.hidden), self.hidden.shape[0]
        maximum = torch.full(
            (num_rows,), torch.finfo(dtype).min, dtype=dtype, device=self.hidden.device
        )
        return maximum, torch.zeros_like(maximum)

    def capped(self, rows: slice, columns: slice) -> Tensor:
        """softcap(hidden . head^T + bias) of a tile, [R, W], float32 from the accumulator on."""
        hidden, head = self.hidden[rows], self.head[columns]
        # Autocast would turn the float32 product back into a bf16 one.
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
                logits = torch.mm(hidden, head.T, out_dtype=torch.float32)
            else:
                logits = torch.mm(widened(hidden), widened(head).T)

        if self.bias is not None:
            logits.add_(widened(self.bias[columns]))
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def tempered(self, capped: Tensor, rows: slice, columns: slice) -> Tensor:
        """The logits that enter the softmax, [R, W]: tempered, and -inf where excluded."""
        logits = capped * self.inverse_temperature[rows, None]
        return logits.masked_fill_(self.is_excluded(rows, columns), float("-inf"))

    def is_excluded(self, rows: slice, columns: slice) -> Tensor:
        """[R, W] bool, True at each row's excluded token."""
        return _is_token(self.excluded[rows], columns)


def _fold(
    tile: Tensor,
    target: Tensor,
    columns: slice,
    maximum: Tensor,
    total: Tensor,
    target_logit: Tensor,
) -> None:
    """Fold a tile of tempered logits, [R, W], into the running softmax of its rows, in place.

    Uses up `tile`. The others are [R].
    """
    target_logit += _pick(tile, target, columns)
    raised = torch.maximum(maximum, tile.amax(dim=1))
    weight = tile.sub_(raised[:, None]).exp_()
    total.mul_((maximum - raised).exp()).add_(weight.sum(dim=1))
    maximum.copy_(raised)


def _logit_grad(
    logits: _Logits,
    capped: Tensor,
    target: Tensor,
    maximum: Tensor,
    log_total: Tensor,
    logprob_grad: Tensor,
    rows: slice,
    columns: slice,
) -> Tensor:
    """Gradient with respect to hidden . head^T + bias of one tile, [R, W].

        d logprob / dz_v = ([v = target] - p_v) * inverse_temperature * (1 - (softcap(z_v) / c)^2)

    The last factor is the slope of the soft cap, one where there is none. Uses up `capped`, the
    tile's logits.
    """
    shifted = logits.tempered(capped, rows, columns).sub_(maximum[:, None])
    probability = shifted.sub_(log_total[:, None]).exp_()
    grad = probability.neg_().add_(_is_token(target, columns))
    grad.mul_((logprob_grad * logits.inverse_temperature[rows])[:, None])
    if logits.softcap:
        slope = capped.div_(logits.softcap).square_().neg_().add_(1.0)
        grad.mul_(slope)
    return grad


def tiles(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length)."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What logits and sums are in: float64 for float64 inputs, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _zeros(tensor: Tensor) -> Tensor:
    """Where gradients of the tensor's shape are summed up."""
    return torch.zeros_like(tensor, dtype=wide_dtype(tensor))


def _is_token(token: Tensor, columns: slice) -> Tensor:
    """[R, W] bool, True where the column is the row's token."""
    return torch.arange(columns.start, columns.stop, device=token.device) == token[:, None]


def _pick(tile: Tensor, token: Tensor, columns: slice) -> Tensor:
    """Each row's logit at its token, [R], and 0 where the token lies in another tile."""
    local = token - columns.start
    inside = (local >= 0) & (local < tile.shape[1])
    picked = tile.gather(1, local.clamp(0, tile.shape[1] - 1)[:, None])[:, 0]
    return picked.masked_fill(~inside, 0.0)
