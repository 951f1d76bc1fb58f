"""The weights a run starts from: one mixture, or several, each from a stated number of tokens on.

Legend: K domains, M stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightSchedule:
    """Piecewise constant weights over the steps of a run.

    Attributes:
        steps: the step, counted from 0, that each of the M stages starts with; the first is 0, and they rise.
        weights: float64 [M, K], each row sums to 1.
    """

    steps: tuple[int, ...]
    weights: Floats

    def at(self, step: int) -> Floats:
        """float64 [K]: the weights of ``step``."""
        return self.weights[np.searchsorted(self.steps, step, "right") - 1]

    def changes_at(self, step: int) -> bool:
        """Whether a later stage than the first starts with ``step``."""
        return step in self.steps[1:]
