"""Token log-probabilities from the vendor's matrix product and a fold, tile by tile in L2.

Twins of `reference.py` and `chunked.py`, same signatures and meaning. `torch.mm` with bf16 inputs
and a float32 result writes a tile of logits small enough to stay in the L2 cache; a Triton kernel
reads it from there once and folds it into each row's largest logit, sum of exponentials and
target's logit. The backward pass is `chunked.gradients` with a kernel that turns the tile into
its gradient in one pass.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary
    R  rows of a tile
    W  vocabulary of a tile

Logits, log-probabilities and everything summed are float32; log-probabilities are in nats.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlp_kernels import chunked
from rlp_kernels.reference import widened
from rlp_kernels.triton_form import Rows, check_device, logit_grad_of
from rlp_kernels.triton_kernels import capped_logits, row_settings

# 2048 rows x 4096 words x 4 bytes = 34 MB, which stays in the 50 MB of L2 of an H100 or H200.
ROW_TILE = 2048
VOCABULARY_TILE = 4096


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
    check_device("folded", hidden)
    if hidden.is_cuda and hidden.dtype != torch.float32:
        refuse_narrow_product(hidden.device, hidden.dtype)
    return _TokenLogprobs.apply(
        hidden,
        head,
        bias,
        target,
        inverse_temperature,
        excluded,
        float(softcap),
        row_tile,
        vocabulary_tile,
    )


@cache
def refuse_narrow_product(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a torch that cannot multiply 16-bit matrices into a float32 one.

    It is tried once per device and dtype.

    Raises:
        RuntimeError: it cannot; the message says what to write.
    """
    tile = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(tile, tile, out_dtype=torch.float32, out=torch.empty(16, 16, device=device))
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(
            f"form='folded' needs torch.mm(..., out_dtype=torch.float32) for {dtype} on {device},"
            f" which torch {torch.__version__} refuses: {error}. Write form='triton'."
        ) from error


