"""Every key that a config may have: a run's, and those of the studies."""

from __future__ import annotations

from megamix.core.config import Config
from megamix.studies.arena.config import ArenaConfig
from megamix.studies.doremi.config import DoremiStudyConfig
from megamix.studies.swarm.config import SwarmStudyConfig
from megamix.training.config import RunConfig

STUDIES: dict[str, type[Config]] = {"arena": ArenaConfig, "doremi": DoremiStudyConfig, "swarm": SwarmStudyConfig}
"""The config class at the key of each study."""


class AnyConfig(RunConfig):
    """A run's config with the keys of all studies; for help only, as each command knows one of them."""

    arena: ArenaConfig | None = None
    doremi: DoremiStudyConfig = DoremiStudyConfig()
    swarm: SwarmStudyConfig = SwarmStudyConfig()
