"""Options of a swarm's mixtures. Names and defaults are Olmix's where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from megamix.core.config import Config

Strength = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class GenerateConfig(Config):
    """The members of a swarm. A domain named `source:topic` belongs to a source; any other is a source of its own.

    The weights of a member are those of its sources times those of the topics in their source; each is drawn from a
    Dirichlet distribution around the prior.
    """

    members: int | None = pydantic.Field(default=None, gt=0, le=100_000)
    """Number of mixtures, the prior included. Default: 5 per domain whose weight is free, at least 16. A larger number
    keeps the first ones as they are."""
    seed: int = pydantic.Field(default=42, ge=0)
    """Seed of the draws."""
    include_prior: bool = True
    """Make the prior the first member. Every proposal is compared with it, best by a measured value."""
    min_strength: Strength = 0.1
    """Smallest strength, the sum of the Dirichlet concentrations. Members' strengths are spaced evenly in their
    logarithm up to the largest; with a small one few domains have all the weight, with a large one members are near the
    prior."""
    max_strength: Strength = 5.0
    """Largest strength; see min_strength."""
    min_source_strength: Strength | None = None
    """For sources; default: min_strength."""
    max_source_strength: Strength | None = None
    """For sources; default: max_strength."""
    min_topic_strength: Strength | None = None
    """For topics in their source; default: min_strength."""
    max_topic_strength: Strength | None = None
    """For topics in their source; default: max_strength."""
    minimum_weight: Share = 0.002
    """Smallest weight but 0; smaller ones become 0 and the others rise in proportion."""
    minimum_source_weight: Share | None = None
    """For sources; default: minimum_weight."""
    minimum_topic_weight: Share | None = None
    """For topics, as a share of their source; default: minimum_weight."""
    mix_temperature: Strength = 1.0
    """Power on the shares of the prior: below 1 it becomes flatter, above 1 steeper."""
    source_mix_temperature: Strength | None = None
    """For sources; default: mix_temperature."""
    topic_mix_temperature: Strength | None = None
    """For topics in their source; default: mix_temperature."""
    nonzero_weight: tuple[str, ...] = ()
    """Domains or sources with at least the minimum weight in every member."""
    manual_prior: dict[str, Share] = pydantic.Field(default={})
    """{source: share} instead of the prior's; all are then scaled to sum 1."""
    manual_topic_prior: dict[str, Share] = pydantic.Field(default={})
    """{source:topic: share of its source} instead of the prior's; a source's are then scaled to sum 1."""
    fixed_source_weights: dict[str, Share] = pydantic.Field(default={})
    """{source: weight} in every member; the other sources share what is left."""
    fixed_topic_weights: dict[str, Share] = pydantic.Field(default={})
    """{source:topic: share of its source} in every member, for all topics of a source: Olmix's `weight` of a topic."""
    max_weight: dict[str, Share] = pydantic.Field(default={})
    """{domain or source: largest weight in a member}."""
    repetition: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """Times that a domain may be read: weight x repetition_tokens <= repetition x tokens of the domain. Default: no
    limit. Olmix's allow_repetition: false is 1."""
    repetition_tokens: Literal["member", "target"] | Annotated[float, pydantic.Field(gt=0)] = "member"
    """Tokens of the run: member, a proxy's; target, those of the run that the swarm is for; or a number."""
    support: Literal["threshold", "dense", "sparse"] = "threshold"
    """Domains with a weight. threshold: those drawn above the minimum weight; dense: all; sparse: of those a random
    part of the topics (of the sources, where there are no topics)."""
    left_out: Share = 0.5
    """sparse only: probability that a domain has no weight in a member."""
    min_distance: float = pydantic.Field(default=0.01, ge=0, lt=1)
    """Smallest total variation distance (half the sum of the differences) between members."""
    existing_mix_file: Path | None = None
    """A ratios.csv; members keep that distance from its rows, too."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> GenerateConfig:
        for level in ("source", "topic"):
            low, high = self.strengths(level)
            if low > high:
                raise ValueError(
                    f"the smallest strength of a {level} is {low:g}, above the largest, {high:g}. Swap them."
                )
        return self

    def strengths(self, level: str) -> tuple[float, float]:
        """The smallest and the largest of a level, ``source`` or ``topic``."""
        low, high = getattr(self, f"min_{level}_strength"), getattr(self, f"max_{level}_strength")
        return (self.min_strength if low is None else low, self.max_strength if high is None else high)

    def minimum(self, level: str) -> float:
        """The smallest weight of a level that is not 0."""
        own = getattr(self, f"minimum_{level}_weight")
        return self.minimum_weight if own is None else own

    def temperature(self, level: str) -> float:
        """The power of the prior of a level."""
        own = getattr(self, f"{level}_mix_temperature")
        return self.mix_temperature if own is None else own
