"""Bounds on the summed weight of a source's domains, beside the bounds of each domain.

The weights within all bounds that are nearest to those wanted (least KL divergence) are clip(lambda weight_i, floor_i,
cap_i) in every source, with one lambda for the sources whose sum is within its bounds, and one of its own for each that
is held at a bound. So a water-filling over lambda finds which sources are held, and two shares each follow in closed
form: what a held source has, over its domains; and the rest, over all other domains.

Legend: K domains, M domains of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.mixing.mixers import project_to_capped_simplex

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SLACK = 1e-9
_NOTHING = 1e-290  # a weight this much smaller than the largest counts as 0
_HALVINGS = 64


@dataclass(frozen=True)
class SourceBound:
    """Bounds on the sum of the weights of a source's domains.

    Attributes:
        members: int64 [M], the numbers of its domains.
    """

    name: str
    members: Ints
    low: float
    high: float

    def check(self, floor: Floats, cap: Floats) -> None:
        """Raises InputError where the bounds of its domains, float64 [K], leave it no sum."""
        least, most = float(floor[self.members].sum()), float(cap[self.members].sum())
        if self.low > self.high:
            raise InputError(
                f"source '{self.name}': data.min_weight {self.low:g} is above data.max_weight {self.high:g}. Change one of them."
            )
        if least > self.high + _SLACK:
            raise InputError(
                f"source '{self.name}': data.max_weight is {self.high:g}, but its domains have at least {least:.6g} together. Raise the "
                "one or lower the others."
            )
        if most < self.low - _SLACK:
            raise InputError(
                f"source '{self.name}': data.min_weight is {self.low:g}, but its domains have at most {most:.6g} together. Lower the one "
                "or raise the others."
            )


def sums(values: Floats, sources: Sequence[SourceBound]) -> tuple[Floats, float]:
    """The sums over each source's domains, and over all domains of no such source."""
    own = np.array([values[source.members].sum() for source in sources])
    return own, float(values.sum() - own.sum()) if _others(values.size, sources).size else 0.0


def check_sources(floor: Floats, cap: Floats, sources: Sequence[SourceBound]) -> None:
    """Raises InputError where no weights are within the bounds of domains (float64 [K] each) and of sources."""
    if not sources:
        return
    for source in sources:
        source.check(floor, cap)
    (least_s, least), (most_s, most) = sums(floor, sources), sums(cap, sources)
    low, high = least + _held(least_s, sources)[0].sum(), most + _held(most_s, sources)[1].sum()
    named = ", ".join(f"{source.name} {source.low:g} to {source.high:g}" for source in sources)
    if low > 1 + _SLACK:
        raise InputError(
            f"the least weights of sources ({named}) and of the other domains sum to {low:.6g}, more than 1. Lower data.min_weight."
        )
    if high < 1 - _SLACK:
        raise InputError(
            f"the largest weights of sources ({named}) and of the other domains sum to {high:.6g}, less than 1: they cannot fill the "
            "mixture. Raise data.max_weight."
        )


def room(most: Floats, sources: Sequence[SourceBound], total: float = 1.0) -> float:
    """The most that all domains have together, of ``total``, where each has at most ``most``, float64 [K]."""
    if not sources:
        return float(most.sum())
    own, others = sums(most, sources)
    return others + float(np.minimum(own, [source.high * total for source in sources]).sum())


def project_within_sources(
    weights: Floats, floor: Floats, cap: Floats, sources: Sequence[SourceBound], names: Sequence[str]
) -> Floats:
    """The weights nearest to ``weights`` that sum to 1 within the bounds of domains and sources.

    Domains of weight 0 get their floors, and more only where the others cannot have it (see
    `project_to_capped_simplex`).

    Args:
        weights, floor, cap: float64 [K]; the bounds can be met (`check_sources`).
    """
    own, _ = sums(weights, sources)
    inside = all(source.low <= each <= source.high for source, each in zip(sources, own.tolist(), strict=True))
    if inside and abs(weights.sum() - 1.0) <= 1e-12 and ((weights >= floor) & (weights <= cap)).all():
        return weights
    groups = [*(source.members for source in sources), _others(weights.size, sources)]
    low = np.array([*(source.low for source in sources), 0.0])
    high = np.array([*(source.high for source in sources), 1.0])
    wanted = weights / weights.max() if weights.max() > 0 else weights
    positive = wanted > _NOTHING

    def totals(power: float) -> tuple[Floats, Floats]:
        """Of the groups where lambda is 2^power: the sums by domains' bounds alone, and within the groups' own."""
        with np.errstate(over="ignore"):
            clipped = np.where(positive, np.clip(wanted * 2.0**power, floor, cap), floor)
        raw = np.array([clipped[group].sum() for group in groups])
        return raw, np.clip(raw, low, high)

    least, most = -1000.0, 1000.0
    raw, held = totals(most)
    if held.sum() <= 1.0:
        # All that was asked for is at its cap: what is left, the domains of weight 0 have to take.
        free = np.minimum(high, [cap[group].sum() for group in groups]) - held
        share = held + free * ((1.0 - held.sum()) / free.sum() if free.sum() > 0 else 0.0)
        return _joined(wanted, floor, cap, groups, share, names)
    for _ in range(_HALVINGS):
        power = (least + most) / 2
        raw, held = totals(power)
        least, most = (power, most) if held.sum() <= 1.0 else (least, power)
    raw, held = totals(least)
    is_held = (raw <= low) | (raw >= high)
    is_held[-1] = False
    together = [number for number in range(len(groups)) if not is_held[number]]
    rest = np.concatenate([groups[number] for number in together])
    fixed = np.flatnonzero(is_held).tolist()
    share = [float(held[number]) for number in fixed]
    left = 1.0 - sum(share)
    parts = [groups[number] for number in fixed]
    if rest.size and left > 0:
        return _joined(wanted, floor, cap, [*parts, rest], np.array([*share, left]), names)
    return _joined(wanted, floor, cap, parts, np.array(share) / sum(share), names)


def _joined(
    wanted: Floats, floor: Floats, cap: Floats, groups: Sequence[Ints], share: Floats, names: Sequence[str]
) -> Floats:
    """float64 [K]: each group's domains share what it has, within their bounds; 0 elsewhere."""
    found = np.zeros(wanted.size)
    for group, total in zip(groups, share.tolist(), strict=True):
        if group.size and total > 0:
            own = [names[int(k)] for k in group.tolist()]
            found[group] = total * project_to_capped_simplex(
                wanted[group], floor[group] / total, cap[group] / total, own
            )
    return found


def _others(number: int, sources: Sequence[SourceBound]) -> Ints:
    """The domains of no source in ``sources``."""
    is_other = np.ones(number, np.bool_)
    for source in sources:
        is_other[source.members] = False
    return np.flatnonzero(is_other)


def _held(own: Floats, sources: Sequence[SourceBound]) -> tuple[Floats, Floats]:
    """Sums of sources, float64 [sources], raised to the least and lowered to the largest that each may have."""
    return np.maximum(own, [source.low for source in sources]), np.minimum(own, [source.high for source in sources])
