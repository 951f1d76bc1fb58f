"""Device code of the Triton path: parts of the kernels in `megamix_kernels.triton_kernels`.

A row is read in tiles of E chunks of G neighbouring columns. Every chunk keeps a running maximum and a running sum of
exponentials relative to it (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), so the loop has no barrier
and takes 1 + 1/G exponentials a logit; the chunks are merged once at the end. The second reading of a row, for the
gradient, goes from its end to its start: the columns that were read last are likeliest still in the cache.

Shapes: N tokens, V logits a token, K domains, E chunks of a tile, G columns of a chunk.
"""

# Arguments of jitted functions are pointers, numbers and tl.constexpr, which annotations cannot say:
# pyright: reportArgumentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# A unit of the sums is 2**-24 nats, and a token of more than 2**20 nats is excluded: see sums.py.
UNITS_PER_NAT = tl.constexpr(16777216.0)
MAX_TOKEN_NATS = tl.constexpr(1048576.0)
# Adding and taking away 1.5 * 2**52 rounds a float64 below 2**51 to a whole number, half to even.
ROUND_FLOAT64 = tl.constexpr(6755399441055744.0)


@triton.jit
def _capped(logit, softcap):
    """Returns softcap * tanh(logit / softcap), accurate near zero too.

    tanh uses exp2 because the interpreter has no tanh; near zero, where 1 - 2 / (1 + exp(2 x)) loses digits, it is a
    Taylor polynomial, with a relative error of 3e-7 at 0.25.
    """
    ratio = logit / softcap
    square = ratio * ratio
    near_zero = ratio * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    elsewhere = 1.0 - 2.0 / (1.0 + tl.exp2(ratio * (2.0 * LOG2_E)))
    return softcap * tl.where(tl.abs(ratio) < 0.25, near_zero, elsewhere)


