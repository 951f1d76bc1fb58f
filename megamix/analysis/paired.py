"""Means of a handful of numbers with Student's t intervals, and the difference that so few can show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        half_width: of the interval; None for fewer than two numbers.
        number: how many numbers there were.
    """

    mean: float
    half_width: float | None
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of 0; False where there is none."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent, normally distributed numbers (one or more) with its confidence interval."""
    from scipy.stats import t

    number, mean = len(values), statistics.fmean(values)
    if number < 2:
        return Interval(mean, None, number)
    quantile = float(t.ppf((1 + confidence) / 2, number - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(number), number)


def smallest_visible(deviation: float, number: int, power: float = 0.8, confidence: float = 0.95) -> float | None:
    """The mean of normally distributed numbers whose t interval excludes 0 with a probability of ``power``.

    Args:
        deviation: standard deviation of the numbers.
        number: how many there are; None for fewer than two.
    """
    from scipy.optimize import root_scalar
    from scipy.stats import nct, t

    if number < 2:
        return None
    bound = float(t.ppf((1 + confidence) / 2, number - 1))

    def missing(shift: float) -> float:
        # The other tail, which a mean of the wrong sign would be in, is left out: below 1e-4 where power is 0.8.
        return float(nct.sf(bound, number - 1, shift)) - power

    return root_scalar(missing, bracket=(0.0, 2 * bound + 2)).root * deviation / math.sqrt(number)
