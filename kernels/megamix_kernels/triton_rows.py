"""Device code of the Triton path: readings of a row of logits.

A row is read in tiles of E chunks of G neighbouring columns, 16 bytes each. Every chunk keeps a running maximum and a
running sum of exponentials relative to it (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), so the loop
has no barrier and takes 1 + 1/G exponentials a logit; the chunks are merged once at the end. The second reading of a
row, for the gradient, goes through the tiles from the end to the start: the columns that were read last are likeliest
still in the cache. With AHEAD, each tile is loaded before the one before it is worked on.

A row is

    edge | whole tiles | rest | edge

Tiles begin at the row's first multiple of 16 bytes, so that all their accesses are 16 bytes wide. The last tile, the
rest, has only REST columns a chunk. With EDGES, fewer than G columns lie before the tiles and fewer than G behind them.

EDGES says where rows lie: 0, at multiples of 16 bytes and of whole chunks; 1, anywhere, the row of gradients in the
same place of 16 bytes as the row of logits (or the same row); 2, the two in different places, so that accesses of
gradients are narrow.

Shapes: N tokens, V logits a token, E chunks of a tile, G columns of a chunk, S columns of a chunk of the rest.
"""

# Jitted functions take pointers, numbers and tl.constexpr and return tuples, which annotations cannot say:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# tanh is 1 in fp32 from 9 on; the square of the sine is finite.
TANH_END = tl.constexpr(16.0)


