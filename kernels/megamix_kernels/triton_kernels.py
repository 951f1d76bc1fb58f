"""Kernels of the Triton path: one program a row of logits, in fp32, statistics included.

`loss_rows` reads every row once (mode B) or, with gradients, a second time to write them, preferably over the logits
(mode A). `gradient_rows` is mode B's backward pass. With a vocabulary split over ranks, `partial_rows` reads this
rank's columns, the ranks exchange four numbers a row, and `finish_rows` merges them as `loss_rows` does.

Pointers of what is not given and settings that are off are None. ``scale`` and ``divisor`` are numbers that the host
knows, or pointers to one that only the device knows. ``state`` [N, 2] is each row's maximum and norm. Row offsets are
int64: 16384 rows of 131072 are 2**31 elements.

Shapes: N tokens, V logits a token (of this rank), K domains, T ranks.
"""

# tl.static_range has no type that a checker can iterate over:
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from megamix_kernels.triton_rows import LOG2_E, read_row, write_gradient, write_zeros
from megamix_kernels.triton_tokens import conclude, describe


@triton.jit
def _value(number):
    """Returns a number, or the one at a pointer."""
    number = tl.core.to_tensor(number)  # the interpreter hands over a float
    if number.dtype.is_ptr():
        number = tl.load(number).to(tl.float32)
    return number


