"""Mixtures drawn from a Dirichlet distribution around a prior, within bounds by construction.

One draw is one level: the sources, or the topics of one source.

    concentration_i = strength x prior_i, w ~ Dirichlet (Olmix, Chen et al., arXiv 2602.12237, its swarm)
    kept: what is drawn above the minimum, what is required, and more where the caps of these do not reach 1
    w brought to the nearest (least KL divergence) with minimum <= w_i <= cap_i for those kept, and 0 for all others

So a weight is 0 or at least the minimum, and never above its cap, without drawing again until that happens to be so.

Legend: M entries of a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.text import listed
from megamix.mixing.mixers import project_to_capped_simplex

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
SLACK = 1e-9
"""Bounds are quotients of token counts; what misses by less than this does not miss."""


@dataclass(frozen=True)
class Level:
    """Prior and bounds of one level.

    Attributes:
        names: of the M entries.
        prior: float64 [M], sums to 1; an entry of 0 never has a weight.
        minimum: the smallest weight that is not 0.
        cap: float64 [M].
        required: bool [M], those that always have a weight.
        left_out: the probability that one that is not required has none.
    """

    names: tuple[str, ...]
    prior: Floats
    minimum: float
    cap: Floats
    required: Bools
    left_out: float = 0.0

    @property
    def usable(self) -> Bools:
        """bool [M]: what can have a weight: the prior is above 0, and the cap reaches the minimum."""
        return (self.prior > 0) & (self.cap > 0) & (self.cap >= self.minimum - SLACK)

    def check(self, what: str, where: str = "") -> None:
        """Refuses bounds that no weights meet.

        Args:
            what: the word for an entry, for messages.
            where: the words for the level, for messages.

        Raises:
            InputError: no weights meet all bounds; with the numbers.
        """
        for name, prior, cap, required in zip(self.names, self.prior, self.cap, self.required, strict=True):
            if not required:
                continue
            if prior <= 0:
                raise InputError(
                    f"'{name}' is to have a weight in every member, but its prior is 0. Give it a prior above 0."
                )
            if cap <= 0 or cap < self.minimum - SLACK:
                raise InputError(
                    f"'{name}' is to have a weight of at least {self.minimum:.6g} ({what}{where}) in every member, but can have "
                    f"{cap:.6g} at most. Lower the minimum weight, allow more repetition, or do not require it."
                )
        needed = int(self.required.sum())
        if needed * self.minimum > 1 + SLACK:
            raise InputError(
                f"{needed} {what}s{where} are to have a weight of at least {self.minimum:.6g} each in every member, together "
                f"{needed * self.minimum:.6g}, more than 1. Lower the minimum weight to at most {1 / needed:.6g}."
            )
        room = float(np.where(self.usable, self.cap, 0.0).sum())
        if room < 1 - SLACK:
            caps = [f"'{name}' {cap:.4g}" for name, cap in zip(self.names, self.cap, strict=True)]
            raise InputError(
                f"the {what}s{where} can have {room:.6g} of the weight together, less than 1: at most {listed(caps)}, and none below the minimum weight "
                f"{self.minimum:.6g}. Allow more repetition or higher weights, or lower the minimum weight."
            )

    def draw(self, strength: float, random: np.random.Generator) -> Floats | None:
        """float64 [M]: drawn weights within all bounds, sum 1; None where this draw leads to none.

        Args:
            strength: the sum of the concentrations.
        """
        drawn = np.zeros(len(self.names))
        possible = self.prior > 0
        drawn[possible] = random.dirichlet(strength * self.prior[possible])
        if self.left_out:
            drawn[(random.random(len(drawn)) < self.left_out) & ~self.required] = 0.0
        return self.bounded(drawn) if drawn.any() else None

    def bounded(self, wanted: Floats) -> Floats | None:
        """float64 [M]: the weights nearest to ``wanted`` within all bounds; None where there are none.

        Args:
            wanted: float64 [M], not negative.
        """
        total = wanted.sum()
        wanted = wanted / total if total > 0 else wanted
        kept = self.required | ((wanted >= max(self.minimum, 1e-300)) & self.usable)
        # The largest first, and among those that were drawn as 0 those with the largest prior.
        order = np.lexsort((-self.prior, -wanted))
        while kept.sum() * self.minimum > 1 + SLACK:
            spare = [index for index in order if kept[index] and not self.required[index]]
            kept[spare[-1]] = False
        for index in order:
            if self.cap[kept].sum() >= 1 - SLACK:
                break
            kept[index] |= self.usable[index]
        floor = np.where(kept, np.minimum(self.minimum, self.cap), 0.0)
        cap = np.where(kept, self.cap, 0.0)
        if floor.sum() > 1 + SLACK or cap.sum() < 1 - SLACK:
            return None
        # What was drawn as 0, and kept all the same, takes its part in what the others cannot take.
        found = project_to_capped_simplex(np.where(kept, wanted, 0.0), floor, cap, self.names)
        return found / found.sum()


def largest_total(caps: Floats, required: Bools, minimum: float) -> float:
    """The largest weight that a source can have, so that its topics share it out within their caps.

    A topic takes part in a total W only if its cap is at least minimum x W, so a larger source has fewer topics.

    Args:
        caps: float64 [M], of the topics, as parts of the whole mixture.
        required: bool [M], those that take part in any case.
        minimum: of a topic, as a share of its source.
    """
    ordered = np.sort(caps[caps > 0])[::-1]
    if not ordered.size:
        return 0.0
    reach = ordered / minimum if minimum > 0 else np.full(ordered.size, np.inf)
    best = float(np.minimum(np.cumsum(ordered), reach).max())
    if required.any() and minimum > 0:
        best = min(best, float(caps[required].min()) / minimum)
    return min(best, 1.0)


def flattened(prior: Floats, temperature: float) -> Floats:
    """The shares to a power, scaled to sum 1; those of 0 stay 0."""
    powers = np.where(prior > 0, np.where(prior > 0, prior, 1.0) ** temperature, 0.0)
    return powers / powers.sum()


def strength_of(number: int, low: float, high: float) -> float:
    """Strength of a draw: even in the logarithm over any number of draws, and independent of that number (van der
    Corput's sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ...).

    Args:
        number: of the draw, from 0.
    """
    place, digit = 0.0, 0.5
    while number:
        place += digit * (number & 1)
        number >>= 1
        digit /= 2
    return float(low * (high / low) ** place)


def distance(weights: Floats, others: Floats) -> float:
    """The total variation distance of weights, float64 [K], to the nearest of others, [rows, K]; infinite where there
    are none."""
    return float((np.abs(others - weights).sum(axis=1) / 2).min(initial=np.inf))
