"""Domain statistics: the mixer's input from a training step.

Shapes: K is the number of domains; every array is [K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamix.core.errors import InputError
from megamix.mixing.mixers.weights import FloatArray

IntArray = npt.NDArray[np.int64]

LARGEST = float(np.finfo(np.float64).max)
"""The largest float64; sums that would exceed it stop there."""


@dataclass(frozen=True, eq=False, init=False)
class DomainStats:
    """Sums over the tokens of one step (or of several, added up) of the whole data-parallel world.

    Sums and counts rather than means, so that adding over micro-batches, ranks and steps and dividing once is exact.
    Every field accepts any sequence of K numbers and is kept as a read-only copy.

    Attributes:
        nats: float64 [K], the losses of each domain's tokens, summed, in nats; set to 0 for a domain without tokens,
            whatever is given there.
        tokens: int64 [K], how many tokens were counted; 0 means the domain was absent.
        excess_nats: float64 [K] or None, the sums of max(loss - reference loss, 0), where a reference was used; set to
            0 like ``nats``.
        weights: float64 [K] or None, the sampling weights these tokens were drawn with; they sum to 1. The sampler
            applies new weights some steps late, so they are not always the mixer's latest (which None stands for), and
            importance weighting by any others is biased.
        non_finite: int64 [K] or None, how many tokens had a loss that was not finite and were left out of the sums.

    Raises:
        InputError: Lengths that differ, values that are not finite, counts that are negative or no whole numbers,
            weights that are negative or do not sum to 1.
    """

    nats: FloatArray
    tokens: IntArray
    excess_nats: FloatArray | None
    weights: FloatArray | None
    non_finite: IntArray | None

    def __init__(
        self,
        nats: npt.ArrayLike,
        tokens: npt.ArrayLike,
        excess_nats: npt.ArrayLike | None = None,
        weights: npt.ArrayLike | None = None,
        non_finite: npt.ArrayLike | None = None,
    ) -> None:
        counts = _counts("tokens", tokens)
        k = counts.size
        fields: dict[str, npt.NDArray[Any] | None] = {
            "nats": _numbers("nats", nats, k, counts > 0),
            "tokens": counts,
            "excess_nats": None if excess_nats is None else _numbers("excess_nats", excess_nats, k, counts > 0),
            "weights": None if weights is None else _sampling_weights(weights, k),
            "non_finite": None if non_finite is None else _counts("non_finite", non_finite, k),
        }
        for name, array in fields.items():
            if array is not None:
                array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def num_domains(self) -> int:
        """K."""
        return self.tokens.size

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """bool [K], which domains had tokens."""
        return self.tokens > 0

    @property
    def loss(self) -> FloatArray:
        """float64 [K], mean loss in nats per token; NaN where a domain was absent."""
        return self._mean(self.nats)

    @property
    def excess_loss(self) -> FloatArray | None:
        """float64 [K], mean excess loss in nats per token, NaN where absent; None without a reference."""
        return None if self.excess_nats is None else self._mean(self.excess_nats)

    def _mean(self, sums: FloatArray) -> FloatArray:
        return np.divide(sums, self.tokens, out=np.full(self.num_domains, np.nan), where=self.seen)

    def __add__(self, other: DomainStats) -> DomainStats:
        """The statistics of both intervals together.

        Sums add. The weights become the mean of both, each counted by its interval's total tokens: that is the
        probability that a token of the whole interval was drawn from the domain, which is the divisor of
        importance weighting for the interval's mean loss (the latest weights alone would be wrong for the older
        tokens). Sums beyond float64 stop at its largest number.

        Raises:
            InputError: K differs, or only one side has excess losses or weights.
        """
        if not isinstance(other, DomainStats):
            return NotImplemented
        if self.num_domains != other.num_domains:
            raise InputError(
                f"domain statistics of {self.num_domains} and of {other.num_domains} domains cannot be added."
            )
        for name in ("excess_nats", "weights"):
            if (getattr(self, name) is None) != (getattr(other, name) is None):
                raise InputError(
                    f"domain statistics with and without {name} cannot be added. Give {name} in both or in neither."
                )
        return DomainStats(
            nats=_saturated_sum(self.nats, other.nats),
            tokens=self.tokens + other.tokens,
            excess_nats=None
            if self.excess_nats is None or other.excess_nats is None
            else _saturated_sum(self.excess_nats, other.excess_nats),
            weights=self._mean_weights(other),
            non_finite=_add_counts(self.non_finite, other.non_finite),
        )

    def _mean_weights(self, other: DomainStats) -> FloatArray | None:
        if self.weights is None or other.weights is None:
            return None
        mine, theirs = int(self.tokens.sum()), int(other.tokens.sum())
        # Weights that are equal (no change during the interval) or alone must come through without rounding.
        if mine == 0 or np.array_equal(self.weights, other.weights):
            return other.weights
        if theirs == 0:
            return self.weights
        return (self.weights * mine + other.weights * theirs) / (mine + theirs)

    def to_state(self) -> dict[str, list[float] | list[int] | None]:
        """The fields as plain lists; ``DomainStats(**state)`` gives the same statistics back, bit for bit."""
        names = ("nats", "tokens", "excess_nats", "weights", "non_finite")
        return {name: None if getattr(self, name) is None else getattr(self, name).tolist() for name in names}


def _numbers(name: str, values: Any, num_domains: int, where: npt.NDArray[np.bool_] | None = None) -> FloatArray:
    """Checked float64 [K]; 0 outside of ``where``."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"domain statistics: {name} is not a sequence of numbers: {values!r}.") from error
    if array.shape != (num_domains,):
        raise InputError(f"domain statistics: {name} has shape {array.shape}, expected ({num_domains},) like tokens.")
    if where is not None:
        array[~where] = 0.0
    for index in np.flatnonzero(~np.isfinite(array)):
        raise InputError(f"domain statistics: {name} of domain {index} is {array[index]}, expected a finite number.")
    return array


def _sampling_weights(values: Any, num_domains: int) -> FloatArray:
    weights = _numbers("weights", values, num_domains)
    # Loose enough for weights that passed through float32, tight enough to catch weights that were never normalised.
    if weights.min() < 0 or abs(weights.sum() - 1) > 1e-4:
        raise InputError(
            f"domain statistics: weights {weights.tolist()} sum to {weights.sum():.6g}, expected values that are "
            "not negative and sum to 1."
        )
    return weights


def _counts(name: str, values: Any, num_domains: int | None = None) -> IntArray:
    try:
        array = np.array(values)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"numbers expected, not {array.dtype}")
        if array.dtype == np.int64 and array.shape == (num_domains or array.size,) and array.min(initial=0) >= 0:
            return array  # as they come in every step
        with np.errstate(invalid="ignore"):  # NaN and what exceeds int64 is found by the comparison below
            whole = array.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"domain statistics: {name} is not a sequence of counts: {values!r}.") from error
    if array.ndim != 1 or array.size == 0 or array.size != (num_domains or array.size):
        wanted = "one number a domain" if num_domains is None else f"({num_domains},) like tokens"
        raise InputError(f"domain statistics: {name} has shape {array.shape}, expected {wanted}.")
    for index in np.flatnonzero((whole != array) | (whole < 0)):
        raise InputError(
            f"domain statistics: {name} of domain {index} is {array[index]}, "
            "expected a whole number that is not negative."
        )
    return whole


def _saturated_sum(first: FloatArray, second: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.clip(first + second, -LARGEST, LARGEST)


def _add_counts(first: IntArray | None, second: IntArray | None) -> IntArray | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
