"""Device code of the Triton path: a token's label, domain and weight, and the losses and sums that it adds to.

Shapes: N tokens, K domains.
"""

# Arguments of jitted functions are pointers, numbers and tl.constexpr, which annotations cannot say:
# pyright: reportArgumentType=false

import triton
import triton.language as tl

# A unit of the sums is 2**-24 nats, and a token of more than 2**20 nats is excluded: see sums.py.
UNITS_PER_NAT = tl.constexpr(16777216.0)
MAX_TOKEN_NATS = tl.constexpr(1048576.0)
# Adding and taking away 1.5 * 2**52 rounds a float64 below 2**51 to a whole number, half to even.
ROUND_FLOAT64 = tl.constexpr(6755399441055744.0)


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
