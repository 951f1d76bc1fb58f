"""The objective of a run: what its model is to be good at, as weights of the domains in one loss.

    objective loss = sum over domains k of objective_k * loss_k          nats per token

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import ByKey
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.sources import WeightsBySource, weights_by_domain

Floats = NDArray[np.float64]
_Word = Literal["uniform", "natural"]


def _is_one(value: object) -> object:
    if isinstance(value, Mapping) or value in ("natural", "uniform"):
        return value
    raise ValueError(f"got {value!r}, expected natural, uniform or {{domain: weight}}.")


ObjectiveConfig = Annotated[
    _Word | WeightsBySource,
    ByKey({}, mapping=WeightsBySource, plain=_Word),
    pydantic.BeforeValidator(_is_one),
]
"""The key ``objective`` of a run."""


def objective_weights(objective: str | Mapping[str, Any], names: tuple[str, ...], natural: Floats) -> Floats:
    """float64 [K], sum 1: the weights that a config's ``objective`` gives the domains.

    Args:
        natural: float64 [K], shares of the training tokens.

    Raises:
        InputError: an unknown or missing domain, or weights that cannot be used.
    """
    if isinstance(objective, Mapping):
        return normalise_weights(weights_by_domain(objective, "objective"), names, "objective")
    return natural.copy() if objective == "natural" else np.full(len(names), 1 / len(names))


def objective_name(objective: str | Mapping[str, Any]) -> str:
    """A short name for tables and plots."""
    return objective if isinstance(objective, str) else "as given"


def weighted_loss(weights: Mapping[str, float], losses: Mapping[str, float | None]) -> float | None:
    """The sum of weight times loss; None where a domain of a weight above 0 has no loss."""
    counting = {name: weight for name, weight in weights.items() if weight > 0}
    found = [(weight, losses.get(name)) for name, weight in counting.items()]
    terms = [weight * loss for weight, loss in found if loss is not None]
    return sum(terms) if len(terms) == len(found) else None
