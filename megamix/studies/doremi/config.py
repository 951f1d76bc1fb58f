"""The config of ``megamix doremi``: a run's config, with the changes for each run under the key ``doremi``."""

from __future__ import annotations

from typing import Any

import pydantic

from megamix.core.config import Config


class DoremiStudyConfig(Config):
    """Keys of the runs that differ; no other command knows this key."""

    reference: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of the reference run that differ. Its mixer is static; its weights are ``mixture``."""
    proxy: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of the proxy run that differ. Its domains are sampled uniformly unless a mixture stands here; its mixer is
    doremi, whose keys may stand here. With mixer.reference (a cache, or null) there is no reference run and no cache of
    its losses."""
    target: dict[str, Any] | None = None
    """Keys of the target run that differ, {} for none; null: no target run. Its mixture is the weights found."""
    rounds: int = pydantic.Field(default=1, ge=1)
    """Rounds at most; each takes the result of the one before as reference weights."""
    tolerance: float = pydantic.Field(default=1e-3, gt=0)
    """A round that changes no weight by more than this is the last."""
