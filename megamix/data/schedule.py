"""The order in which domains take turns while their weights stay the same, as a pure function of position.

Legend: K domains, p a position (a whole number of samples since the weights were set), w_i the weight of domain i (sum
1), d_i its deficit when they were set: the sum of its weight over all earlier positions minus the samples it had given.
Sample j of domain i is *due* at (j + 1/2 - d_i) / w_i; all samples sorted by (due time, domain, j) are the order. A
domain of weight 0 is never due.

Sorting from the start would cost O(p). But about how many samples are due before a time has a closed form, so a window
of the order is found from a number of samples of each domain that surely lie before it and one that surely suffices:
O(K + window) work wherever it lies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def window(weights: Floats, deficits: Floats, start: int, stop: int, given: Ints | None = None) -> tuple[Ints, Ints]:
    """Positions [start, stop) of the order.

    Args:
        weights: float64 [K], not negative, sum 1.
        deficits: float64 [K], in samples.
        start, stop: positions, 0 <= start <= stop.
        given: `counts_at` of ``start`` where it is known, which saves looking for it.

    Returns:
        (domain, ordinal), int64 [stop - start] each: sample number ``ordinal`` of ``domain``, counted from where the
        weights were set.
    """
    low = _below(weights, deficits, start) if given is None else given
    skip = start - int(low.sum())
    domain, ordinal = _sorted(weights, deficits, low, _above(weights, deficits, stop))
    return domain[skip : skip + stop - start], ordinal[skip : skip + stop - start]


def counts_at(weights: Floats, deficits: Floats, position: int) -> Ints:
    """int64 [K]: how many samples each domain has given in the first ``position`` positions (their sum)."""
    low = _below(weights, deficits, position)
    domain, _ = _sorted(weights, deficits, low, _above(weights, deficits, position))
    return low + np.bincount(domain[: position - int(low.sum())], minlength=weights.size)


def _sorted(weights: Floats, deficits: Floats, low: Ints, high: Ints) -> tuple[Ints, Ints]:
    """Samples [low_i, high_i) of every domain, in order."""
    number = high - low
    domain = np.repeat(np.arange(weights.size), number)
    ordinal = np.arange(domain.size) + np.repeat(high - np.cumsum(number), number)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        due = (ordinal + 0.5 - deficits[domain]) / weights[domain]
    # Stable, so that equal due times keep the order of their domains, and a domain that of its samples.
    order = np.argsort(due, kind="stable")
    return domain[order], ordinal[order]


def _due_before(weights: Floats, deficits: Floats, time: float, slack: float) -> Floats:
    """float64 [K]: whole numbers of samples due before ``time``; a value within ``slack`` of the next one counts as the
    next."""
    number = np.ceil(weights * time + (deficits - 0.5 + slack))
    return np.where(weights > 0, np.maximum(number, 0.0), 0.0)


def _rounding(position: int) -> float:
    """More than all rounding errors in a number of samples due before ``position``, here and in the due times."""
    return 1e-9 + 1e-14 * position


def _below(weights: Floats, deficits: Floats, position: int) -> Ints:
    """int64 [K]: no more samples of any domain than it gives in the first ``position`` positions, and few less."""
    margin, slack = _margin(weights), _rounding(position)
    while (time := position - margin) > 0:
        if _due_before(weights, deficits, time, slack).sum() <= position:
            return _due_before(weights, deficits, time, -slack).astype(np.int64)
        margin *= 2
    return np.zeros(weights.size, np.int64)


def _above(weights: Floats, deficits: Floats, position: int) -> Ints:
    """int64 [K]: at least as many samples of every domain as it gives in the first ``position`` positions, and few
    more."""
    margin, slack = _margin(weights), _rounding(position)
    while True:
        time = position + margin
        if _due_before(weights, deficits, time, -slack).sum() >= position:
            return _due_before(weights, deficits, time, slack).astype(np.int64)
        margin *= 2


def _margin(weights: Floats) -> float:
    """A first guess at how far the time until which p samples are due lies from p."""
    return 4.0 + weights.size / 4
