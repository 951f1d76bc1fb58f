"""The config of ``megamix swarm``: a run's config, with the swarm's under the key ``swarm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from megamix.core.config import IS_PATH, Config
from megamix.mixing.sources import WeightsBySource
from megamix.studies.swarm.fit.config import FitConfig
from megamix.studies.swarm.generate.config import GenerateConfig
from megamix.studies.swarm.propose.config import ProposeConfig, UpdateConfig


class LocalConfig(Config):
    """Members on this machine."""

    at_once: int | None = pydantic.Field(default=None, gt=0)
    """Members at a time. Default: as many as its GPUs, or its cores, are enough for."""


class MetricsConfig(Config):
    """Metrics collected from every run."""

    validation: bool = True
    """loss:DOMAIN, the validation loss of each domain at the end, in nats per token."""
    mean: bool = False
    """Also loss, the mean of these over the domains."""
    file: Annotated[str | None, IS_PATH] = None
    """A file of results in every run's directory, of any evaluation of yours: JSON {metric: number}, or CSV with the
    columns metric and value."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> MetricsConfig:
        if not (self.validation or self.mean or self.file):
            raise ValueError("no metric is collected. Set validation or mean to true, or name a file.")
        return self


class SwarmStudyConfig(Config):
    """Options of a swarm; no other command knows this key."""

    proxy: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of a run that differ in the proxies, for example {model: ..., train: {steps: 500}}. Their mixer is static;
    mixture and run_dir (RUN_DIR/runs/NNNN) are settled."""
    priors: Literal["natural"] | WeightsBySource | Path = "natural"
    """What members are drawn around: natural, each domain's share of the training tokens; {domain: share}, or by source
    as in a run's mixture ({web: {weight: 0.4, topics: {news: 3, forums: 1}}}); or a file of such shares, or with the
    keys token_counts and relative_sizes."""
    generate: GenerateConfig = GenerateConfig()
    """The mixtures of the members."""
    run: LocalConfig = LocalConfig()
    """Running them."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics collected from them."""
    fit: FitConfig = FitConfig()
    """The law."""
    propose: ProposeConfig = ProposeConfig()
    """The mixture that follows. Its target_tokens are those of the target run, where there is one and they are not
    given."""
    update: UpdateConfig | None = None
    """How the domains differ from those of an earlier mixture. With it only what the change touches is swarmed."""
    target: dict[str, Any] | None = None
    """Keys of a run with the proposed mixture that differ, {} for none; null: no target run."""