class _TokenLogprobs(torch.autograd.Function):
    """`token_logprobs` with a backward pass that computes the logits again, tile by tile.

    Kept between the passes: the inputs and two numbers per row, the largest logit and the log of
    the sum. The head is kept as the parameter itself, as in `chunked.py` and for its reason.
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
        every_row = Rows(target, inverse_temperature, excluded, softcap)
        num_rows = hidden.shape[0]

        maximum = hidden.new_full((num_rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
        total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)
        buffer = _tile_buffer(hidden, head, row_tile, vocabulary_tile)

        # Sliced once: a tile is 43 us of work for an H200 at 790 TFLOP/s, and slices in the loop
        # would take Python as long.
        row_parts = [
            (hidden[rows], every_row.of(rows), maximum[rows], total[rows], target_logit[rows])
            for rows in chunked.tiles(num_rows, row_tile)
        ]

        with torch.cuda.device_of(hidden):
            for columns in chunked.tiles(head.shape[0], vocabulary_tile):
                head_tile, bias_tile = head[columns], None if bias is None else bias[columns]
                for row_hidden, rows, *softmax in row_parts:
                    product = _product(row_hidden, head_tile, bias_tile, buffer)
                    _fold(product, rows, columns, *softmax)

        log_total = total.log_()
        ctx.save_for_backward(
            hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total
        )
        ctx.softcap, ctx.head_shape = softcap, head.shape
        ctx.row_tile, ctx.vocabulary_tile = row_tile, vocabulary_tile
        return (target_logit - maximum) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, logprob_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total = (
            ctx.saved_tensors
        )
        chunked.refuse_released(head, bias, ctx.head_shape)
        every_row = Rows(target, inverse_temperature, excluded, ctx.softcap)
        dtype = chunked.product_dtype(hidden)
        buffer = _tile_buffer(hidden, head, ctx.row_tile, ctx.vocabulary_tile)

        def logit_grad(rows: slice, columns: slice) -> Tensor:
            bias_tile = None if bias is None else bias[columns]
            product = _product(hidden[rows], head[columns], bias_tile, buffer)
            row_softmax = (maximum[rows], log_total[rows], logprob_grad[rows])
            return logit_grad_of(product, every_row.of(rows), *row_softmax, columns, dtype)

        with torch.cuda.device_of(hidden):
            input_grads = chunked.gradients(
                hidden,
                head,
                logit_grad=logit_grad,
                accumulate=chunked.accumulate,
                dtype=dtype,
                wanted=ctx.needs_input_grad[:3],
                row_tile=ctx.row_tile,
                vocabulary_tile=ctx.vocabulary_tile,
            )

        return *input_grads, *[None] * 6


def _tile_buffer(hidden: Tensor, head: Tensor, row_tile: int, vocabulary_tile: int) -> Tensor:
    """Memory for the logits of one tile, used for every tile so that it stays in L2."""
    num_logits = min(row_tile, hidden.shape[0]) * min(vocabulary_tile, head.shape[0])
    return hidden.new_empty(num_logits, dtype=torch.float32)


def _product(hidden: Tensor, head: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """hidden . head^T + bias of a tile, [R, W], in the buffer's memory.

    It is float32 from the accumulator on.
    """
    num_rows, num_words = hidden.shape[0], head.shape[0]
    product = buffer[: num_rows * num_words].reshape(num_rows, num_words)

    # `out=` is not autocast, so the float32 product stays one.
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.mm(hidden, head.T, out_dtype=torch.float32, out=product)
    else:
        torch.mm(widened(hidden), widened(head).T, out=product)

    return product if bias is None else product.add_(widened(bias))


def _fold(
    product: Tensor,
    rows: Rows,
    columns: slice,
    maximum: Tensor,
    total: Tensor,
    target_logit: Tensor,
) -> None:
    """Fold one tile into the running softmax of its rows, each [R], in place."""
    num_rows, num_words = product.shape
    _fold_kernel[(triton.cdiv(num_rows, 4),)](
        maximum, total, target_logit, product, *rows.tensors,
        num_rows, num_words, columns.start, rows.softcap,
        CAPPED=rows.softcap > 0, ROWS=4, WORDS=1024, num_warps=4,
    )  # fmt: skip  # arguments by kind


@triton.jit
def _fold_kernel(
    maximum, total, target_logit, product, target, inverse_temperature, excluded,
    num_rows, num_words, first_word, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """Walk along a few rows of the tile, left to right."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row_target, row_temperature, row_excluded = row_settings(
        target, inverse_temperature, excluded, row, in_rows
    )
    running_maximum = tl.load(maximum + row, mask=in_rows, other=0.0)
    running_total = tl.load(total + row, mask=in_rows, other=0.0)
    picked = tl.load(target_logit + row, mask=in_rows, other=0.0)

    for first in range(0, num_words, WORDS):
        column = first + tl.arange(0, WORDS)
        in_tile = in_rows[:, None] & (column < num_words)[None, :]
        tile = tl.load(
            product + row[:, None] * num_words + column[None, :], mask=in_tile, other=0.0
        )

        word = first_word + column
        logits = capped_logits(tile, softcap, CAPPED) * row_temperature[:, None]
        is_left_out = (word[None, :] == row_excluded[:, None]) | (column >= num_words)[None, :]
        logits = tl.where(is_left_out, float("-inf"), logits)

        # Beyond the tile's last word come the next tile's words, and the target may be one of them.
        is_target = in_tile & (word[None, :] == row_target[:, None])
        picked += tl.sum(tl.where(is_target, logits, 0.0), 1)

        raised = tl.maximum(running_maximum, tl.max(logits, 1))
        weight = tl.sum(tl.exp(logits - raised[:, None]), 1)
        running_total = running_total * tl.exp(running_maximum - raised) + weight
        running_maximum = raised

    tl.store(maximum + row, running_maximum, mask=in_rows)
    tl.store(total + row, running_total, mask=in_rows)
    tl.store(target_logit + row, picked, mask=in_rows)
