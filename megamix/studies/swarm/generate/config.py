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

    members: int | None = pydantic.Field(default=None, gt=0)
    """Mixtures, the prior included. Default: 5 a domain whose weight is to be found, 16 at least. With more of
    them, and all else the same, the first ones stay as they are."""
    seed: int = pydantic.Field(default=42, ge=0)
    """Of the draws."""
    include_prior: bool = True
    """Whether the prior is the first member. Every proposal is compared with it, and a measured value is better than a
    predicted one."""
    min_strength: Strength = 0.1
    """Strengths of the members lie between min and max, evenly in their logarithm: the sum of the concentrations. At a
    small one few domains have all the weight, at a large one members are near the prior."""
    max_strength: Strength = 5.0
    """See min_strength."""
    min_source_strength: Strength | None = None
    """Of the sources; default: min_strength."""
    max_source_strength: Strength | None = None
    """Of the sources; default: max_strength."""
    min_topic_strength: Strength | None = None
    """Of the topics in their source; default: min_strength."""
    max_topic_strength: Strength | None = None
    """Of the topics in their source; default: max_strength."""
    minimum_weight: Share = 0.002
    """A weight is 0 or at least this; smaller ones become 0 and the others rise in proportion."""
    minimum_source_weight: Share | None = None
    """Of a source; default: minimum_weight."""
    minimum_topic_weight: Share | None = None
    """Of a topic, as a share of its source; default: minimum_weight."""
    mix_temperature: Strength = 1.0
    """Shares of the prior are raised to this power: below 1 it is flatter, above 1 steeper."""
    source_mix_temperature: Strength | None = None
    """Of the sources; default: mix_temperature."""
    topic_mix_temperature: Strength | None = None
    """Of the topics in their source; default: mix_temperature."""
    nonzero_weight: tuple[str, ...] = ()
    """Domains, or sources, that have at least the minimum weight in every member."""
    manual_prior: dict[str, Share] = pydantic.Field(default={})
    """{source: share} in place of that of the prior. All are scaled to sum 1 then."""
    manual_topic_prior: dict[str, Share] = pydantic.Field(default={})
    """{source:topic: share of its source} in place of that of the prior. Those of a source are scaled to sum 1 then."""
    fixed_source_weights: dict[str, Share] = pydantic.Field(default={})
    """{source: weight} in every member; the other sources share what is left."""
    fixed_topic_weights: dict[str, Share] = pydantic.Field(default={})
    """{source:topic: share of its source} in every member, for all topics of a source: Olmix's `weight` of a topic."""
    max_weight: dict[str, Share] = pydantic.Field(default={})
    """{domain or source: weight} that no member exceeds."""
    repetition: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """No domain is read more often than this: weight x repetition_tokens <= repetition x tokens of the domain. Default:
    as often as its weight asks. Olmix's allow_repetition: false is 1."""
    repetition_tokens: Literal["member", "target"] | Annotated[float, pydantic.Field(gt=0)] = "member"
    """Of which run: member, of a proxy; target, of the run that the swarm is for; or a number of tokens."""
    support: Literal["threshold", "dense", "sparse"] = "threshold"
    """Which domains have a weight. threshold: those drawn above the minimum weight; dense: all; sparse: of those a
    random part of the topics (of the sources, where there are no topics)."""
    left_out: Share = 0.5
    """Of sparse: the probability that a domain has no weight in a member."""
    min_distance: float = pydantic.Field(default=0.01, ge=0, lt=1)
    """Total variation distance, half the sum of the differences, that members keep from each other."""
    existing_mix_file: Path | None = None
    """A ratios.csv from whose rows they keep that distance, too."""

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
