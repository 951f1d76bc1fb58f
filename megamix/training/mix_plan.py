"""Resolved mixture of a run: samples and epochs of each domain, and warnings. Needs token counts, no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, did_you_mean
from megamix.data.tokens.manifest import DomainEntry
from megamix.mixing.constraints import Constraints
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.bounds import bound_of, read_bounds, read_source_bounds
from megamix.training.config import DataConfig, MixConfig
from megamix.training.mixture import MixFrame, mixture_of
from megamix.training.objective import objective_weights
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun

Floats = NDArray[np.float64]
MANY_EPOCHS = 4.0
"""More epochs of a domain than this give a warning: up to about 4, repeated data is nearly as good as new
(Muennighoff et al., 2023)."""


@dataclass(frozen=True)
class MixPlan:
    """Resolved mixture of a run of K domains.

    Attributes:
        domain_names: in the order of every array with one entry a domain.
        num_samples: int64 [K], training windows per domain and epoch.
        natural_weights: float64 [K], shares of the training tokens.
        objective_weights: float64 [K], of the domains in the objective loss; sum 1.
        policy: which weights hold where, by ``mixture`` and constraints.
    """

    config: MixConfig
    domain_names: tuple[str, ...]
    num_samples: NDArray[np.int64]
    natural_weights: Floats
    objective_weights: Floats
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
        """Settings that work and are probably not meant."""
        found = []
        constraints = self.policy.constraints
        weights, limits = self.policy.planned_samples / (self.total_samples + constraints.more), constraints.max_epochs
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
            elif epochs > MANY_EPOCHS * (1 + 1e-9):
                found.append(
                    f"domain '{name}': weight {weight:.4f} reads it {epochs:.1f} times; more than {MANY_EPOCHS:g} epochs add little. "
                    "Lower its weight or set data.max_epochs."
                )
        reached = self.policy.batches.sizes[-1][0] < self.config.train.steps
        if self.config.train.batch_ramp and not reached:
            found.append(
                f"train.batch_ramp ends after {self.config.train.batch_ramp[-1].until_tokens:,.0f} tokens and the run after "
                f"{self.policy.batches.tokens(self.config.train.steps):,}: it never has a train.global_batch of "
                f"{self.config.train.global_batch}. Train longer, or end the ramp earlier."
            )
        floor, wanted = self.policy.constraints.floor, self.policy.stages.weights
        for index in np.flatnonzero((wanted == 0).all(axis=0) & (floor > 0)).tolist():
            found.append(
                f"domain '{self.domain_names[index]}': weight 0 in the mixture leaves a domain out, but data.min_weight gives it "
                f"{floor[index]:g}. Leave it out of data.domains, or set its min_weight to 0."
            )
        return found


def planned_mix(config: MixConfig) -> MixPlan | None:
    """The mixture of a run whose data is not there, by ``data.token_counts``; None where that is not given.

    Raises:
        InputError: a domain that is not in ``token_counts`` or has less than one sample there, and errors
            of the mixture and the constraints.
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
    objective = objective_weights(config.objective, names, natural)
    return MixPlan(config, names, num_samples, natural, objective, make_policy(config, names, num_samples, natural))


def make_policy(
    config: MixConfig,
    names: tuple[str, ...],
    num_samples: NDArray[np.int64],
    natural: Floats,
    document_tokens: Floats | None = None,
) -> WeightPolicy:
    """The weight policy of a run of K domains; see `MixPlan` and `MixFrame` for the arrays.

    Raises:
        InputError: see `read_stages` and `read_constraints`.
    """
    stages = read_stages(config, names, num_samples, natural, document_tokens)
    total, batches = config.total_samples, config.batches
    # In samples of today's length, where earlier steps had others.
    more = batches.tokens_at(total) // batches.seq_length - total
    constraints = read_constraints(config.data, names, num_samples, total, more)
    policy = WeightPolicy(stages, constraints, config.batches, config.data.weight_lag)
    constraints.check_without(policy.left_out)
    return policy


def read_stages(
    config: MixConfig,
    names: tuple[str, ...],
    num_samples: NDArray[np.int64],
    natural: Floats,
    document_tokens: Floats | None = None,
) -> Stages:
    """Resolves ``mixture``; see `Mixture.resolve`, and `MixPlan` and `MixFrame` for the arrays."""
    frame = MixFrame(names, natural, num_samples, config.train.steps, config.batches, read_run, document_tokens)
    return mixture_of(config.mixture).resolve(frame)


def document_tokens(entries: Sequence[DomainEntry]) -> Floats:
    """float64 [K]: mean tokens of a training document, its end-of-document token included."""
    return np.array([entry.train.tokens / max(entry.train.documents, 1) for entry in entries], np.float64)


def read_run(run_dir: Path, which: str, finished: bool) -> dict[str, float]:
    """The weights of a run, `MixFrame.read_run`."""
    run = RecordedRun.open(run_dir)
    if finished and run.steps < run.config.train.steps:
        raise InputError(
            f"the run {run_dir} has trained {run.steps} of its {run.config.train.steps} steps, so its {which} weights are not yet those of "
            "the whole run. Let it finish first."
        )
    return run_weights(run, which)


def read_constraints(
    config: DataConfig, names: tuple[str, ...], num_samples: NDArray[np.int64], total_samples: int, more: int = 0
) -> Constraints:
    """The constraints of a config, see `Constraints`; a run can keep them.

    Raises:
        InputError: an unknown domain, a value out of range, or bounds that no weights satisfy.
    """
    found = Constraints(
        names,
        num_samples,
        total_samples,
        floor=bound_of(config.min_weight).resolve("min_weight", names, 0.0),
        cap=bound_of(config.max_weight).resolve("max_weight", names, 1.0),
        max_epochs=read_bounds("max_epochs", {} if config.max_epochs is None else config.max_epochs, names, np.inf),
        on_exhausted=config.on_exhausted,
        more=more,
        sources=read_source_bounds(config.min_weight, config.max_weight, names),
    )
    found.check()
    return found
