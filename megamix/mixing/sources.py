"""Weights by source and topic: a domain called ``source:topic`` is a topic of a source, any other a source of its own.

{web: {weight: 0.6, topics: {news: 3, forums: 1}}, code: 0.4}  ->  {web:news: 0.45, web:forums: 0.15, code: 0.4}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic

from megamix.core.config import ByKey, Config, validate
from megamix.core.errors import InputError

Weight = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class SourceConfig(Config):
    """A source, and how its weight is shared out."""

    weight: Weight
    """Of the source, beside the other sources and domains."""
    topics: Annotated[dict[str, Weight], pydantic.Field(min_length=1)]
    """{topic: weight in the source}, relative to each other; for all domains `source:topic` of the data."""

    @pydantic.model_validator(mode="after")
    def _shares_it_out(self) -> SourceConfig:
        if self.weight > 0 and not any(self.topics.values()):
            raise ValueError(
                f"the weights of its topics are all 0, but that of the source is {self.weight:g}. Give a topic a weight above 0, or "
                "the source the weight 0."
            )
        return self


WeightsBySource = dict[
    str, Annotated[float | SourceConfig, ByKey({"topics": SourceConfig}, mapping=SourceConfig, plain=float)]
]
"""{domain: weight}, with a `SourceConfig` in the place of a source's domains."""


def source_of(domain: str) -> str:
    """The source of a domain: its name up to the first colon."""
    return domain.split(":", 1)[0]


def is_source(value: object) -> bool:
    """Whether a value read from a file stands for a source."""
    return isinstance(value, Mapping) and isinstance(value.get("topics"), Mapping)


def weights_by_domain(weights: Mapping[str, Any], where: str) -> dict[str, Any]:
    """{domain: weight}, as given where no source is among ``weights``.

    Args:
        weights: numbers, `SourceConfig` or mappings that are one.
        where: the place of the weights, for messages.

    Raises:
        InputError: a source that cannot be used, or a domain given in two ways.
    """
    found: dict[str, Any] = {}
    for name, value in weights.items():
        source = validate(SourceConfig, value, f"{where}, source '{name}'") if is_source(value) else value
        parts = {name: value}
        if isinstance(source, SourceConfig):
            total = sum(source.topics.values()) or 1.0
            parts = {f"{name}:{topic}": source.weight * (part / total) for topic, part in source.topics.items()}
        for domain, weight in parts.items():
            if domain in found:
                raise InputError(
                    f"{where}: '{domain}' has a weight of its own and one as a topic of '{source_of(domain)}'. Give one of them."
                )
            found[domain] = weight
    return found
