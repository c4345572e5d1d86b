"""Token log-probabilities in Triton: the softmax of a tile of logits is folded up in registers.

Twins of `reference.py` and `chunked.py`, same signatures and meaning. The kernels are in
`triton_kernels.py`; here they are given memory, sizes and a backward pass.

Forward: a program owns a tile of rows and one fixed part of the vocabulary. It walks through
that part tile by tile and keeps per row the largest logit, the sum of exponentials and the
target's logit; a second kernel merges the parts in their order. Where the parts begin depends
on `SPLIT_WORDS` alone, no result is added atomically, and no tile size is tuned at run time:
a row's log-probability is the same number in any batch, in any rerun and in any process.

Backward: as in `chunked.py`, tile by tile. A tile of logits is computed again and leaves its
kernel as the gradient of the logits; another kernel multiplies it with hidden and head.

Under TRITON_INTERPRET=1, set before this module is imported, everything here runs on CPU
tensors: the arithmetic is tested without a GPU.

Dimensions
    N  rows, one per predicted token
    M  positions; G  thoughts per position
    D  width of the hidden state
    V  vocabulary
    S  parts of the vocabulary
    R  rows of a tile
    W  vocabulary of a tile

Logits, log-probabilities and everything summed are float32; log-probabilities are in nats.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlp_kernels import chunked
from rlp_kernels.triton_kernels import (
    accumulate_kernel,
    logit_grad_kernel,
    merge_kernel,
    recomputed_logit_grad_kernel,
    split_softmax_kernel,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this package run in Triton's interpreter, on CPU tensors."""

# A part is 4096 words, 38 of them in a 151,936-word vocabulary: enough programs for small N, and
# partial results of 12 bytes per row and part.
SPLIT_WORDS = 4096

