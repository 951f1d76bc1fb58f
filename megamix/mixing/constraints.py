"""Constraints of a run's weights: bounds, epochs, and the policy for a domain that is used up.

The weights of any mixer are projected onto floor <= w <= cap with sum 1 (`project_to_capped_simplex`), where the cap of
a domain falls as it is used up:

    cap_i = min(max_weight_i, (max_epochs_i * samples_i - given_i) / samples left in the run)

Where sources have bounds of their own, the sum of their domains' weights is held within these, too
(`megamix.mixing.source_bounds`).

A domain that is sampled at no more than its cap keeps or raises the cap, so constraints that can be met at the start
can be met to the end, up to the K samples by which the blend's whole samples differ from its weights.

Weights from the end of the run on are recorded, may be the mixture of another run, and are sampled if this one is made
longer. No samples are left there to divide by, so the cap is that of the whole run: max_epochs_i * samples_i / samples
of the run.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.core.errors import InputError
from megamix.core.text import listed
from megamix.mixing.mixers import project_to_capped_simplex
from megamix.mixing.source_bounds import SourceBound, check_sources, project_within_sources, room

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Constraints:
    """The bounds of a run's weights.

    Attributes:
        names: the K domains.
        num_samples: int64 [K], training samples per domain and epoch.
        total_samples: samples of the whole run.
        floor, cap: float64 [K], ``min_weight`` and ``max_weight``.
        max_epochs: float64 [K], infinite by default.
        on_exhausted: cap, repeat or stop.
        more: where earlier steps of the run had samples of another length: by how many samples of today's length its
            tokens are more than the samples that it counts.
        sources: bounds on the summed weights of a source's domains.
    """

    names: tuple[str, ...]
    num_samples: Ints
    total_samples: int
    floor: Floats
    cap: Floats
    max_epochs: Floats
    on_exhausted: str
    more: int = 0
    sources: tuple[SourceBound, ...] = ()

    @property
    def limits(self) -> Ints | None:
        """int64 [K]: samples of each domain after which the run stops; None where it does not stop for that."""
        if self.on_exhausted != "stop":
            return None
        allowed = self.max_epochs * self.num_samples
        return np.where(np.isfinite(allowed), np.minimum(allowed, 2.0**62), 2.0**62).astype(np.int64)

    @cached_property
    def trivial(self) -> bool:
        """Whether every mixture is allowed."""
        unbounded = not self.floor.any() and bool((self.cap >= 1.0).all()) and not self.sources
        return unbounded and not self.depends_on_length

    @cached_property
    def depends_on_length(self) -> bool:
        """Whether the allowed weights depend on the samples of the whole run: epochs bound them."""
        return self.on_exhausted == "cap" and bool(np.isfinite(self.max_epochs).any())

    def apply(self, weights: Floats, counts: ArrayLike, position: float) -> Floats:
        """The allowed weights nearest to ``weights`` (float64 [K]) from ``position`` on.

        Args:
            counts: [K], samples taken from each domain before ``position``.
            position: where the weights take effect.
        """
        if self.trivial:
            return weights
        cap = np.minimum(self.cap, self._caps_by_epochs(np.asarray(counts, np.float64), position))
        # Counts are whole and weights are not: near the end the caps of a run that uses everything up may sum to a
        # little under 1, and a cap may fall below the floor of a domain that has given its share. What is missing goes
        # to the domains that were asked for.
        wanted_cap = np.where(weights > 0, cap, np.minimum(self.floor, cap))
        for source in self.sources:  # one that must have more than was asked for
            if wanted_cap[source.members].sum() < source.low:
                wanted_cap[source.members] = cap[source.members]
        total = room(wanted_cap, self.sources)
        fits_at_first = room(np.where(weights > 0, self.cap, self.floor), self.sources) >= 1.0
        ahead = self.total_samples - position if position < self.total_samples else self.total_samples
        if fits_at_first and total > 0 and (1.0 - total) * ahead <= len(self.names):
            cap = wanted_cap
        total = room(cap, self.sources)
        cap = np.minimum(cap / min(1.0, total), 1.0) if total > 0 else self.cap
        floor = np.minimum(self.floor, cap)
        if not self.sources:
            return project_to_capped_simplex(weights, floor, cap, self.names)
        return project_within_sources(weights, floor, cap, self._sources_within(floor, cap, total), self.names)

    def _sources_within(self, floor: Floats, cap: Floats, total: float) -> list[SourceBound]:
        """The sources, their bounds given way to what is left of their domains, as those of domains are."""
        found = []
        for source in self.sources:
            high = max(source.high / min(1.0, total) if total > 0 else 1.0, float(floor[source.members].sum()))
            found.append(replace(source, low=min(source.low, float(cap[source.members].sum())), high=min(high, 1.0)))
        return found

    def _caps_by_epochs(self, counts: Floats, position: float) -> Floats:
        if self.on_exhausted != "cap":
            return np.ones(len(self.names))
        allowed, ahead = self.max_epochs * self.num_samples, self.total_samples - position
        if ahead <= 0:
            return np.minimum(allowed / self.total_samples, 1.0)
        return np.minimum(np.maximum(allowed - counts, 0.0) / ahead, 1.0)

    def check_from(self, counts: ArrayLike, position: int) -> None:
        """Checks that the rest of a run that was changed under way can be sampled within the bounds.

        Args:
            counts: [K], samples taken from each domain before ``position``.

        Raises:
            InputError: it cannot.
        """
        ahead = self.total_samples - position
        if self.trivial or ahead <= 0:
            return
        available = self._available(np.asarray(counts, np.float64), ahead)
        # Whole samples, or independent draws, differ from the weights.
        if available < 0.99 * ahead - len(self.names):
            raise InputError(
                f"the run goes on for {ahead} samples after {position}, but of these {self._which_allow} {available:.0f}. "
                "Allow more, train for fewer steps, or add data."
            )

    def check_without(self, left_out: Sequence[str]) -> None:
        """Checks that the bounds can be met by the other domains alone.

        Args:
            left_out: domains whose weight is 0 in the mixture.

        Raises:
            InputError: they cannot.
        """
        if not left_out:
            return
        out = set(left_out)
        cap = np.array([0.0 if name in out else high for name, high in zip(self.names, self.cap, strict=True)])
        try:
            replace(self, cap=cap).check()
        except InputError as error:
            raise InputError(f"without {listed(left_out)}, of weight 0 in the mixture: {error}") from error

    def check(self) -> None:
        for name, low, high in zip(self.names, self.floor, self.cap, strict=True):
            if low > high:
                raise InputError(
                    f"domain '{name}': data.min_weight {low:g} is above data.max_weight {high:g}. Change one of them."
                )
        if self.floor.sum() > 1 + 1e-9:
            raise InputError(
                f"data.min_weight sums to {self.floor.sum():.6g} over {len(self.names)} domains, more than 1. Lower it "
                f"to at most {1 / len(self.names):.6g} for all."
            )
        if self.cap.sum() < 1 - 1e-9:
            raise InputError(
                f"data.max_weight sums to {self.cap.sum():.6g} over {len(self.names)} domains, less than 1: they cannot "
                f"fill the mixture. Raise it to at least {1 / len(self.names):.6g} for all."
            )
        check_sources(self.floor, self.cap, self.sources)
        if np.isinf(self.max_epochs).all():
            if self.on_exhausted == "stop":
                raise InputError(
                    "data.on_exhausted is stop, but data.max_epochs does not say when a domain is used up. "
                    "Set it, for example data.max_epochs=1."
                )
            return
        if self.on_exhausted == "cap":
            self._check_epochs()

    def _check_epochs(self) -> None:
        allowed, asked = self.max_epochs * self.num_samples, self.total_samples + self.more
        for name, least, most, epochs, weight in zip(
            self.names, self.floor * asked, allowed, self.max_epochs, self.floor, strict=True
        ):
            if least > most + 1:
                raise InputError(
                    f"domain '{name}': data.min_weight {weight:g} asks for {least:.0f} samples of the run's "
                    f"{asked}, but data.max_epochs {epochs:g} allows {most:.0f}. Lower the one or raise the other."
                )
        for source in self.sources:
            least, most = source.low * asked, float(allowed[source.members].sum())
            if least > most + 1:
                raise InputError(
                    f"source '{source.name}': data.min_weight {source.low:g} asks for {least:.0f} samples of the run's {asked}, but "
                    f"data.max_epochs allows {most:.0f} of its domains. Lower the one or raise the other."
                )
        available = self._available(np.zeros(len(self.names)), asked)
        if available < asked - 1e-6 * asked:
            raise InputError(
                f"{self._which_allow} {available:.0f} samples of the {len(self.names)} domains together, but train.steps x "
                f"train.global_batch asks for {asked}. Allow more epochs, train for fewer steps, or add data."
            )

    def _available(self, counts: Floats, ahead: int) -> float:
        """The most samples of ``ahead`` that all domains may give together once they have given ``counts``."""
        most = self.cap * ahead
        if self.on_exhausted == "cap":
            most = np.minimum(most, np.maximum(self.max_epochs * self.num_samples - counts, 0.0))
        return room(most, self.sources, ahead)

    @property
    def _which_allow(self) -> str:
        epochs = np.unique(self.max_epochs)
        if epochs.size == 1 and (self.cap >= 1).all():
            return f"data.max_epochs {epochs[0]:g} allows"
        return "data.max_epochs and data.max_weight allow"
