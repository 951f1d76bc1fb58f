"""What a run's weights came to over a stretch of it: exact integrals of its ledger."""

from __future__ import annotations

import math

import numpy as np

from megamix.errors import InputError
from megamix.ledger import Ledger


def mean_weights(ledger: Ledger, start: int, end: int) -> dict[str, float]:
    """The mean of the weights over the positions [start, end), by domain.

    A line's weights hold from its position to the next line's. A domain that was not in the run for a while has weight
    0 there. Sums are rounded once (`math.fsum`), so the mean does not depend on how many changes there were.

    Returns:
        The mean of every domain that ever was in the run, those of its end first; they sum to 1.

    Raises:
        InputError: an empty stretch, or positions that do not rise from 0.
    """
    if not 0 <= start < end:
        raise InputError(f"no weights between the positions {start} and {end}: the run has to be trained first.")
    starts = np.array([line["position"] for line in ledger.lines], np.int64)
    wrong = np.flatnonzero(np.diff(starts, prepend=0) < 0)
    if starts[0] != 0 or wrong.size:
        at = int(wrong[0]) if wrong.size else 0
        raise InputError(
            f"weights.jsonl: line {at + 1} of those that hold is at position {starts[at]}, expected positions that rise"
            " from 0. Lines are missing or out of order: use the file as the run wrote it."
        )
    ends = np.append(starts[1:], max(end, int(starts[-1])))
    lengths = np.clip(np.minimum(ends, end) - np.maximum(starts, start), 0, None)
    rows = lengths > 0
    terms = ledger.weights()[rows] * lengths[rows, None]
    sums = [math.fsum(column) for column in terms.T.tolist()]
    return {name: total / (end - start) for name, total in zip(ledger.names, sums, strict=True)}
