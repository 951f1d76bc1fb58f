"""The order in which domains take turns while their weights stay the same, as a pure function of position.

Legend: K domains, p a position (a whole number of samples since the weights were set), w_i the weight of domain i (sum
1), d_i its deficit when they
were set: the sum of its weight over all earlier positions minus the samples it had given. Sample j of domain i is *due*
at (j + 1/2 - d_i) / w_i; all samples sorted by (due time, domain) are the order. A domain of weight 0 is never due.

Sorting from the start would cost O(p). But the number of samples due before a time t has a closed form, so a window of
the order is found from two
times that bracket it: O(K + window) work wherever it lies.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def window(weights: Floats, deficits: Floats, start: int, stop: int) -> tuple[Ints, Ints]:
    """Positions [start, stop) of the order.

    Args:
        weights: float64 [K], not negative, sum 1.
        deficits: float64 [K], in samples.
        start, stop: positions, 0 <= start <= stop.

    Returns:
        (domain, ordinal), int64 [stop - start] each: sample number ``ordinal`` of ``domain``, counted from where the
        weights were set.
    """
    low, _ = _bracket_below(weights, deficits, start)
    high, _ = _bracket_above(weights, deficits, stop)
    given = high - low
    domain = np.repeat(np.arange(weights.size), given)
    first = np.cumsum(given) - given
    ordinal = np.arange(domain.size) - np.repeat(first - low, given)
    # Stable, so that equal due times keep the order of their domains, and a domain that of its samples.
    order = np.argsort(_due(weights[domain], deficits[domain], ordinal), kind="stable")
    skip = start - int(low.sum())
    order = order[skip : skip + stop - start]
    return domain[order], ordinal[order]


def counts_at(weights: Floats, deficits: Floats, position: int) -> Ints:
    """int64 [K]: how many samples each domain has given in the first ``position`` positions (their sum)."""
    low, total = _bracket_below(weights, deficits, position)
    domain, _ = window(weights, deficits, total, position)
    return low + np.bincount(domain, minlength=weights.size)


def _due(weights: Floats, deficits: Floats, ordinal: Ints) -> Floats:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(weights > 0, (ordinal + 0.5 - deficits) / weights, np.inf)


def _number_due(weights: Floats, deficits: Floats, time: float) -> Ints:
    """int64 [K]: how many samples of each domain are due strictly before ``time``, exactly as `_due` rounds."""
    ready = weights > 0
    number = np.where(ready, np.maximum(np.ceil(weights * time + deficits - 0.5), 0), 0).astype(np.int64)
    # The closed form rounds differently from the due times themselves; these agree with the sort to the last bit.
    while (late := ready & (number > 0) & (_due(weights, deficits, number - 1) >= time)).any():
        number = number - late
    while (early := ready & (_due(weights, deficits, number) < time)).any():
        number = number + early
    return number


def _bracket_below(weights: Floats, deficits: Floats, position: int) -> tuple[Ints, int]:
    """The number of samples due before a time that at most ``position`` samples precede, and their total."""
    slack = float(weights.size + 1)
    while True:
        number = _number_due(weights, deficits, position - slack)
        total = int(number.sum())
        if total <= position:
            return number, total
        slack *= 2


def _bracket_above(weights: Floats, deficits: Floats, position: int) -> tuple[Ints, int]:
    slack = float(weights.size + 1)
    while True:
        number = _number_due(weights, deficits, position + slack)
        total = int(number.sum())
        if total >= position:
            return number, total
        slack *= 2
