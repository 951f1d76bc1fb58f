"""Which weights hold at a position of a run. Whoever sets a blend's weights asks here.

    initial weights, later stages, a mixer's update --wanted--> constraints --allowed--> blend, from a stated position

Legend: K domains, M stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.data.blend.blend import Blend, Sampling
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import DomainStats, Mixer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stages:
    """Weights that are constant over stretches of steps, before the constraints.

    Attributes:
        steps: the step, counted from 0, that each of the M stages starts with; the first is 0, and they rise.
        weights: float64 [M, K], each row sums to 1.
    """

    steps: tuple[int, ...]
    weights: Floats

    def at(self, step: int) -> Floats:
        """float64 [K]: the weights of ``step``."""
        return self.weights[np.searchsorted(self.steps, step, "right") - 1]

    def changes_at(self, step: int) -> bool:
        """Whether a later stage than the first starts with ``step``."""
        return step in self.steps[1:]


@dataclass(frozen=True)
class WeightPolicy:
    """The weights of a run: what is wanted, what is allowed, and from where on it holds.

    Stages hold until the mixer first changes the weights. Steps count from 0.

    Attributes:
        global_batch: samples per step.
        weight_lag: steps between the one whose statistics are used and the first with the new weights, not counting
            either.
    """

    stages: Stages
    constraints: Constraints
    global_batch: int
    weight_lag: int

    def effective_step(self, step: int) -> int:
        """The first step that is sampled with the weights that follow from ``step``."""
        return step + 1 + self.weight_lag

    def wanted(self, mixer: Mixer, stats: DomainStats, step: int) -> Floats | None:
        """Updates ``mixer`` with the sums of ``step``; returns the weights wanted from `effective_step` on, float64 [K]
        before the constraints, or None where nothing is to change."""
        weights = mixer.update(stats, step + 1)
        effective_step = self.effective_step(step)
        if not mixer.has_updated and self.stages.changes_at(effective_step):
            return self.stages.at(effective_step)
        return weights if mixer.changed_at(step + 1) else None

    def allowed(self, wanted: Floats, counts: ArrayLike, position: int) -> Floats:
        """float64 [K]: the weights that hold from ``position`` on where ``wanted`` (float64 [K]) are asked for.

        Args:
            counts: [K], samples taken from each domain before ``position``.
        """
        return self.constraints.apply(wanted, counts, position)

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """The domains of weight 0 in every stage, to which no bound gives more: it stays 0 under any mixer."""
        zero = (self.stages.weights == 0).all(axis=0) & (self.constraints.floor == 0)
        return tuple(name for name, is_zero in zip(self.constraints.names, zero, strict=True) if is_zero)

    @cached_property
    def initial_weights(self) -> Floats:
        """float64 [K]: the weights that hold from position 0 on."""
        return self.allowed(self.stages.at(0), np.zeros(self.constraints.num_samples.size), 0)

    def initial_blend(
        self,
        seed: int,
        domain_keys: Sequence[int],
        sampling: Sampling,
        through_step: int | None = None,
    ) -> Blend:
        """The blend at position 0, with the changes of the stages that start no later than ``through_step``.

        Default: those that start too early for `wanted` to return them.
        """
        last = self.weight_lag if through_step is None else through_step
        blend = Blend(
            self.constraints.num_samples, self.initial_weights, seed, domain_keys=domain_keys, sampling=sampling
        )
        for step in (step for step in self.stages.steps[1:] if step <= last):
            position = step * self.global_batch
            blend.set_weights(self.allowed(self.stages.at(step), blend.counts_at(position), position), at=position)
        return blend

    @cached_property
    def planned_samples(self) -> Floats:
        """float64 [K]: the samples that the run takes from each domain if no mixer changes the weights."""
        counts = np.zeros(self.constraints.num_samples.size)
        starts = [step * self.global_batch for step in self.stages.steps]
        for start, end, weights in zip(
            starts, [*starts[1:], self.constraints.total_samples], self.stages.weights, strict=True
        ):
            counts = counts + self.allowed(weights, counts, start) * (end - start)
        return counts
