"""What a mixture comes to over a run: how much of each domain is read, how often, and what of that is to be warned of.

Needs no data, only the number of its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, did_you_mean
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.weight_files import read_swarm_weights, read_weights
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.config import (
    DataConfig,
    FileMixture,
    MixConfig,
    OneMixture,
    RunMixture,
    StagedMixture,
    SwarmBound,
    SwarmMixture,
)
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun

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
        policy: which weights hold where, by ``mixture`` and constraints.
    """

    config: MixConfig
    domain_names: tuple[str, ...]
    num_samples: NDArray[np.int64]
    natural_weights: Floats
    policy: WeightPolicy

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.policy.constraints.total_samples

    @property
    def epochs(self) -> Floats:
        """float64 [K]: how often each domain is read if no mixer changes the weights."""
        return self.policy.planned_samples / self.num_samples

    def warnings(self) -> list[str]:
        """Things that will work and are probably not meant."""
        found = []
        weights, limits = self.policy.planned_samples / self.total_samples, self.policy.constraints.max_epochs
        used_up = self.epochs > limits * (1 + 1e-9)
        for name, epochs, weight, limit, over in zip(
            self.domain_names, self.epochs, weights, limits, used_up, strict=True
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
    return MixPlan(config, names, num_samples, natural, make_policy(config, names, num_samples, natural))


def make_policy(
    config: MixConfig, names: tuple[str, ...], num_samples: NDArray[np.int64], natural: Floats
) -> WeightPolicy:
    """The weight policy of a run of K domains; see `MixPlan` for the arrays.

    Raises:
        InputError: see `read_stages` and `read_constraints`.
    """
    train = config.train
    stages = read_stages(config, names, natural)
    constraints = read_constraints(config.data, names, num_samples, train.steps * train.global_batch)
    return WeightPolicy(stages, constraints, train.global_batch, config.data.weight_lag)


def read_stages(config: MixConfig, names: tuple[str, ...], natural: Floats) -> Stages:
    """Resolves ``mixture``.

    A stage starts with the first step that begins at or after its ``from_tokens``.

    Raises:
        InputError: an unknown or missing domain, a weight that is none, a run without weights, or stages that do not
            rise from 0.
    """
    if not isinstance(config.mixture, StagedMixture):
        return Stages((0,), _weights(config.mixture, names, natural, "mixture")[None])
    stages = config.mixture.stages
    tokens_per_step = config.train.global_batch * config.data.seq_length
    starts = [stage.from_tokens for stage in stages]
    if not stages or starts[0] != 0:
        first = f"starts at {starts[0]:g} tokens" if stages else "is missing"
        raise InputError(f"mixture.stages: the first stage {first}, expected from_tokens: 0.")
    steps = [-int(-start // tokens_per_step) for start in starts]
    for number in range(1, len(stages)):
        if steps[number] <= steps[number - 1]:
            raise InputError(
                f"mixture.stages: stage {number + 1} starts at {starts[number]:g} tokens and the one before it at "
                f"{starts[number - 1]:g}, which is not a step of {tokens_per_step} tokens earlier. Give stages in rising order."
            )
        if steps[number] >= config.train.steps:
            raise InputError(
                f"mixture.stages: stage {number + 1} starts at {starts[number]:g} tokens, but the run ends after "
                f"{config.train.steps * tokens_per_step} ({config.train.steps} steps). Leave the stage out or train longer."
            )
    rows = [
        _weights(stage.weights, names, natural, f"mixture.stages, stage {number}")
        for number, stage in enumerate(stages, start=1)
    ]
    return Stages(tuple(steps), np.stack(rows))


def _weights(mixture: OneMixture, names: tuple[str, ...], natural: Floats, source: str) -> Floats:
    if mixture == "natural":
        return natural
    if mixture == "uniform":
        return np.full(len(names), 1 / len(names))
    if isinstance(mixture, FileMixture):
        return normalise_weights(read_weights(mixture.file, names), names, f"{source}, file {mixture.file}")
    if isinstance(mixture, RunMixture):
        found = run_weights(RecordedRun.open(mixture.from_run), mixture.which)
        return normalise_weights(found, names, f"{source}, {mixture.which} weights of the run {mixture.from_run}")
    if isinstance(mixture, SwarmMixture):
        found = read_swarm_weights(mixture.from_swarm)
        return normalise_weights(found, names, f"{source}, proposed by the swarm {mixture.from_swarm}")
    assert isinstance(mixture, dict)
    return normalise_weights(mixture, names, source)


def _per_domain(
    key: str, value: float | Mapping[str, float] | SwarmBound | None, names: tuple[str, ...], default: float
) -> Floats:
    """``value`` as float64 [K]; domains that a mapping leaves out have ``default``."""
    if value is None:
        return np.full(len(names), default)
    if isinstance(value, SwarmBound):
        source = f"data.{key}, proposed by the swarm {value.from_swarm}"
        proposed = normalise_weights(read_swarm_weights(value.from_swarm), names, source)
        return np.minimum(value.factor * proposed, 1.0)
    given = value if isinstance(value, Mapping) else dict.fromkeys(names, value)
    for name, number in given.items():
        if name not in names:
            raise InputError(f"data.{key}: there is no domain '{name}'." + did_you_mean(name, names))
        low, high = (0.0, np.inf) if key == "max_epochs" else (0.0, 1.0)
        if not low <= number <= high or (key == "max_epochs" and number == 0):
            where = f" of domain '{name}'" if isinstance(value, Mapping) else ""
            wanted = "a number above 0" if key == "max_epochs" else "a number from 0 to 1"
            raise InputError(f"data.{key}{where} is {number}, expected {wanted}.")
    return np.array([given.get(name, default) for name in names], np.float64)


def read_constraints(
    config: DataConfig, names: tuple[str, ...], num_samples: NDArray[np.int64], total_samples: int
) -> Constraints:
    """The constraints of a config; a run can keep them.

    Raises:
        InputError: an unknown domain, a value out of range, or bounds that no weights satisfy.
    """
    found = Constraints(
        names,
        num_samples,
        total_samples,
        floor=_per_domain("min_weight", config.min_weight, names, 0.0),
        cap=_per_domain("max_weight", config.max_weight, names, 1.0),
        max_epochs=_per_domain("max_epochs", config.max_epochs, names, np.inf),
        on_exhausted=config.on_exhausted,
    )
    found.check()
    return found