@triton.jit
def _tile(logits_tile, offsets_EG, num_left, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Loads the scores of one tile in fp32; with MASKED, only the remaining ``num_left`` columns of the row."""
    if MASKED:
        score_EG = tl.load(logits_tile + offsets_EG, mask=offsets_EG < num_left, other=0.0).to(tl.float32)
    else:
        score_EG = tl.load(logits_tile + offsets_EG).to(tl.float32)
    if SOFTCAP:
        score_EG = _capped(score_EG, softcap)
    return score_EG


@triton.jit
def _absorb(max_E, norm_E, shifted_E, score_EG, valid_EG, shift, SMOOTHING: tl.constexpr, MASKED: tl.constexpr):
    """Adds a tile to the running maxima, sums of exponentials and sums of score - shift."""
    max_new_E = tl.maximum(max_E, tl.max(score_EG, axis=1))
    # -inf - -inf would be NaN: a chunk of -inf adds nothing to a row that holds something else.
    safe_E = tl.where(max_new_E == float("-inf"), 0.0, max_new_E)
    added_E = tl.sum(tl.exp2((score_EG - safe_E[:, None]) * LOG2_E), axis=1)
    norm_E = norm_E * tl.exp2((max_E - safe_E) * LOG2_E) + added_E
    if SMOOTHING:
        shifted_EG = score_EG - shift
        if MASKED:
            shifted_EG = tl.where(valid_EG, shifted_EG, 0.0)
        shifted_E += tl.sum(shifted_EG, axis=1)
    return max_new_E, norm_E, shifted_E


@triton.jit
def read_row(
    logits_row,
    label_column,
    num_columns,
    valid_columns,
    softcap,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Returns maximum, sum of exp(score - maximum), score at the label (-inf if elsewhere) and sum of score - maximum.

    The last is relative to 0 where the maximum is -inf, since the row may be one rank's part of a finite row.
    """
    BLOCK: tl.constexpr = CHUNKS * CHUNK
    offsets_EG = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    label_here = (label_column >= 0) & (label_column < valid_columns)
    target = tl.load(logits_row + label_column, mask=label_here, other=float("-inf")).to(tl.float32)
    if SOFTCAP:
        target = _capped(target, softcap)
        target = tl.where(label_here, target, float("-inf"))
    shift = 0.0
    if SMOOTHING:
        # Any score of the row keeps a large common offset out of the sum.
        shift = tl.load(logits_row + tl.where(label_here, label_column, 0)).to(tl.float32)
        if SOFTCAP:
            shift = _capped(shift, softcap)
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    max_E = tl.full([CHUNKS], float("-inf"), tl.float32)
    norm_E = tl.zeros([CHUNKS], tl.float32)
    shifted_E = tl.zeros([CHUNKS], tl.float32)
    whole = valid_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        score_EG = _tile(logits_row + start, offsets_EG, BLOCK, softcap, SOFTCAP, False)
        max_E, norm_E, shifted_E = _absorb(max_E, norm_E, shifted_E, score_EG, True, shift, SMOOTHING, False)
    if whole < valid_columns:
        # Loads reach the allocated width, which keeps them wide whatever is valid; the mask comes after the cap, which
        # would make -inf finite.
        score_EG = _tile(logits_row + whole, offsets_EG, num_columns - whole, softcap, SOFTCAP, True)
        valid_EG = offsets_EG < valid_columns - whole
        score_EG = tl.where(valid_EG, score_EG, float("-inf"))
        max_E, norm_E, shifted_E = _absorb(max_E, norm_E, shifted_E, score_EG, valid_EG, shift, SMOOTHING, True)

    row_max = tl.max(max_E, axis=0)
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    norm = tl.sum(norm_E * tl.exp2((max_E - safe) * LOG2_E), axis=0)
    deviation = tl.sum(shifted_E, axis=0) + valid_columns * (shift - safe)
    return row_max, norm, target, deviation


@triton.jit
def _gradient_of(score, is_label, row_max, peak, spread, at_label, softcap, SOFTCAP: tl.constexpr):
    """Returns a tile's gradient in fp32: (exp(s - max) * peak - scaled target distribution) * ds/dlogit."""
    gradient = tl.exp2((score - row_max) * LOG2_E) * peak - tl.where(is_label, at_label, spread)
    if SOFTCAP:
        gradient = gradient * (1.0 - (score / softcap) * (score / softcap))
    return gradient


@triton.jit
def write_gradient(
    gradient_row,
    logits_row,
    label_column,
    num_columns,
    valid_columns,
    vocab_size,
    row_max,
    norm,
    scale,
    z_loss,
    softcap,
    smoothing,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes scale times a row's gradient, rounded once; zero in invalid columns. May overwrite the row."""
    BLOCK: tl.constexpr = CHUNKS * CHUNK
    offsets_EG = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    peak = scale / norm
    if Z_LOSS:
        peak = peak * (1.0 + 2.0 * z_loss * (row_max + tl.log(norm)))
    spread = scale * smoothing / vocab_size
    at_label = scale * (1.0 - smoothing) + spread
    whole = valid_columns // BLOCK * BLOCK
    dtype: tl.constexpr = gradient_row.dtype.element_ty
    for start in range(whole, num_columns, BLOCK):
        score = _tile(logits_row + start, offsets_EG, num_columns - start, softcap, SOFTCAP, True)
        is_label = offsets_EG == label_column - start
        gradient = _gradient_of(score, is_label, row_max, peak, spread, at_label, softcap, SOFTCAP)
        gradient = tl.where(offsets_EG < valid_columns - start, gradient, 0.0)
        tl.store(gradient_row + start + offsets_EG, gradient.to(dtype), mask=offsets_EG < num_columns - start)
    for step in range(whole // BLOCK):
        start = whole - (step + 1) * BLOCK
        score = _tile(logits_row + start, offsets_EG, BLOCK, softcap, SOFTCAP, False)
        is_label = offsets_EG == label_column - start
        gradient = _gradient_of(score, is_label, row_max, peak, spread, at_label, softcap, SOFTCAP)
        tl.store(gradient_row + start + offsets_EG, gradient.to(dtype))


@triton.jit
def write_zeros(gradient_row, num_columns, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    offsets_EG = tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    zero_EG = tl.zeros([CHUNKS, CHUNK], gradient_row.dtype.element_ty)
    for start in range(0, num_columns, CHUNKS * CHUNK):
        columns = start + offsets_EG
        tl.store(gradient_row + columns, zero_EG, mask=columns < num_columns)


@triton.jit
def describe(row, here, labels, domains, mask, weights, ignore_index, vocab_size, num_domains):
    """Returns whether a row is counted, its label, nearest domain and weight (NaN if invalid), and whether label and
    domain are valid.

    ``row`` is a number or a block of numbers; ``here`` is true for rows that exist.
    """
    label = tl.load(labels + row, mask=here, other=0).to(tl.int64)
    counted = here & (label != ignore_index)
    if mask is not None:
        counted = counted & (tl.load(mask + row, mask=here, other=0) != 0)
    domain = tl.load(domains + row, mask=here, other=0).to(tl.int64)
    nearest = tl.minimum(tl.maximum(domain, 0), num_domains - 1)
    valid = (label >= 0) & (label < vocab_size) & (domain == nearest)
    weight = tl.where(valid, 1.0, float("nan"))
    if weights is not None:
        weight = weight * tl.load(weights + nearest, mask=here, other=0.0).to(tl.float32)
    return counted, label, nearest.to(tl.int32), weight, valid


@triton.jit
def _units(nats):
    """Returns nats as int64 multiples of 2**-24, rounded half to even."""
    return (nats.to(tl.float64) * UNITS_PER_NAT + ROUND_FLOAT64 - ROUND_FLOAT64).to(tl.int64)


@triton.jit
def conclude(
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
    divisor,
    vocab_size,
    z_loss,
    smoothing,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
):
    """Writes the losses, zero where a row is not counted, and adds them to the domain sums if ``sums`` is given.

    Integer atomics commute, so the sums do not depend on the order of programs.
    """
    log_norm = tl.log(norm)
    nll = tl.where(valid, log_norm - (target - row_max), float("nan"))
    objective = nll
    if SMOOTHING:
        objective = (1.0 - smoothing) * nll + smoothing * (log_norm - deviation / vocab_size)
    if Z_LOSS:
        objective = objective + z_loss * (row_max + log_norm) * (row_max + log_norm)
    # A product with a weight of 0 would not make an infinite or NaN loss 0.
    tl.store(row_losses + row, tl.where(counted & (weight != 0), objective * weight / divisor, 0.0), mask=here)
    if token_losses is not None:
        tl.store(token_losses + row, tl.where(counted, nll, 0.0), mask=here)
    if sums is not None:
        # Comparisons with NaN are false, so both tests catch NaN too.
        good = counted & (tl.abs(nll) <= MAX_TOKEN_NATS)
        cell = sums + domain * 4
        if references is not None:
            reference = tl.load(references + row, mask=counted, other=0.0).to(tl.float32)
            good = good & (tl.abs(reference) <= MAX_TOKEN_NATS)
            excess = tl.where(good, tl.maximum(nll - reference, 0.0), 0.0)
            tl.atomic_add(cell + 2, _units(excess), mask=good, sem="relaxed")
        tl.atomic_add(cell, _units(tl.where(good, nll, 0.0)), mask=good, sem="relaxed")
        bad = counted & (good == 0)
        tl.atomic_add(cell + 1, good.to(tl.int64), mask=good, sem="relaxed")
        tl.atomic_add(cell + 3, bad.to(tl.int64), mask=bad, sem="relaxed")