# The backward pass makes the gradient of 4096 x 4096 logits at a time: 34 MB in bf16, which stays
# in the 50 MB of L2 between the kernel that writes it and the two that read it.
ROW_TILE = 4096
VOCABULARY_TILE = 4096


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program multiplies at a time, and how. Sizes are powers of two, at least 16."""

    rows: int
    """Rows of an output tile."""
    columns: int
    """Columns of an output tile."""
    depth: int
    """Terms of the sum that are loaded at once."""
    warps: int
    stages: int
    """Loads in flight."""


# Chosen by arithmetic, not yet by measurement. 128 x 256 x 64 in bf16: the accumulator takes 128 of
# 255 registers in each of 256 threads, and three stages of both operands 147 KB of 227 KB of shared
# memory.
HALF_TILES = Tiles(rows=128, columns=256, depth=64, warps=8, stages=3)
TF32_TILES = Tiles(rows=128, columns=128, depth=32, warps=8, stages=3)
# float32 has no exact product on the tensor cores; these tiles serve tests and small models.
FLOAT_TILES = Tiles(rows=64, columns=64, depth=32, warps=4, stages=2)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sizes: Tiles | None = None,
    split_words: int = SPLIT_WORDS,
    row_tile: int = ROW_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

    Arguments and result are those of `rlp_kernels.token_logprobs`, which checks them. The sizes
    change the result by rounding only.
    """
    check_device("triton", hidden)
    rows = (target, inverse_temperature, excluded, float(softcap))
    return _TokenLogprobs.apply(
        hidden, head, bias, *rows, sizes, split_words, row_tile, vocabulary_tile
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
    sizes: Tiles | None = None,
    split_words: int = SPLIT_WORDS,
    row_tile: int | None = None,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and, in the same pass, the gradients of sum_n coefficient_n * logprob_n.

    Arguments and result are those of `rlp_kernels.token_logprobs_with_grad`. The first pass over
    the vocabulary stores hidden . head^T, float32, for `row_tile` rows at a time.
    """
    check_device("triton", hidden)
    every_row = Rows(target, inverse_temperature, excluded, float(softcap))
    dtype = product_dtype(hidden.dtype)

    def softmax(rows: slice, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maximum, log_total, logprob = _softmax(
            hidden[rows], head, None, every_row.of(rows), sizes, split_words, kept=kept
        )
        return logprob, maximum, log_total

    def logit_grad(
        kept: Tensor, maximum: Tensor, log_total: Tensor, rows: slice, columns: slice
    ) -> Tensor:
        return logit_grad_of(
            kept, every_row.of(rows), maximum, log_total, coefficient[rows], columns, dtype
        )

    with torch.cuda.device_of(hidden):
        return chunked.gradients_in_forward(
            hidden,
            head,
            softmax=softmax,
            logit_grad=logit_grad,
            accumulate=partial(_accumulate, sizes=sizes, inputs=hidden.dtype),
            dtype=dtype,
            wants_head=wants_head,
            row_tile=row_tile or chunked.kept_rows(head.shape[0]),
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
    sizes: Tiles | None = None,
    split_words: int = SPLIT_WORDS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each position's target scored after G thoughts and without one, in one launch.

    Arguments and result are those of `rlp_kernels.paired_logprobs`, which checks them. The policy's
    rows come first in the grid, the teacher's after them; each equals `token_logprobs` to the bit.
    """
    check_device("triton", policy_hidden)
    position = Rows(target, torch.ones(len(target), device=target.device), excluded, softcap=0.0)
    teacher = (teacher_hidden, teacher_head, teacher_bias)
    with torch.cuda.device_of(policy_hidden):
        _, _, logprob = _softmax(
            policy_hidden,
            policy_head,
            policy_bias,
            position,
            sizes,
            split_words,
            teacher=teacher,
            group_size=group_size,
        )

    num_rows = policy_hidden.shape[0]
    reasoned_logprob = logprob[:num_rows].reshape(-1, group_size)
    baseline_logprob = logprob[num_rows:]
    return reasoned_logprob, baseline_logprob, reasoned_logprob - baseline_logprob[:, None]


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each row besides its hidden state."""

    target: Tensor
    """[N] int64; [M] in `paired_logprobs`, where G rows share one entry. So with the next two."""
    inverse_temperature: Tensor
    """[N] float32."""
    excluded: Tensor
    """[N] int64, -1 for none."""
    softcap: float
    """c in c tanh(z / c); 0 for none."""

    def of(self, rows: slice) -> "Rows":
        """The same for some of the rows."""
        return Rows(
            self.target[rows], self.inverse_temperature[rows], self.excluded[rows], self.softcap
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The per-row arguments of a kernel, in their order."""
        return (
            self.target.contiguous(),
            self.inverse_temperature.contiguous(),
            self.excluded.contiguous(),
        )


def check_device(form: str, hidden: Tensor) -> None:
    """Refuse what the kernels cannot run: float64, and tensors on a CPU unless interpreted."""
    if hidden.dtype == torch.float64:
        raise ValueError(
            f"form={form!r} sums in float32, and hidden is float64: write form='chunked'."
        )
    if not hidden.is_cuda and not INTERPRETED:
        raise ValueError(
            f"form={form!r} runs on CUDA tensors, and hidden is on {hidden.device}: write"
            " form='chunked', or set TRITON_INTERPRET=1 in the environment before Python starts,"
            " to interpret the kernels on the CPU."
        )


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of the logits is multiplied in: bf16 for bf16 inputs, else float32.

    `chunked.product_dtype` says why. With fp16 inputs that product is tf32, whose ten bits hold
    fp16 exactly: only the gradient of the logits is rounded, to 2^-11, which makes the rms error
    1.3 to 1.6 times the plain form's.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def logit_grad_of(
    product: Tensor,
    rows: Rows,
    maximum: Tensor,
    log_total: Tensor,
    logprob_grad: Tensor,
    columns: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient with respect to hidden . head^T of one tile, [R, W], from its values, float32."""
    grad = product.new_empty(product.shape, dtype=dtype)
    num_rows, num_words = product.shape
    grid = (triton.cdiv(num_rows, 16), triton.cdiv(num_words, 256))
    logit_grad_kernel[grid](
        grad, product, *rows.tensors, maximum, log_total, logprob_grad.contiguous(),
        num_rows, num_words, columns.start, product.stride(0), rows.softcap,
        CAPPED=rows.softcap > 0, ROWS=16, WORDS=256, num_warps=4,
    )  # fmt: skip  # arguments by kind
    return grad


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
        sizes: Tiles | None,
        split_words: int,
        row_tile: int,
        vocabulary_tile: int,
    ) -> Tensor:
        every_row = Rows(target, inverse_temperature, excluded, softcap)
        with torch.cuda.device_of(hidden):
            maximum, log_total, logprob = _softmax(
                hidden, head, bias, every_row, sizes, split_words
            )

        ctx.save_for_backward(
            hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total
        )
        ctx.softcap, ctx.sizes, ctx.head_shape = softcap, sizes, head.shape
        ctx.row_tile, ctx.vocabulary_tile = row_tile, vocabulary_tile
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, logprob_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total = (
            ctx.saved_tensors
        )
        chunked.refuse_released(head, bias, ctx.head_shape)
        every_row = Rows(target, inverse_temperature, excluded, ctx.softcap)
        dtype = product_dtype(hidden.dtype)

        def logit_grad(rows: slice, columns: slice) -> Tensor:
            row_softmax = (maximum[rows], log_total[rows], logprob_grad[rows])
            words = (head[columns], None if bias is None else bias[columns])
            return _recomputed_logit_grad(
                hidden[rows], *words, every_row.of(rows), *row_softmax, columns, dtype, ctx.sizes
            )

        with torch.cuda.device_of(hidden):
            input_grads = chunked.gradients(
                hidden,
                head,
                logit_grad=logit_grad,
                accumulate=partial(_accumulate, sizes=ctx.sizes, inputs=hidden.dtype),
                dtype=dtype,
                wanted=ctx.needs_input_grad[:3],
                row_tile=ctx.row_tile,
                vocabulary_tile=ctx.vocabulary_tile,
            )

        return *input_grads, *[None] * 8


def _softmax(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Rows,
    sizes: Tiles | None,
    split_words: int,
    *,
    kept: Tensor | None = None,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    group_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, log of the sum of exponentials above it, and log-probability.

    Each is [N]; with a teacher [N + M], the policy's rows first. With `kept`, [N, V] float32,
    hidden . head^T + bias is stored there as well. Of policy and teacher both or neither have a
    bias.
    """
    sizes = sizes or (FLOAT_TILES if hidden.dtype == torch.float32 else HALF_TILES)
    (num_rows, width), vocabulary = hidden.shape, head.shape[0]
    teacher_hidden, teacher_head, teacher_bias = teacher or (hidden, head, bias)
    # A kernel takes a pointer in any case: where there is no bias, one that it does not read.
    biases = (hidden, teacher_hidden) if bias is None else (bias, teacher_bias)

    num_teacher_rows = teacher_hidden.shape[0] if teacher else 0
    num_results = num_rows + num_teacher_rows
    num_splits = triton.cdiv(vocabulary, split_words)

    split_maximum, split_total = torch.empty(2, num_splits, num_results, device=hidden.device)
    target_logit, maximum, log_total, logprob = (
        torch.empty(num_results, device=hidden.device) for _ in range(4)
    )
    if num_results == 0:
        return maximum, log_total, logprob

    row_tiles = triton.cdiv(num_rows, sizes.rows) + triton.cdiv(num_teacher_rows, sizes.rows)
    split_softmax_kernel[(row_tiles * num_splits,)](
        split_maximum, split_total, target_logit, split_maximum if kept is None else kept,
        hidden, head, teacher_hidden, teacher_head, *biases, *rows.tensors,
        num_rows, num_teacher_rows, vocabulary, width, num_splits, group_size,
        *hidden.stride(), *head.stride(), *teacher_hidden.stride(), *teacher_head.stride(),
        rows.softcap,
        SPLIT_WORDS=split_words, PAIRED=teacher is not None,
        KEPT=kept is not None, BIASED=bias is not None, CAPPED=rows.softcap > 0,
        **_product_settings(sizes, hidden.dtype, width, _exact_precision(hidden.dtype)),
    )  # fmt: skip  # arguments by kind
    merge_kernel[(triton.cdiv(num_results, 128),)](
        maximum, log_total, logprob, split_maximum, split_total, target_logit,
        num_results, num_splits,
        ROWS=128, num_warps=4,
    )  # fmt: skip  # arguments by kind
    return maximum, log_total, logprob


def _recomputed_logit_grad(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    rows: Rows,
    maximum: Tensor,
    log_total: Tensor,
    logprob_grad: Tensor,
    columns: slice,
    dtype: torch.dtype,
    sizes: Tiles | None,
) -> Tensor:
    """Gradient with respect to hidden . head^T + bias of one tile, [R, W].

    `hidden` and `head` are those of the tile's rows and words.
    """
    sizes = sizes or (FLOAT_TILES if hidden.dtype == torch.float32 else HALF_TILES)
    (num_rows, width), num_words = hidden.shape, head.shape[0]
    grad = hidden.new_empty(num_rows, num_words, dtype=dtype)
    grid = (triton.cdiv(num_rows, sizes.rows) * triton.cdiv(num_words, sizes.columns),)
    recomputed_logit_grad_kernel[grid](
        grad, hidden, head, head if bias is None else bias,
        *rows.tensors, maximum, log_total, logprob_grad.contiguous(),
        num_rows, num_words, width, columns.start,
        *hidden.stride(), *head.stride(), rows.softcap,
        BIASED=bias is not None, CAPPED=rows.softcap > 0,
        **_product_settings(sizes, hidden.dtype, width, _exact_precision(hidden.dtype)),
    )  # fmt: skip  # arguments by kind
    return grad


def _accumulate(
    total: Tensor, left: Tensor, right: Tensor, *, sizes: Tiles | None, inputs: torch.dtype
) -> None:
    """total += left @ right in float32, the terms of each sum in their order.

    `inputs` is the dtype of hidden.
    """
    default = {torch.bfloat16: HALF_TILES, torch.float16: TF32_TILES, torch.float32: FLOAT_TILES}
    sizes = sizes or default[inputs]
    precision = "tf32" if inputs == torch.float16 else _exact_precision(inputs)

    (num_rows, depth), num_columns = left.shape, right.shape[1]
    grid = (triton.cdiv(num_rows, sizes.rows) * triton.cdiv(num_columns, sizes.columns),)
    accumulate_kernel[grid](
        total, left, right, num_rows, num_columns, depth,
        *total.stride(), *left.stride(), *right.stride(),
        **_product_settings(sizes, left.dtype, depth, precision),
    )  # fmt: skip  # arguments by kind


def _exact_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` is to multiply inputs whose products have to be exact in float32."""
    return "ieee" if dtype == torch.float32 else "tf32"  # without meaning for 16-bit inputs


def _product_settings(
    sizes: Tiles, dtype: torch.dtype, depth: int, precision: str
) -> dict[str, object]:
    """The compile-time arguments of a kernel that multiplies."""
    return {
        "ROWS": sizes.rows,
        "COLUMNS": sizes.columns,
        "DEPTH": sizes.depth,
        "EVEN": depth % sizes.depth == 0,
        # The interpreter's product of bf16 tiles is garbage; float32 copies of them have the same
        # product.
        "WIDENED": INTERPRETED and dtype != torch.float32,
        "PRECISION": precision,
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
    }
