"""Token log-probabilities in Triton: the softmax is folded up in registers, as tiles of logits
leave the tensor cores.

Twins of `reference.py` and `chunked.py`, same signatures and meaning.

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
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rlp_kernels import chunked

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this package run in Triton's interpreter, on CPU tensors."""

# A part is 4096 words, 38 of them in a 151,936-word vocabulary: enough programs for small N, and
# partial results of 12 bytes per row and part.
SPLIT_WORDS = 4096

# The backward pass makes the gradient of 4096 x 4096 logits at a time: 34 MB in bf16, which stays
# in the 50 MB of L2 between the kernel that writes it and the two that read it.
ROW_TILE = 4096
VOCABULARY_TILE = 4096

# Row tiles that are visited before the next tile of the other axis, so that both come from L2.
GROUP_TILES = tl.constexpr(16)

# The largest logit before any was seen; -inf would make the first difference NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


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
    """Each position's target scored after G thoughts and without one, and the difference, in one
    launch.

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
    reasoned_logprob, baseline_logprob = (
        logprob[:num_rows].reshape(-1, group_size),
        logprob[num_rows:],
    )
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
    """Refuse what the kernels cannot run: float64, and tensors on a CPU unless they are
    interpreted."""
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
    """What the gradient of the logits is multiplied in: bf16 for bf16 inputs, else float32;
    `chunked.product_dtype` says why.

    With fp16 inputs that product is tf32, whose ten bits hold fp16 exactly: only the gradient of
    the logits is rounded, to 2^-11, which makes the rms error 1.3 to 1.6 times the plain form's.
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
    _logit_grad_kernel[grid](
        grad, product, *rows.tensors, maximum, log_total, logprob_grad.contiguous(),
        num_rows, num_words, columns.start, product.stride(0), rows.softcap,
        CAPPED=rows.softcap > 0, ROWS=16, WORDS=256, num_warps=4,
    )  # fmt: skip
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
    """Largest logit, log of the sum of exponentials above it, and log-probability: [N] each, [N +
    M] with a teacher.

    With `kept`, [N, V] float32, hidden . head^T + bias is stored there as well. Of policy and
    teacher both or neither have a bias.
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
    _split_softmax_kernel[(row_tiles * num_splits,)](
        split_maximum, split_total, target_logit, split_maximum if kept is None else kept,
        hidden, head, teacher_hidden, teacher_head, *biases, *rows.tensors,
        num_rows, num_teacher_rows, vocabulary, width, num_splits, group_size,
        *hidden.stride(), *head.stride(), *teacher_hidden.stride(), *teacher_head.stride(), rows.softcap,
        SPLIT_WORDS=split_words, PAIRED=teacher is not None, KEPT=kept is not None, BIASED=bias is not None,
        CAPPED=rows.softcap > 0,
        **_product_settings(sizes, hidden.dtype, width, _exact_precision(hidden.dtype)),
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_results, 128),)](
        maximum, log_total, logprob, split_maximum, split_total, target_logit, num_results, num_splits,
        ROWS=128, num_warps=4,
    )  # fmt: skip
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
    """Gradient with respect to hidden . head^T + bias of one tile, [R, W], from the tile's rows and
    words."""
    sizes = sizes or (FLOAT_TILES if hidden.dtype == torch.float32 else HALF_TILES)
    (num_rows, width), num_words = hidden.shape, head.shape[0]
    grad = hidden.new_empty(num_rows, num_words, dtype=dtype)
    grid = (triton.cdiv(num_rows, sizes.rows) * triton.cdiv(num_words, sizes.columns),)
    _recomputed_logit_grad_kernel[grid](
        grad, hidden, head, head if bias is None else bias, *rows.tensors, maximum, log_total, logprob_grad.contiguous(),
        num_rows, num_words, width, columns.start, *hidden.stride(), *head.stride(), rows.softcap,
        BIASED=bias is not None, CAPPED=rows.softcap > 0,
        **_product_settings(sizes, hidden.dtype, width, _exact_precision(hidden.dtype)),
    )  # fmt: skip
    return grad


def _accumulate(
    total: Tensor, left: Tensor, right: Tensor, *, sizes: Tiles | None, inputs: torch.dtype
) -> None:
    """total += left @ right in float32, the terms of each sum in their order; `inputs` is the dtype
    of hidden."""
    default = {torch.bfloat16: HALF_TILES, torch.float16: TF32_TILES, torch.float32: FLOAT_TILES}
    sizes = sizes or default[inputs]
    (num_rows, depth), num_columns = left.shape, right.shape[1]
    grid = (triton.cdiv(num_rows, sizes.rows) * triton.cdiv(num_columns, sizes.columns),)
    precision = "tf32" if inputs == torch.float16 else _exact_precision(inputs)
    _accumulate_kernel[grid](
        total, left, right, num_rows, num_columns, depth, *total.stride(), *left.stride(), *right.stride(),
        **_product_settings(sizes, left.dtype, depth, precision),
    )  # fmt: skip


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


@triton.jit
def _split_softmax_kernel(
    split_maximum, split_total, target_logit, kept,
    hidden, head, teacher_hidden, teacher_head, bias, teacher_bias, target, inverse_temperature, excluded,
    num_rows, num_teacher_rows, vocabulary, width, num_splits, group_size,
    hidden_row, hidden_column, head_row, head_column,
    teacher_hidden_row, teacher_hidden_column, teacher_head_row, teacher_head_column, softcap,
    SPLIT_WORDS: tl.constexpr, PAIRED: tl.constexpr, KEPT: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile of rows over one part of the vocabulary; the teacher's rows follow the
    policy's."""
    policy_tiles = tl.cdiv(num_rows, ROWS)
    row_tiles = policy_tiles
    if PAIRED:
        row_tiles += tl.cdiv(num_teacher_rows, ROWS)
    tile, split = _grouped(tl.program_id(0), row_tiles, num_splits)
    num_results = num_rows + num_teacher_rows
    if PAIRED:
        if tile < policy_tiles:
            _split_softmax(
                split_maximum + split * num_results, split_total + split * num_results, target_logit, kept,
                hidden, head, bias, target, inverse_temperature, excluded,
                tile, split, num_rows, vocabulary, width, group_size,
                hidden_row, hidden_column, head_row, head_column, softcap,
                SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
            )  # fmt: skip
        else:
            first = split * num_results + num_rows
            _split_softmax(
                split_maximum + first, split_total + first, target_logit + num_rows, kept,
                teacher_hidden, teacher_head, teacher_bias, target, inverse_temperature, excluded,
                tile - policy_tiles, split, num_teacher_rows, vocabulary, width, 1,
                teacher_hidden_row, teacher_hidden_column, teacher_head_row, teacher_head_column, softcap,
                SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
            )  # fmt: skip
    else:
        _split_softmax(
            split_maximum + split * num_results, split_total + split * num_results, target_logit, kept,
            hidden, head, bias, target, inverse_temperature, excluded,
            tile, split, num_rows, vocabulary, width, group_size,
            hidden_row, hidden_column, head_row, head_column, softcap,
            SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
        )  # fmt: skip