@triton.jit
def _tanh(x):
    """Returns tanh(x), with a relative error of at most 5e-7 near zero too, and its derivative.

    With v = sinh(x), tanh is v / sqrt(1 + v^2) and its derivative 1 / (1 + v^2). An error of v counts less the larger v
    is, so that a polynomial of few terms will do: 5.6e-8 of tanh everywhere, by iteratively reweighted least squares
    (Lawson 1961). It takes one special function, where 1 - 2 / (1 + exp(2 x)) takes two and loses digits near zero.
    """
    x = tl.clamp(x, -TANH_END, TANH_END, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    series = 1.991748542e-04 + square * (2.618377116e-06 + square * 3.402826302e-08)
    series = 9.999999443e-01 + square * (1.666674953e-01 + square * (8.331835073e-03 + square * series))
    sine = x * series
    root = tl.rsqrt(1.0 + sine * sine)
    return sine * root, root * root


@triton.jit
def _score(logit, softcap):
    """Returns softcap * tanh(logit / softcap), or the logit, in fp32."""
    score = logit.to(tl.float32)
    if softcap is not None:
        score = softcap * _tanh(score * (1.0 / softcap))[0]
    return score


@triton.jit
def _body(row_pointer, num_columns, EDGES: tl.constexpr, CHUNK: tl.constexpr):
    """Returns the first column of a row's tiles, the number of their columns, and a pointer to them."""
    head = 0
    if EDGES:
        # Elements between the last multiple of 16 bytes and the row; a CHUNK has 16 bytes.
        past = (row_pointer.to(tl.int64) // (16 // CHUNK) % CHUNK).to(tl.int32)
        head = tl.minimum((CHUNK - past) % CHUNK, num_columns)
    return head, (num_columns - head) // CHUNK * CHUNK, tl.multiple_of(row_pointer + head, 16)


@triton.jit
def _edges(head, body, num_columns, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Returns columns beside the tiles, one a chunk, and which of them exist: G before the tiles, G behind them."""
    index_E = tl.arange(0, CHUNKS)
    before_E = index_E < CHUNK
    column_E = tl.where(before_E, index_E, index_E - CHUNK + head + body)
    exists_E = tl.where(before_E, index_E < head, (index_E < 2 * CHUNK) & (column_E < num_columns))
    return column_E, exists_E


@triton.jit
def _offsets(CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    return tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def _absorb(max_E, norm_E, shifted_E, score_EG, valid_EG, shift, smoothing):
    """Adds a tile to the running maxima, sums of exponentials and sums of score - shift."""
    max_new_E = tl.maximum(max_E, tl.max(score_EG, axis=1))
    # -inf - -inf would be NaN: a chunk of -inf adds nothing to a row that holds something else.
    safe_E = tl.where(max_new_E == float("-inf"), 0.0, max_new_E)
    added_E = tl.sum(tl.exp2((score_EG - safe_E[:, None]) * LOG2_E), axis=1)
    norm_E = norm_E * tl.exp2((max_E - safe_E) * LOG2_E) + added_E
    if smoothing is not None:
        shifted_EG = score_EG - shift
        if valid_EG is not None:
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
    smoothing,
    EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Returns maximum, sum of exp(score - maximum), score at the label (-inf if elsewhere), sum of score - maximum, and
    with AHEAD the last whole tile, which is the first that the gradient needs.

    The sum of score - maximum is relative to 0 where the maximum is -inf, since the row may be one rank's part of a
    finite row.
    """
    CHUNK: tl.constexpr = 128 // logits_row.dtype.element_ty.primitive_bitwidth
    BLOCK: tl.constexpr = CHUNKS * CHUNK
    label_here = (label_column >= 0) & (label_column < valid_columns)
    target = tl.load(logits_row + label_column, mask=label_here, other=float("-inf"))
    target = tl.where(label_here, _score(target, softcap), float("-inf"))
    shift = 0.0
    if smoothing is not None:
        # Any score of the row keeps a large common offset out of the sum.
        shift = _score(tl.load(logits_row + tl.where(label_here, label_column, 0)), softcap)
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    head, body, tiles = _body(logits_row, num_columns, EDGES, CHUNK)
    max_E = tl.full([CHUNKS], float("-inf"), tl.float32)
    norm_E = tl.zeros([CHUNKS], tl.float32)
    shifted_E = tl.zeros([CHUNKS], tl.float32)
    if EDGES:
        column_E, valid_E = _edges(head, body, num_columns, CHUNKS, CHUNK)
        valid_E = valid_E & (column_E < valid_columns)
        score_E = _score(tl.load(logits_row + column_E, mask=valid_E, other=0.0), softcap)
        max_E = tl.where(valid_E, score_E, float("-inf"))
        # exp(score - score), which is not 1 for all scores.
        norm_E = tl.exp2((max_E - tl.where(max_E == float("-inf"), 0.0, max_E)) * LOG2_E)
        if smoothing is not None:
            shifted_E = tl.where(valid_E, score_E - shift, 0.0)

    valid_body = tl.minimum(tl.maximum(valid_columns - head, 0), body)
    whole = valid_body // BLOCK * BLOCK
    offsets_EG = _offsets(CHUNKS, CHUNK)
    ahead_EG = 0.0
    if AHEAD:
        ahead_EG = tl.load(tiles + offsets_EG, mask=whole > 0)
    for start in range(0, whole, BLOCK):
        if AHEAD:
            logit_EG = ahead_EG
            ahead_EG = tl.load(tiles + tl.minimum(start + BLOCK, whole - BLOCK) + offsets_EG)
        else:
            logit_EG = tl.load(tiles + start + offsets_EG)
        score_EG = _score(logit_EG, softcap)
        max_E, norm_E, shifted_E = _absorb(max_E, norm_E, shifted_E, score_EG, None, shift, smoothing)
    offsets_ES = _offsets(CHUNKS, REST)
    for start in range(whole, valid_body, CHUNKS * REST):
        # Loads reach the allocated width, which keeps them wide whatever is valid; the mask comes after the cap, which
        # would make -inf finite.
        score_ES = tl.load(tiles + start + offsets_ES, mask=offsets_ES < body - start, other=0.0)
        valid_ES = offsets_ES < valid_body - start
        score_ES = tl.where(valid_ES, _score(score_ES, softcap), float("-inf"))
        max_E, norm_E, shifted_E = _absorb(max_E, norm_E, shifted_E, score_ES, valid_ES, shift, smoothing)

    row_max = tl.max(max_E, axis=0)
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    norm = tl.sum(norm_E * tl.exp2((max_E - safe) * LOG2_E), axis=0)
    deviation = tl.sum(shifted_E, axis=0) + valid_columns * (shift - safe)
    return row_max, norm, target, deviation, ahead_EG


@triton.jit
def _gradient_of(logit, share, row_max, peak, softcap):
    """Returns the gradient in fp32: (exp(s - max) * peak - share of the scaled target distribution) * ds/dlogit."""
    logit = logit.to(tl.float32)
    if softcap is not None:
        bent, slope = _tanh(logit * (1.0 / softcap))
        gradient = (tl.exp2((softcap * bent - row_max) * LOG2_E) * peak - share) * slope
    else:
        gradient = tl.exp2((logit - row_max) * LOG2_E) * peak - share
    return gradient


@triton.jit
def write_gradient(
    gradient_row,
    logits_row,
    label_column,
    num_columns,
    valid_columns,
    vocab_size,
    ahead_EG,
    row_max,
    norm,
    scale,
    z_loss,
    softcap,
    smoothing,
    EDGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    REST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Writes scale times a row's gradient, rounded once; zero in invalid columns. May overwrite the row."""
    CHUNK: tl.constexpr = 128 // logits_row.dtype.element_ty.primitive_bitwidth
    BLOCK: tl.constexpr = CHUNKS * CHUNK
    dtype: tl.constexpr = gradient_row.dtype.element_ty
    peak = scale / norm
    if z_loss is not None:
        peak = peak * (1.0 + 2.0 * z_loss * (row_max + tl.log(norm)))
    spread = 0.0
    at_label = scale
    if smoothing is not None:
        spread = scale * smoothing / vocab_size
        at_label = scale * (1.0 - smoothing) + spread
    head, body, tiles = _body(logits_row, num_columns, EDGES, CHUNK)
    gradient_tiles = gradient_row + head
    if EDGES != 2:
        gradient_tiles = tl.multiple_of(gradient_tiles, 16)
    tile_label = label_column - head
    valid_body = tl.minimum(tl.maximum(valid_columns - head, 0), body)
    whole = valid_body // BLOCK * BLOCK
    offsets_EG = _offsets(CHUNKS, CHUNK)
    for step in range(whole // BLOCK):
        start = whole - (step + 1) * BLOCK
        if AHEAD:
            logit_EG = ahead_EG
            ahead_EG = tl.load(tiles + start - BLOCK + offsets_EG, mask=start > 0)
        else:
            logit_EG = tl.load(tiles + start + offsets_EG)
        if (tile_label >= start) & (tile_label < start + BLOCK):
            # One tile a row; the others spare a comparison and a choice a logit.
            share_EG = tl.where(offsets_EG == tile_label - start, at_label, spread)
            gradient_EG = _gradient_of(logit_EG, share_EG, row_max, peak, softcap)
            tl.store(gradient_tiles + start + offsets_EG, gradient_EG.to(dtype))
        else:
            gradient_EG = _gradient_of(logit_EG, spread, row_max, peak, softcap)
            tl.store(gradient_tiles + start + offsets_EG, gradient_EG.to(dtype))
    offsets_ES = _offsets(CHUNKS, REST)
    for start in range(whole, body, CHUNKS * REST):
        exists_ES = offsets_ES < body - start
        logit_ES = tl.load(tiles + start + offsets_ES, mask=exists_ES, other=0.0)
        share_ES = tl.where(offsets_ES == tile_label - start, at_label, spread)
        gradient_ES = _gradient_of(logit_ES, share_ES, row_max, peak, softcap)
        gradient_ES = tl.where(offsets_ES < valid_body - start, gradient_ES, 0.0)
        tl.store(gradient_tiles + start + offsets_ES, gradient_ES.to(dtype), mask=exists_ES)
    if EDGES:
        column_E, exists_E = _edges(head, body, num_columns, CHUNKS, CHUNK)
        logit_E = tl.load(logits_row + column_E, mask=exists_E, other=0.0)
        share_E = tl.where(column_E == label_column, at_label, spread)
        gradient_E = _gradient_of(logit_E, share_E, row_max, peak, softcap)
        gradient_E = tl.where(column_E < valid_columns, gradient_E, 0.0)
        tl.store(gradient_row + column_E, gradient_E.to(dtype), mask=exists_E)


@triton.jit
def write_zeros(gradient_row, num_columns, EDGES: tl.constexpr, CHUNKS: tl.constexpr):
    CHUNK: tl.constexpr = 128 // gradient_row.dtype.element_ty.primitive_bitwidth
    dtype: tl.constexpr = gradient_row.dtype.element_ty
    head, body, tiles = _body(gradient_row, num_columns, EDGES, CHUNK)
    if EDGES:
        column_E, exists_E = _edges(head, body, num_columns, CHUNKS, CHUNK)
        tl.store(gradient_row + column_E, tl.zeros([CHUNKS], dtype), mask=exists_E)
    offsets_EG = _offsets(CHUNKS, CHUNK)
    zero_EG = tl.zeros([CHUNKS, CHUNK], dtype)
    for start in range(0, body, CHUNKS * CHUNK):
        tl.store(tiles + start + offsets_EG, zero_EG, mask=offsets_EG < body - start)
