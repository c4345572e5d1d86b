"""What `triton_form` launches on the device.

A tile of hidden . head^T is summed in float32 in registers, bent by the soft cap, multiplied by
each row's inverse temperature, and leaves as a few numbers per row or as the gradient of the
logits. Offsets into [N, V] and [V, D] are int64, as they pass 2^31.

The arguments of a kernel come by kind: what it writes, what it reads, sizes, strides and settings,
compile-time constants (upper case). They are set by hand, a kind to a line where it fits.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary
"""

import torch
import triton
import triton.language as tl

# Row tiles that are visited before the next tile of the other axis, so that both come from L2.
GROUP_TILES = tl.constexpr(16)

# The largest logit before any was seen; -inf would make the first difference NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def split_softmax_kernel(
    split_maximum, split_total, target_logit, kept,
    hidden, head, teacher_hidden, teacher_head, bias, teacher_bias,
    target, inverse_temperature, excluded,
    num_rows, num_teacher_rows, vocabulary, width, num_splits, group_size,
    hidden_row, hidden_column, head_row, head_column,
    teacher_hidden_row, teacher_hidden_column, teacher_head_row, teacher_head_column, softcap,
    SPLIT_WORDS: tl.constexpr, PAIRED: tl.constexpr,
    KEPT: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """The softmax of a tile of rows over one part of the vocabulary.

    The teacher's rows follow the policy's.
    """
    policy_tiles = tl.cdiv(num_rows, ROWS)
    row_tiles = policy_tiles
    if PAIRED:
        row_tiles += tl.cdiv(num_teacher_rows, ROWS)
    tile, split = _grouped(tl.program_id(0), row_tiles, num_splits)
    num_results = num_rows + num_teacher_rows

    if PAIRED:
        if tile < policy_tiles:
            _split_softmax(
                split_maximum + split * num_results, split_total + split * num_results,
                target_logit, kept,
                hidden, head, bias, target, inverse_temperature, excluded,
                tile, split, num_rows, vocabulary, width, group_size,
                hidden_row, hidden_column, head_row, head_column, softcap,
                SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
            )  # fmt: skip  # arguments by kind
        else:
            first = split * num_results + num_rows
            _split_softmax(
                split_maximum + first, split_total + first, target_logit + num_rows, kept,
                teacher_hidden, teacher_head, teacher_bias, target, inverse_temperature, excluded,
                tile - policy_tiles, split, num_teacher_rows, vocabulary, width, 1,
                teacher_hidden_row, teacher_hidden_column, teacher_head_row, teacher_head_column,
                softcap,
                SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
            )  # fmt: skip  # arguments by kind
    else:
        _split_softmax(
            split_maximum + split * num_results, split_total + split * num_results,
            target_logit, kept,
            hidden, head, bias, target, inverse_temperature, excluded,
            tile, split, num_rows, vocabulary, width, group_size,
            hidden_row, hidden_column, head_row, head_column, softcap,
            SPLIT_WORDS, KEPT, BIASED, CAPPED, ROWS, COLUMNS, DEPTH, EVEN, WIDENED, PRECISION,
        )  # fmt: skip  # arguments by kind


@triton.jit
def _split_softmax(
    split_maximum, split_total, target_logit, kept,
    hidden, head, bias, target, inverse_temperature, excluded,
    tile, split, num_rows, vocabulary, width, group_size,
    hidden_row, hidden_column, head_row, head_column, softcap,
    SPLIT_WORDS: tl.constexpr, KEPT: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # arguments by kind
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
            tl.zeros((ROWS, COLUMNS), tl.float32), hidden, head,
            row, word, in_rows, in_words, width,
            hidden_row, hidden_column, head_column, head_row, DEPTH, EVEN, WIDENED, PRECISION,
        )  # fmt: skip  # arguments by kind
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
def merge_kernel(
    maximum, log_total, logprob, split_maximum, split_total, target_logit, num_results, num_splits,
    ROWS: tl.constexpr,
):  # fmt: skip  # arguments by kind
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
def recomputed_logit_grad_kernel(
    grad, hidden, head, bias,
    target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
    num_rows, num_words, width, first_word,
    hidden_row, hidden_column, head_row, head_column, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """hidden . head^T + bias of a tile once more, and from it the gradient."""
    row_tiles, word_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_words, COLUMNS)
    row_tile, word_tile = _grouped(tl.program_id(0), row_tiles, word_tiles)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    word = word_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_words = row < num_rows, word < num_words

    product = _product(
        tl.zeros((ROWS, COLUMNS), tl.float32), hidden, head, row, word, in_rows, in_words, width,
        hidden_row, hidden_column, head_column, head_row, DEPTH, EVEN, WIDENED, PRECISION,
    )  # fmt: skip  # arguments by kind
    if BIASED:
        product += tl.load(bias + word, mask=in_words, other=0.0).to(tl.float32)[None, :]

    tile_grad = _logit_grad(
        product, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
        row, in_rows, first_word + word, softcap, CAPPED,
    )  # fmt: skip  # arguments by kind
    offset = row.to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(
        grad + offset,
        tile_grad.to(grad.dtype.element_ty),
        mask=in_rows[:, None] & in_words[None, :],
    )


@triton.jit
def logit_grad_kernel(
    grad, product, target, inverse_temperature, excluded, maximum, log_total, logprob_grad,
    num_rows, num_words, first_word, product_row, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip  # arguments by kind
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
    )  # fmt: skip  # arguments by kind
    offset = row.to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(grad + offset, tile_grad.to(grad.dtype.element_ty), mask=in_tile)


@triton.jit
def accumulate_kernel(
    total, left, right, num_rows, num_columns, depth,
    total_row, total_column, left_row, left_depth, right_depth, right_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # arguments by kind
    """total += left @ right for one tile of total."""
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    row_tile, column_tile = _grouped(tl.program_id(0), row_tiles, column_tiles)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < num_rows, column < num_columns
    in_tile = in_rows[:, None] & in_columns[None, :]

    place = total + row.to(tl.int64)[:, None] * total_row + column[None, :] * total_column
    tile = _product(
        tl.load(place, mask=in_tile, other=0.0), left, right,
        row, column, in_rows, in_columns, depth,
        left_row, left_depth, right_depth, right_column, DEPTH, EVEN, WIDENED, PRECISION,
    )  # fmt: skip  # arguments by kind
    tl.store(place, tile, mask=in_tile)


@triton.jit
def _product(
    total, left, right, row, column, in_rows, in_columns, depth,
    left_row, left_depth, right_depth, right_column,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, WIDENED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # arguments by kind
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
):  # fmt: skip  # arguments by kind
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
    """Each row's target, inverse temperature and excluded token, words as int32."""
    row_target = tl.load(target + setting, mask=in_rows, other=-1).to(tl.int32)
    row_temperature = tl.load(inverse_temperature + setting, mask=in_rows, other=1.0)
    row_excluded = tl.load(excluded + setting, mask=in_rows, other=-1).to(tl.int32)
    return row_target, row_temperature, row_excluded


@triton.jit
def capped_logits(logits, softcap, CAPPED: tl.constexpr):
    """c tanh(z / c), by the polynomial and the exponential of Cephes' tanhf.

    Its relative error is 1.3e-7 at most.
    """
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
    """The program's row tile and column tile.

    GROUP_TILES rows of tiles come before the next column of them.
    """
    group = program // (GROUP_TILES * column_tiles)
    within = program % (GROUP_TILES * column_tiles)
    first = group * GROUP_TILES
    size = tl.minimum(row_tiles - first, GROUP_TILES)
    return first + within % size, within // size
