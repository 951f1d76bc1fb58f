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
MAX_DOMAINS = tl.constexpr(65536)
# Adding and taking away 1.5 * 2**52 rounds a float64 below 2**51 to a whole number, half to even.
ROUND_FLOAT64 = tl.constexpr(6755399441055744.0)


@triton.jit
def describe(row, here, labels, domains, mask, weights, ignore_index, vocab_size, num_domains):
    """Returns whether a row is counted, its label, nearest domain and weight (NaN if invalid), and whether label and
    domain are valid.

    ``row`` is a number or a block of numbers; ``here`` is true for rows that exist. Without ``domains``, which is for
    measurements, all tokens are of domain 0.
    """
    label = tl.load(labels + row, mask=here, other=0).to(tl.int64)
    counted = here & (label != ignore_index)
    if mask is not None:
        counted = counted & (tl.load(mask + row, mask=here, other=0) != 0)
    valid = (label >= 0) & (label < vocab_size)
    nearest = label * 0
    if domains is not None:
        domain = tl.load(domains + row, mask=here, other=0).to(tl.int64)
        nearest = tl.minimum(tl.maximum(domain, 0), num_domains - 1)
        valid = valid & (domain == nearest)
    weight = tl.where(valid, 1.0, float("nan"))
    if weights is not None:
        weight = weight * tl.load(weights + nearest, mask=here, other=0.0).to(tl.float32)
    return counted, label, nearest.to(tl.int32), weight, valid


@triton.jit
def _units(nats):
    """Returns nats as int64 multiples of 2**-24, rounded half to even."""
    return (nats.to(tl.float64) * UNITS_PER_NAT + ROUND_FLOAT64 - ROUND_FLOAT64).to(tl.int64)


@triton.jit
def _add(cell, nats, tokens, excess, non_finite, TOGETHER: tl.constexpr):
    """Adds to the four sums of a domain, of each row or, TOGETHER, of a block of rows with one domain.

    Integer atomics commute, so the sums do not depend on the order.
    """
    if TOGETHER:
        nats, tokens, non_finite = tl.sum(nats, axis=0), tl.sum(tokens, axis=0), tl.sum(non_finite, axis=0)
        if excess is not None:
            excess = tl.sum(excess, axis=0)
    tl.atomic_add(cell, nats, mask=tokens > 0, sem="relaxed")
    tl.atomic_add(cell + 1, tokens, mask=tokens > 0, sem="relaxed")
    if excess is not None:
        tl.atomic_add(cell + 2, excess, mask=tokens > 0, sem="relaxed")
    tl.atomic_add(cell + 3, non_finite, mask=non_finite > 0, sem="relaxed")


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
    BLOCK: tl.constexpr,
):
    """Writes the losses, zero where a row is not counted, and adds them to the domain sums if ``sums`` is given.

    With BLOCK, of a block of rows. One whose rows are all of one domain adds to it once: neighbouring tokens mostly
    share their domain, and atomics on one address take turns.
    """
    log_norm = tl.log(norm)
    nll = tl.where(valid, log_norm - (target - row_max), float("nan"))
    objective = nll
    if smoothing is not None:
        objective = (1.0 - smoothing) * nll + smoothing * (log_norm - deviation / vocab_size)
    if z_loss is not None:
        objective = objective + z_loss * (row_max + log_norm) * (row_max + log_norm)
    # A product with a weight of 0 would not make an infinite or NaN loss 0.
    tl.store(row_losses + row, tl.where(counted & (weight != 0), objective * weight / divisor, 0.0), mask=here)
    if token_losses is not None:
        tl.store(token_losses + row, tl.where(counted, nll, 0.0), mask=here)
    if sums is not None:
        # Comparisons with NaN are false, so both tests catch NaN too.
        good = counted & (tl.abs(nll) <= MAX_TOKEN_NATS)
        excess = None
        if references is not None:
            reference = tl.load(references + row, mask=counted, other=0.0).to(tl.float32)
            good = good & (tl.abs(reference) <= MAX_TOKEN_NATS)
            excess = _units(tl.where(good, tl.maximum(nll - reference, 0.0), 0.0))
        nats = _units(tl.where(good, nll, 0.0))
        tokens = good.to(tl.int64)
        non_finite = (counted & (good == 0)).to(tl.int64)
        cell = sums + domain * 4
        if BLOCK:
            first = tl.min(tl.where(counted, domain, MAX_DOMAINS), axis=0)
            if first == tl.max(tl.where(counted, domain, -1), axis=0):
                _add(sums + first * 4, nats, tokens, excess, non_finite, True)
            else:
                _add(cell, nats, tokens, excess, non_finite, False)
        else:
            _add(cell, nats, tokens, excess, non_finite, False)
