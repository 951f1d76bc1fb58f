"""Means of a handful of numbers with Student's t intervals."""

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