@triton.jit
def _split_softmax(
    split_maximum, split_total, target_logit, kept,
    hidden, head, bias, target, inverse_temperature, excluded,
    tile, split, num_rows, vocabulary, width, group_size,
    hidden_row, hidden_column, head_row, head_column, softcap,
    SPLIT_WORDS: tl.constexpr, KEPT: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of exponentials and, in the one part that holds the target, its logit."""
    row = tile * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    row_target, row_temperature, row_excluded = row_settings(
        target, inverse_temperature, excluded, row // group_size, in_rows
    )
    start = split * SPLIT_WORDS
    stop = tl.minimum(start + SPLIT_WORDS, vocabulary)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    for first in range(start, stop, COLUMNS):
        word = first + tl.arange(0, COLUMNS)
        in_words = word < stop
        product = _product(
            tl.zeros((ROWS, COLUMNS), tl.float32), hidden, head, row, word, in_rows, in_words, width,
            hidden_row, hidden_column, head_column, head_row, DEPTH, EVEN, WIDENED, PRECISION,
        )  # fmt: skip
        if BIASED:
            product += tl.load(bias + word, mask=in_words, other=0.0).to(tl.float32)[None, :]
        if KEPT:
            offset = row.to(tl.int64)[:, None] * vocabulary + word[None, :]
            tl.store(kept + offset, product, mask=in_rows[:, None] & in_words[None, :])
        logits = capped_logits(product, softcap, CAPPED) * row_temperature[:, None]
        is_left_out = (word[None, :] == row_excluded[:, None]) | ~in_words[None, :]
        logits = tl.where(is_left_out, float("-inf"), logits)
        is_target = in_words[None, :] & (word[None, :] == row_target[:, None])
        picked += tl.sum(tl.where(is_target, logits, 0.0), 1)
        raised = tl.maximum(maximum, tl.max(logits, 1))
        total = total * tl.exp(maximum - raised) + tl.sum(tl.exp(logits - raised[:, None]), 1)
        maximum = raised
    tl.store(split_maximum + row, maximum, mask=in_rows)
    tl.store(split_total + row, total, mask=in_rows)
    tl.store(target_logit + row, picked, mask=in_rows & (row_target >= start) & (row_target < stop))


@triton.jit
def _merge_kernel(
    maximum, log_total, logprob, split_maximum, split_total, target_logit, num_results, num_splits,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of the vocabulary, first to last, into one softmax per row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_results
    merged_maximum = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(num_splits):
        part_maximum = tl.load(split_maximum + split * num_results + row, mask=in_rows, other=0.0)
        part_total = tl.load(split_total + split * num_results + row, mask=in_rows, other=1.0)
        raised = tl.maximum(merged_maximum, part_maximum)
        total = total * tl.exp(merged_maximum - raised) + part_total * tl.exp(part_maximum - raised)
        merged_maximum = raised
    log_sum = tl.log(total)
    picked = tl.load(target_logit + row, mask=in_rows, other=0.0)
    tl.store(maximum + row, merged_maximum, mask=in_rows)
    tl.store(log_total + row, log_sum, mask=in_rows)
    # In this order, so that a log-probability near 0 keeps its digits.
    tl.store(logprob + row, (picked - merged_maximum) - log_sum, mask=in_rows)


@triton.jit
def _recomputed_logit_grad_kernel(
    grad, hidden, head, bias, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
    num_rows, num_words, width, first_word, hidden_row, hidden_column, head_row, head_column, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """hidden . head^T + bias of a tile once more, and from it the gradient."""
    row_tiles, word_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_words, COLUMNS)
    row_tile, word_tile = _grouped(tl.program_id(0), row_tiles, word_tiles)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    word = word_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_words = row < num_rows, word < num_words
    product = _product(
        tl.zeros((ROWS, COLUMNS), tl.float32), hidden, head, row, word, in_rows, in_words, width,
        hidden_row, hidden_column, head_column, head_row, DEPTH, EVEN, WIDENED, PRECISION,
    )  # fmt: skip
    if BIASED:
        product += tl.load(bias + word, mask=in_words, other=0.0).to(tl.float32)[None, :]
    tile_grad = _logit_grad(
        product, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
        row, in_rows, first_word + word, softcap, CAPPED,
    )  # fmt: skip
    offset = row.to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(
        grad + offset,
        tile_grad.to(grad.dtype.element_ty),
        mask=in_rows[:, None] & in_words[None, :],
    )


@triton.jit
def _logit_grad_kernel(
    grad, product, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
    num_rows, num_words, first_word, product_row, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The gradient from hidden . head^T."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    in_rows, in_words = row < num_rows, word < num_words
    in_tile = in_rows[:, None] & in_words[None, :]
    tile = tl.load(
        product + row.to(tl.int64)[:, None] * product_row + word[None, :], mask=in_tile, other=0.0
    )
    tile_grad = _logit_grad(
        tile, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
        row, in_rows, first_word + word, softcap, CAPPED,
    )  # fmt: skip
    offset = row.to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(grad + offset, tile_grad.to(grad.dtype.element_ty), mask=in_tile)


@triton.jit
def _accumulate_kernel(
    total, left, right, num_rows, num_columns, depth,
    total_row, total_column, left_row, left_depth, right_depth, right_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += left @ right for one tile of total."""
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    row_tile, column_tile = _grouped(tl.program_id(0), row_tiles, column_tiles)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    in_tile = in_rows[:, None] & in_columns[None, :]
    place = total + row.to(tl.int64)[:, None] * total_row + column[None, :] * total_column
    tile = _product(
        tl.load(place, mask=in_tile, other=0.0), left, right, row, column, in_rows, in_columns, depth,
        left_row, left_depth, right_depth, right_column, DEPTH, EVEN, WIDENED, PRECISION,
    )  # fmt: skip
    tl.store(place, tile, mask=in_tile)


@triton.jit
def _product(
    total, left, right, row, column, in_rows, in_columns, depth,
    left_row, left_depth, right_depth, right_column,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + left @ right, float32, in the order of the terms."""
    term = tl.arange(0, DEPTH)
    left_place = left + row.to(tl.int64)[:, None] * left_row + term[None, :] * left_depth
    right_place = right + term[:, None] * right_depth + column.to(tl.int64)[None, :] * right_column
    for first in range(0, depth, DEPTH):
        if EVEN:
            left_tile = tl.load(left_place, mask=in_rows[:, None], other=0.0)
            right_tile = tl.load(right_place, mask=in_columns[None, :], other=0.0)
        else:
            in_depth = first + term < depth
            left_tile = tl.load(left_place, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            right_tile = tl.load(
                right_place, mask=in_depth[:, None] & in_columns[None, :], other=0.0
            )
        if WIDENED:
            left_tile, right_tile = left_tile.to(tl.float32), right_tile.to(tl.float32)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        left_place += DEPTH * left_depth
        right_place += DEPTH * right_depth
    return total


@triton.jit
def _logit_grad(
    product, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
    row, in_rows, word, softcap, CAPPED: tl.constexpr,
):  # fmt: skip
    """([v = target] - p_v) * inverse_temperature * (1 - (softcap(z_v) / c)^2) * logprob_grad."""
    row_target, row_temperature, row_excluded = row_settings(
        target, inverse_temperature, excluded, row, in_rows
    )
    row_maximum = tl.load(maximum + row, mask=in_rows, other=0.0)
    row_log_total = tl.load(log_total + row, mask=in_rows, other=0.0)
    row_grad = tl.load(logprob_grad + row, mask=in_rows, other=0.0)
    capped = capped_logits(product, softcap, CAPPED)
    logits = tl.where(
        word[None, :] == row_excluded[:, None], float("-inf"), capped * row_temperature[:, None]
    )
    probability = tl.exp((logits - row_maximum[:, None]) - row_log_total[:, None])
    is_target = word[None, :] == row_target[:, None]
    grad = (
        tl.where(is_target, 1.0 - probability, -probability) * (row_grad * row_temperature)[:, None]
    )
    if CAPPED:
        bend = capped / softcap
        grad = grad * (1.0 - bend * bend)
    return grad


@triton.jit
def row_settings(target, inverse_temperature, excluded, setting, in_rows):
    """Each row's target, inverse temperature and excluded token; words are counted in int32
    here."""
    row_target = tl.load(target + setting, mask=in_rows, other=-1).to(tl.int32)
    row_temperature = tl.load(inverse_temperature + setting, mask=in_rows, other=1.0)
    row_excluded = tl.load(excluded + setting, mask=in_rows, other=-1).to(tl.int32)
    return row_target, row_temperature, row_excluded


@triton.jit
def capped_logits(logits, softcap, CAPPED: tl.constexpr):
    """c tanh(z / c): the polynomial and the exponential of Cephes' tanhf, 1.3e-7 of relative error
    at most."""
    if CAPPED:
        x = logits / softcap
        size = tl.abs(x)
        u = x * x
        series = -5.70498872745e-3
        series = series * u + 2.06390887954e-2
        series = series * u - 5.37397155531e-2
        series = series * u + 1.33314422036e-1
        series = series * u - 3.33332819422e-1
        near = series * u * x + x
        far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
        logits = softcap * tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
    return logits


@triton.jit
def _grouped(program, row_tiles, column_tiles):
    """The program's row tile and column tile: GROUP_TILES rows of tiles before the next column of
    them."""
    group = program // (GROUP_TILES * column_tiles)
    within = program % (GROUP_TILES * column_tiles)
    first = group * GROUP_TILES
    size = tl.minimum(row_tiles - first, GROUP_TILES)
    return first + within % size, within // size
