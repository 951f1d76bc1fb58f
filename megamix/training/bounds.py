"""The kinds of bounds of weights: numbers, or a factor around what a swarm proposes.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import ByKey, Config
from megamix.core.errors import InputError, did_you_mean
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.source_bounds import SourceBound
from megamix.mixing.sources import source_of
from megamix.mixing.weight_files import read_swarm_weights

Floats = NDArray[np.float64]
Names = tuple[str, ...]


def bound_sources(value: object, names: Names) -> dict[str, float]:
    """The bounds in ``value`` that are of a source, not of a domain: {source: number}."""
    if not isinstance(value, Mapping):
        return {}
    sources = {source_of(name) for name in names if name != source_of(name)} - set(names)
    return {name: number for name, number in value.items() if name in sources}


def read_source_bounds(least: object, largest: object, names: Names) -> tuple[SourceBound, ...]:
    """The bounds of sources in the values of ``data.min_weight`` and ``data.max_weight``.

    Raises:
        InputError: a number out of range.
    """
    low, high = bound_sources(least, names), bound_sources(largest, names)
    for key, given in (("min_weight", low), ("max_weight", high)):
        for name, number in given.items():
            if not 0 <= number <= 1:
                raise InputError(f"data.{key} of source '{name}' is {number}, expected a number from 0 to 1.")
    return tuple(
        SourceBound(
            source,
            np.array([k for k, name in enumerate(names) if name != source and source_of(name) == source], np.int64),
            float(low.get(source, 0.0)),
            float(high.get(source, 1.0)),
        )
        for source in dict.fromkeys((*low, *high))
    )


def read_bounds(key: str, value: float | Mapping[str, float], names: Names, default: float) -> Floats:
    """float64 [K]: ``value`` of the key ``data.KEY``; ``default`` for domains that a mapping leaves out. Sources in it
    are passed over, see `read_source_bounds`.

    Raises:
        InputError: an unknown domain, or a number out of range.
    """
    given = dict(value) if isinstance(value, Mapping) else dict.fromkeys(names, value)
    if key != "max_epochs":
        for source in bound_sources(value, names):
            del given[source]
    known = set(names)
    for name, number in given.items():
        if name not in known:
            raise InputError(f"data.{key}: there is no domain '{name}'." + did_you_mean(name, names))
        low, high = (0.0, np.inf) if key == "max_epochs" else (0.0, 1.0)
        if not low <= number <= high or (key == "max_epochs" and number == 0):
            where = f" of domain '{name}'" if isinstance(value, Mapping) else ""
            wanted = "a number above 0" if key == "max_epochs" else "a number from 0 to 1"
            raise InputError(f"data.{key}{where} is {number}, expected {wanted}.")
    return np.array([given.get(name, default) for name in names], np.float64)


@dataclass(frozen=True)
class GivenBound:
    """A bound of the weights: one number for all domains, or {domain or source: number}."""

    value: float | dict[str, float]

    def describe(self) -> str:
        """The bound in words."""
        return str(self.value)

    def resolve(self, key: str, names: Names, default: float) -> Floats:
        """float64 [K]; see `read_bounds`."""
        return read_bounds(key, self.value, names, default)

    def fingerprint(self, names: Names, resolved: Floats) -> object:
        """What must not change on resume, JSON-serialisable."""
        return self.value


class SwarmBound(Config):
    """Bounds around a mixture that `megamix swarm propose` has found."""

    from_swarm: Path
    """The swarm's directory; its domains must be those of this run."""
    factor: float = pydantic.Field(ge=0, allow_inf_nan=False)
    """The bound of a domain is this many times its weight there, 1 at most; so 2 for max_weight, or 0.5 for
    min_weight, keeps weights within a factor of 2 of the mixture."""

    def describe(self) -> str:
        return f"{self.factor:g} times what the swarm {self.from_swarm} proposes"

    def resolve(self, key: str, names: Names, default: float) -> Floats:
        source = f"data.{key}, proposed by the swarm {self.from_swarm}"
        proposed = normalise_weights(read_swarm_weights(self.from_swarm), names, source)
        return np.minimum(self.factor * proposed, 1.0)

    def fingerprint(self, names: Names, resolved: Floats) -> object:
        """The numbers rather than the path, as for a mixture."""
        return dict(zip(names, resolved.tolist(), strict=True))


BoundConfig = Annotated[
    float | dict[str, float] | SwarmBound,
    ByKey({"from_swarm": SwarmBound}, mapping=dict[str, float], plain=float),
]


def bound_of(value: float | dict[str, float] | SwarmBound) -> GivenBound | SwarmBound:
    """The kind of a value of ``data.min_weight`` or ``data.max_weight``."""
    return value if isinstance(value, SwarmBound) else GivenBound(value)
