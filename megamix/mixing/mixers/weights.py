"""Weights over domains: reading them from users, and keeping them within bounds.

Shapes: K is the number of domains. Everything here is a pure function of numpy float64 arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megamix.core.errors import InputError, check_known
from megamix.core.text import listed

FloatArray = npt.NDArray[np.float64]
DomainWeights = Mapping[str, float] | Sequence[float] | FloatArray
"""K weights, by name or in the order of the domains."""

# Bounds that come from divisions (epochs x tokens / budget) may add up to 1 only within rounding; that is not the
# user's mistake.
_SLACK = 1e-9


def normalise_weights(
    weights: Mapping[str, float] | Sequence[float] | npt.NDArray[Any], domains: Sequence[str], source: str
) -> FloatArray:
    """Checks weights given by a user and scales them to sum to 1.

    Args:
        weights: Relative weights, either one a domain in the order of ``domains`` or a mapping from every domain's
            name.
        domains: The K domain names.
        source: Where the weights come from, for messages (``mixture``, a file name).

    Returns:
        float64 [K], non-negative, summing to 1.

    Raises:
        InputError: Wrong length, an unknown or missing name, a value that is no number, negative, NaN or infinite, or
            weights that are all zero.
    """
    if isinstance(weights, str) or not hasattr(weights, "__iter__"):
        raise InputError(f"{source}: {weights!r} are no weights. Give one number a domain, or a mapping by name.")
    values = _in_order(weights, domains, source) if isinstance(weights, Mapping) else weights
    if not isinstance(values, np.ndarray):
        values = list(values)
    if len(values) != len(domains):
        raise InputError(
            f"{source}: {len(values)} weights for {len(domains)} domains ({listed(domains)}). Give one weight a domain."
        )
    # A mixer's weights of every step are an array, which is not gone through number by number.
    is_plain = isinstance(values, np.ndarray) and values.dtype == np.float64 and values.ndim == 1
    result = np.array(values if is_plain else [_as_number(value) for value in values], dtype=np.float64)
    for index in np.flatnonzero(~((result >= 0) & (result < np.inf)))[:1]:
        raise InputError(
            f"{source}: the weight of domain '{domains[index]}' is {values[index]!r}, "
            "expected a finite number that is not negative."
        )
    largest = result.max(initial=0.0)
    if largest == 0:
        raise InputError(
            f"{source}: the weights of all {len(domains)} domains ({listed(domains)}) are 0. "
            "Give at least one a weight above 0."
        )
    with np.errstate(over="ignore"):
        total = result.sum()
    if not np.isfinite(total):
        result /= largest
        total = result.sum()
    return result / total


def _in_order(weights: Mapping[str, float], domains: Sequence[str], source: str) -> list[Any]:
    """The values of a mapping in the order of ``domains``; every name must be there, and no other."""
    known = set(domains)
    for name in (name for name in weights if name not in known):
        if topics := [domain for domain in domains if domain.startswith(f"{name}:")]:
            raise InputError(
                f"{source}: '{name}' is no domain, but a source of {listed(topics)}. Give each of these a weight, or the source "
                "{weight: WEIGHT, topics: {TOPIC: WEIGHT, ...}}."
            )
    check_known(weights, domains, f"{source}: there is no domain")
    missing = [domain for domain in domains if domain not in weights]
    if missing:
        raise InputError(
            f"{source}: no weight for {listed(missing)}. Give every domain a weight; 0 leaves a domain out of the samples, "
            "under any mixer."
        )
    return [weights[domain] for domain in domains]


def _as_number(value: Any) -> float:
    """``value`` as a float; NaN for what is not a number (a bool and a string of digits are not meant as weights)."""
    if isinstance(value, (bool, np.bool_, str, bytes)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def project_to_capped_simplex(
    weights: Sequence[float] | FloatArray,
    floor: float | Sequence[float] | FloatArray,
    cap: float | Sequence[float] | FloatArray,
    domains: Sequence[str] | None = None,
) -> FloatArray:
    """Brings weights into {w : sum w = 1, floor_i <= w_i <= cap_i}, keeping the ratios of those that touch no bound.

    The result is w_i = clip(lambda * weights_i, floor_i, cap_i) with the one lambda that makes the sum 1. That is the
    information projection (least KL divergence from the normalised weights), found by water-filling: the sum grows with
    lambda and is linear between the values where a domain leaves its floor or reaches its cap, so a binary search over
    those 2 K values finds the set of domains in between, and lambda follows from them in closed form. O(K log K).

    A domain of weight 0 gets its floor and no more, unless the caps of all others together leave part of the 1
    unassigned; that part is then spread over the domains of weight 0 in proportion to the room they have (cap - floor).
    A weight 1e-290 times smaller than the largest counts as 0.

    Args:
        weights: [K], relative, finite and not negative; they need not sum to 1.
        floor: Lower bounds, one for all or [K], in [0, 1].
        cap: Upper bounds, one for all or [K]; above 1 (infinity included) means no bound.
        domains: The K names, for messages only.

    Returns:
        float64 [K], a new array. Weights that already satisfy everything come back unchanged.

    Raises:
        InputError: A floor above its cap, floors that sum to more than 1, caps that sum to less than 1, or values that
            are negative or not numbers.
    """
    wanted = np.array(weights, dtype=np.float64)
    lower = _bound(floor, wanted.size, "floor")
    upper = np.minimum(_bound(cap, wanted.size, "cap"), 1.0)
    _check_feasible(wanted, lower, upper, domains)
    inside = np.all((wanted >= lower) & (wanted <= upper))
    if inside and abs(wanted.sum() - 1.0) <= 1e-12:
        return wanted

    if lower.sum() >= 1.0:
        return lower / lower.sum()
    largest = wanted.max()
    wanted = wanted / largest if largest > 0 else wanted
    positive = wanted > 1e-290  # below, bound / weight would overflow
    result = np.where(positive, upper, lower)
    rest = 1.0 - result.sum()
    if rest < 0:
        result[positive] = _fill(wanted[positive], lower[positive], upper[positive], 1.0 - lower[~positive].sum())
        return result
    # Every wanted domain is at its cap: what is left, if more than rounding, the domains nobody asked for have to take.
    room = np.where(positive, 0.0, upper - lower)
    if rest > 1e-12 and room.sum() > 0:
        result += room * min(rest / room.sum(), 1.0)
    return result / result.sum() if rest > 1e-12 else result


def _fill(weights: FloatArray, lower: FloatArray, upper: FloatArray, total: float) -> FloatArray:
    """clip(lambda * weights, lower, upper) with the lambda that makes the sum ``total``.

    All weights are above 0, and sum lower <= total < sum upper.
    """
    leaves_floor, reaches_cap = lower / weights, upper / weights
    turning = np.concatenate([[0.0], leaves_floor, reaches_cap])
    turning.sort()
    clipped = np.empty_like(weights)
    # The largest turning point at which the sum does not exceed the total.
    first, last = 0, len(turning) - 1
    while first < last:
        middle = (first + last + 1) // 2
        np.multiply(weights, turning[middle], out=clipped)
        np.maximum(clipped, lower, out=clipped)
        if np.minimum(clipped, upper, out=clipped).sum() <= total:
            first = middle
        else:
            last = middle - 1
    start = turning[first]
    at_cap, at_floor = reaches_cap <= start, leaves_floor > start
    free = ~(at_cap | at_floor)
    result = np.where(at_cap, upper, lower)
    if free.any():
        left = total - result[~free].sum()
        # Shares first, so that tiny weights do not make the factor overflow.
        result[free] = np.clip(left * (weights[free] / weights[free].sum()), lower[free], upper[free])
    return result


def _bound(value: float | Sequence[float] | FloatArray, num_domains: int, what: str) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim and array.shape != (num_domains,):
        raise InputError(f"{array.size} values of {what} for {num_domains} domains. Give one value, or one a domain.")
    return array.copy() if array.ndim else np.full(num_domains, array)


def _check_feasible(weights: FloatArray, lower: FloatArray, upper: FloatArray, domains: Sequence[str] | None) -> None:
    number = weights.size if domains is None else len(domains)
    if weights.ndim != 1 or weights.size == 0 or number != weights.size:
        raise InputError(f"weights of shape {weights.shape} for {number} domains, expected one weight a domain.")

    def name(index: int) -> str:
        return f"domain {index}" if domains is None else f"'{domains[index]}'"

    # Names are put together for an error only: this is done in every step, for tens of thousands of domains.
    for what, values in (("weight", weights), ("floor", lower), ("cap", upper)):
        for index in np.flatnonzero(~((values >= 0) & (values < np.inf)))[:1].tolist():
            raise InputError(
                f"the {what} of {name(index)} is {values[index]}, expected a finite number that is not negative."
            )
    above = np.flatnonzero(lower > upper).tolist()
    if above:
        crossed = [f"{name(index)} (floor {lower[index]:.6g}, cap {upper[index]:.6g})" for index in above]
        raise InputError(f"the floor is above the cap for {listed(crossed)}. Lower the floor or raise the cap.")
    if lower.sum() > 1 + _SLACK:
        shown = [f"{name(index)} {lower[index]:.6g}" for index in np.flatnonzero(lower > 0).tolist()]
        raise InputError(f"the floors sum to {lower.sum():.6g}, more than 1: {listed(shown)}. Lower some of them.")
    if upper.sum() < 1 - _SLACK:
        shown = [f"{name(index)} {high:.6g}" for index, high in enumerate(upper.tolist())]
        raise InputError(
            f"the caps sum to {upper.sum():.6g}, less than 1, so the domains together cannot fill the mixture: "
            f"{listed(shown)}. Raise some caps (more epochs), add data or train for fewer tokens."
        )
