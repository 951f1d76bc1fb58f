"""Segment: a range of positions with constant weights, and the state at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """Range of positions with constant weights.

    Attributes:
        start: its first position.
        weights: float64 [K], sum 1.
        deficits: float64 [K], in samples, at ``start``: the sum of each weight over all earlier positions (since the
            domain joined) minus the samples given.
        counts: int64 [K], the samples each domain gave before ``start``.

    Raises:
        InputError: the lengths differ.
    """

    start: int
    weights: Floats
    deficits: Floats
    counts: Ints

    def __post_init__(self) -> None:
        shapes = self.weights.shape, self.deficits.shape, self.counts.shape
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise InputError(
                f"the segment at position {self.start} has weights, deficits and counts of shapes {shapes}, expected"
                " one number each for every domain. Use a record that was written whole."
            )

    def then(self, position: int, counts: Ints, weights: Floats) -> Segment:
        """The next segment, with ``weights`` from ``position`` on, before which the domains gave ``counts``."""
        deficits = self.deficits + self.weights * float(position - self.start) - (counts - self.counts)
        return Segment(position, weights, deficits, counts)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; floats keep every bit through JSON."""
        return {
            "start": self.start,
            "weights": self.weights.tolist(),
            "deficits": self.deficits.tolist(),
            "counts": self.counts.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        """The segment that `to_json` wrote."""
        return cls(
            int(data["start"]),
            np.asarray(data["weights"], np.float64),
            np.asarray(data["deficits"], np.float64),
            np.asarray(data["counts"], np.int64),
        )
