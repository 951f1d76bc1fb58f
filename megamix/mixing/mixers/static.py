"""The static mixer: the weights that were given, for the whole run."""

from __future__ import annotations

from typing import Literal

from megamix.core.config import Config
from megamix.mixing.mixers.base import Mixer
from megamix.mixing.mixers.weights import FloatArray


class StaticConfig(Config):
    """Weights that never change (``mixture`` says which they are)."""

    name: Literal["static"] = "static"
    """Which mixer this configures."""


class StaticMixer(Mixer):
    """Keeps the initial weights; what every online mixer is compared with."""

    name = "static"
    follows_objective = False

    def _new_weights(self, step: int) -> FloatArray | None:
        return None
