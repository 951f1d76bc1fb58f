"""A swarm of four tiny proxies over three of the test domains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamix.core.config_files import merge
from megamix.training.config import KINDS

DOMAINS = ("code", "tables", "topics")
SWARM = {"generate": {"members": 4, "seed": 7, "min_strength": 2.0, "max_strength": 20.0}, "run": {"at_once": 2}}


def swarm_config(tiny_config: Callable[..., Path], *, swarm: dict[str, Any] | None = None, **sections: Any) -> Path:
    """The path of a config; ``swarm`` and the other sections are merged over it."""
    shared = {"data": {"domains": list(DOMAINS)}, "mixer": {"name": "static"}}
    return tiny_config(**merge({**shared, "swarm": merge(SWARM, swarm or {})}, sections, KINDS))
