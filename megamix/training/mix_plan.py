"""What a mixture comes to over a run: how much of each domain is read, how often, and what of that is to be warned of.

Needs no data, only the number of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megamix.constraints import Constraints
from megamix.errors import InputError, did_you_mean
from megamix.mixture import WeightSchedule, make_schedule
from megamix.run_config import MixConfig

Floats = NDArray[np.float64]
MANY_EPOCHS = 4.0
"""More repetitions than this of a domain are worth a warning: up to about 4, repeated data is nearly as good as new
(Muennighoff et al., 2023)."""


@dataclass(frozen=True)
class MixPlan:
    """The mixture of a run, resolved for K domains.

    Attributes:
        domain_names: in the order of every array with one entry a domain.
        num_samples: int64 [K], training windows per domain and epoch.
        natural_weights: float64 [K], shares of the training tokens.
        schedule: the weights that ``mixture`` asks for, before the constraints.
        constraints: what bounds every mixer's weights.
    """

    config: MixConfig
    domain_names: tuple[str, ...]
    num_samples: NDArray[np.int64]
    natural_weights: Floats
    schedule: WeightSchedule
    constraints: Constraints

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.config.train.steps * self.config.train.global_batch

    @cached_property
    def initial_weights(self) -> Floats:
        """float64 [K]: sampled with from the first step on, after the constraints."""
        return self.constraints.apply(self.schedule.at(0), np.zeros(len(self.domain_names)), 0)

    @cached_property
    def planned_samples(self) -> Floats:
        """float64 [K]: what the run takes from each domain if no mixer changes the weights."""
        counts = np.zeros(len(self.domain_names))
        batch, ends = self.config.train.global_batch, (*self.schedule.steps[1:], self.config.train.steps)
        for start, end in zip(self.schedule.steps, ends, strict=True):
            weights = self.constraints.apply(self.schedule.at(start), counts, start * batch)
            counts = counts + weights * ((end - start) * batch)
        return counts

    @property
    def epochs(self) -> Floats:
        """float64 [K]: how often each domain is read if no mixer changes the weights."""
        return self.planned_samples / self.num_samples

    def warnings(self) -> list[str]:
        """Things that will work and are probably not meant."""
        found = []
        weights = self.planned_samples / self.total_samples
        used_up = self.epochs > self.constraints.max_epochs * (1 + 1e-9)
        for name, epochs, weight, limit, over in zip(
            self.domain_names, self.epochs, weights, self.constraints.max_epochs, used_up, strict=True
        ):
            if over and self.config.data.on_exhausted == "stop":
                step = int(self.config.train.steps * limit / epochs)
                found.append(
                    f"domain '{name}': weight {weight:.4f} reads it {epochs:.1f} times, so the run will stop near step "
                    f"{step} of {self.config.train.steps}, after data.max_epochs {limit:g}."
                )
            elif over:
                found.append(
                    f"domain '{name}': weight {weight:.4f} reads it {epochs:.1f} times, beyond data.max_epochs {limit:g}, "
                    "because data.on_exhausted is repeat."
                )
            elif epochs > MANY_EPOCHS:
                found.append(
                    f"domain '{name}': weight {weight:.4f} reads it {epochs:.1f} times; more than {MANY_EPOCHS:g} epochs add little. "
                    "Lower its weight or set data.max_epochs."
                )
        return found


def planned_mix(config: MixConfig) -> MixPlan | None:
    """The mixture of a run whose data is not there, by ``data.token_counts``; None where that is not given.

    Raises:
        InputError: a domain that is not in ``token_counts`` or has less than one sample there, and whatever a mixture
            or constraint can be refused for.
    """
    counts = config.data.token_counts
    if counts is None:
        return None
    names = tuple(counts) if config.data.domains is None else config.data.domains
    for name in names:
        if name not in counts:
            raise InputError(f"data.domains: data.token_counts has no domain '{name}'." + did_you_mean(name, counts))
    tokens = np.array([counts[name] for name in names], np.float64)
    length = config.data.seq_length
    for name, number in zip(names, tokens, strict=True):
        if not length + 1 <= number < np.inf:
            raise InputError(
                f"data.token_counts: domain '{name}' has {number:g} tokens, and one sample of seq_length {length} needs "
                f"{length + 1}. Correct the number."
            )
    num_samples = ((tokens - 1) // length).astype(np.int64)
    natural = tokens / tokens.sum()
    total_samples = config.train.steps * config.train.global_batch
    return MixPlan(
        config, names, num_samples, natural,
        schedule=make_schedule(config, names, natural),
        constraints=Constraints.of(config.data, names, num_samples, total_samples),
    )  # fmt: skip
