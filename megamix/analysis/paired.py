"""Student's t intervals for a handful of numbers, without scipy.

For a whole number of degrees of freedom the distribution is a finite sum of powers of a cosine (Abramowitz and Stegun,
Handbook of Mathematical Functions, 26.7.3 and 26.7.4); its quantile is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and how well it is known.

    Attributes:
        half_width: of the confidence interval; None for fewer than two numbers.
        number: of numbers.
    """

    mean: float
    half_width: float | None
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of 0; False where there is none."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent, normally distributed numbers with its confidence interval.

    Args:
        values: at least one.
    """
    number = len(values)
    mean = math.fsum(values) / number
    if number < 2:
        return Interval(mean, None, number)
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    return Interval(mean, t_quantile(confidence, number - 1) * math.sqrt(variance / number), number)


def t_probability(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # Each term is the one before it times cos^2 times a ratio of whole numbers.
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (index - 1) / index
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = ``confidence``, to the last digits of a float.

    Args:
        confidence: above 0 and below 1.
        degrees: at least 1.
    """
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return high