@triton.jit
def loss_rows(
    logits,
    gradients,
    row_stride,
    gradient_stride,
    num_columns,
    labels,
    domains,
    mask,
    weights,
    ignore_index,
    vocab_size,
    num_domains,
    references,
    sums,
    row_losses,
    token_losses,
    state,
    scale,
    divisor,
    z_loss,
    softcap,
    smoothing,
    EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Loss and statistics of one row; with gradients also its gradient, else its state."""
    row = tl.program_id(0).to(tl.int64)
    counted, label, domain, weight, valid = describe(
        row, True, labels, domains, mask, weights, ignore_index, vocab_size, num_domains
    )
    if counted == 0:
        tl.store(row_losses + row, 0.0)
        if token_losses is not None:
            tl.store(token_losses + row, 0.0)
        if gradients is not None:
            write_zeros(gradients + row * gradient_stride, num_columns, EDGES, CHUNKS)
        return
    logits_row = logits + row * row_stride
    # Fewer and narrower live values in the loops keep 32 warps within their 64 registers.
    column = tl.where(valid, label, -1).to(tl.int32)
    row_max, norm, target, deviation, ahead_EG = read_row(
        logits_row, column, num_columns, vocab_size, softcap, smoothing, EDGES, CHUNKS, REST, AHEAD
    )
    conclude(
        row,
        True,
        True,
        column >= 0,
        domain,
        weight,
        row_max,
        norm,
        target,
        deviation,
        references,
        sums,
        row_losses,
        token_losses,
        _value(divisor),
        vocab_size,
        z_loss,
        smoothing,
        False,
    )
    if gradients is not None:
        if weight == 0:
            write_zeros(gradients + row * gradient_stride, num_columns, EDGES, CHUNKS)
            return
        write_gradient(
            gradients + row * gradient_stride,
            logits_row,
            column,
            num_columns,
            vocab_size,
            vocab_size,
            ahead_EG,
            row_max,
            norm,
            weight * (_value(scale) / _value(divisor)),
            z_loss,
            softcap,
            smoothing,
            EDGES,
            CHUNKS,
            REST,
            AHEAD,
        )
    else:
        tl.store(state + 2 * row, row_max)
        tl.store(state + 2 * row + 1, norm)


@triton.jit
def gradient_rows(
    logits,
    gradients,
    row_stride,
    gradient_stride,
    num_columns,
    valid_columns,
    first_column,
    labels,
    domains,
    mask,
    weights,
    ignore_index,
    vocab_size,
    num_domains,
    state,
    scale,
    divisor,
    z_loss,
    softcap,
    smoothing,
    EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
):
    """Gradient of one row of this rank's columns, from its maximum and norm over all columns."""
    row = tl.program_id(0).to(tl.int64)
    counted, label, _, weight, valid = describe(
        row, True, labels, domains, mask, weights, ignore_index, vocab_size, num_domains
    )
    gradient_row = gradients + row * gradient_stride
    if (counted == 0) | (weight == 0):
        write_zeros(gradient_row, num_columns, EDGES, CHUNKS)
        return
    write_gradient(
        gradient_row,
        logits + row * row_stride,
        tl.where(valid, label - first_column, -1).to(tl.int32),
        num_columns,
        valid_columns,
        vocab_size,
        None,
        tl.load(state + 2 * row),
        tl.load(state + 2 * row + 1),
        weight * (_value(scale) / _value(divisor)),
        z_loss,
        softcap,
        smoothing,
        EDGES,
        CHUNKS,
        REST,
        False,
    )


@triton.jit
def partial_rows(
    logits,
    row_stride,
    num_columns,
    valid_columns,
    first_column,
    labels,
    domains,
    mask,
    ignore_index,
    vocab_size,
    num_domains,
    partials,
    num_rows,
    softcap,
    smoothing,
    EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Writes maximum, norm, label's score and deviation of one row of this rank's columns into [4, N]."""
    row = tl.program_id(0).to(tl.int64)
    counted, label, _, _, valid = describe(
        row, True, labels, domains, mask, None, ignore_index, vocab_size, num_domains
    )
    if counted == 0:
        return
    column = tl.where(valid, label - first_column, -1).to(tl.int32)
    row_max, norm, target, deviation, _ = read_row(
        logits + row * row_stride,
        column,
        num_columns,
        valid_columns,
        softcap,
        smoothing,
        EDGES,
        CHUNKS,
        REST,
        AHEAD,
    )
    tl.store(partials + row, row_max)
    tl.store(partials + num_rows + row, norm)
    tl.store(partials + 2 * num_rows + row, target)
    tl.store(partials + 3 * num_rows + row, deviation)


@triton.jit
def finish_rows(
    partials,
    num_rows,
    num_columns,
    labels,
    domains,
    mask,
    weights,
    ignore_index,
    vocab_size,
    num_domains,
    references,
    sums,
    row_losses,
    token_losses,
    state,
    divisor,
    z_loss,
    smoothing,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Losses and statistics of a block of rows from all ranks' numbers [T, 4, N], merged in rank order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < num_rows
    counted, _, domain, weight, valid = describe(
        row, here, labels, domains, mask, weights, ignore_index, vocab_size, num_domains
    )
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    target = tl.full([ROWS], float("-inf"), tl.float32)
    for rank in tl.static_range(RANKS):
        part = partials + rank * 4 * num_rows + row
        row_max = tl.maximum(row_max, tl.load(part, mask=counted, other=0.0))
        target = tl.maximum(target, tl.load(part + 2 * num_rows, mask=counted, other=0.0))
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    norm = tl.zeros([ROWS], tl.float32)
    deviation = tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(RANKS):
        part = partials + rank * 4 * num_rows + row
        part_max = tl.load(part, mask=counted, other=0.0)
        norm += tl.load(part + num_rows, mask=counted, other=1.0) * tl.exp2((part_max - safe) * LOG2_E)
        if smoothing is not None:
            columns = tl.minimum(tl.maximum(vocab_size - rank * num_columns, 0), num_columns)
            part_safe = tl.where(part_max == float("-inf"), 0.0, part_max)
            deviation += tl.load(part + 3 * num_rows, mask=counted, other=0.0) + columns * (part_safe - safe)

    tl.store(state + 2 * row, row_max, mask=counted)
    tl.store(state + 2 * row + 1, norm, mask=counted)
    conclude(
        row,
        here,
        counted,
        valid,
        domain,
        weight,
        row_max,
        norm,
        target,
        deviation,
        references,
        sums,
        row_losses,
        token_losses,
        _value(divisor),
        vocab_size,
        z_loss,
        smoothing,
        True,
    )
