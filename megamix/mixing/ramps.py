"""Ramps: weights that go from one mixture to another over a stretch of a run. Both steering and stages have them.

Legend: K domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RampShape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Ramp:
    """Way from the weights of one position to others, over ``samples`` samples.

    Attributes:
        origin: float64 [K], the weights at ``start``.
        shape: linear, or cosine: half a wave, level at both ends.
    """

    start: int
    samples: float
    origin: Floats
    shape: RampShape = "linear"

    def share(self, position: float) -> float:
        """The part of the way that is done at ``position``, 0 to 1."""
        done = min(max((position - self.start) / self.samples, 0.0), 1.0)
        return done if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done))

    def towards(self, target: Floats, position: float) -> Floats:
        """float64 [K]: the weights at ``position`` on the way to ``target``; each lies between its two ends."""
        return self.after(self.share(position), target)

    def after(self, share: float, target: Floats) -> Floats:
        """float64 [K]: the weights once a share of the way to ``target`` is done."""
        return (1 - share) * self.origin + share * target
