"""Which weights hold at a position of a run. Whoever sets a blend's weights asks here.

    initial weights, later stages, a mixer's update --wanted--> constraints --allowed--> blend, from a stated position

Legend: K domains, M stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend, Sampling
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import DomainStats, Mixer
from megamix.mixing.ramps import Ramp, RampShape

Floats = NDArray[np.float64]
_MOST_STRETCHES = 1000


@dataclass(frozen=True)
class Stages:
    """Weights over the steps of a run, before the constraints: constant over stretches, or on a ramp from the start of
    one stage to that of the next.

    Attributes:
        steps: the step, counted from 0, that each of the M stages starts with; the first is 0, and they rise.
        weights: float64 [M, K], of the first step of each stage; each row sums to 1.
        ramps: of the M stages, how the weights get there from the stage before; None: at once. Empty: all at once.
    """

    steps: tuple[int, ...]
    weights: Floats
    ramps: tuple[RampShape | None, ...] = ()

    def at(self, step: int) -> Floats:
        """float64 [K]: the weights of ``step``, from its number alone."""
        stage = self._stage_of(step)
        ramp = self._ramp_from(stage)
        return self.weights[stage] if ramp is None else ramp.towards(self.weights[stage + 1], step)

    def changes_at(self, step: int) -> bool:
        """Whether a later stage than the first starts with ``step``, or ``step`` is on a ramp."""
        return step in self.steps[1:] or (step > 0 and self._ramp_from(self._stage_of(step)) is not None)

    def changes(self, last: int) -> Iterator[int]:
        """The steps up to ``last`` at which the weights change, in order."""
        for stage, start in enumerate(self.steps):
            ends = self.steps[stage + 1] if self._ramp_from(stage) is not None else start + 1
            yield from range(max(start, 1), min(ends, last + 1))

    def stretches(self, end: int) -> Iterator[tuple[int, int, Floats]]:
        """(first step, end, float64 [K] mean weights) of consecutive stretches up to ``end``; a ramp is at most
        `_MOST_STRETCHES` of them."""
        for stage, (start, stop) in enumerate(zip(self.steps, [*self.steps[1:], end], strict=True)):
            ramp = self._ramp_from(stage)
            if ramp is None:
                yield start, stop, self.weights[stage]
                continue
            for steps in np.array_split(np.arange(start, stop), min(_MOST_STRETCHES, stop - start)):
                share = math.fsum(map(ramp.share, steps.tolist())) / steps.size
                yield int(steps[0]), int(steps[-1]) + 1, ramp.after(share, self.weights[stage + 1])

    def _stage_of(self, step: int) -> int:
        return int(np.searchsorted(self.steps, step, "right")) - 1

    def _ramp_from(self, stage: int) -> Ramp | None:
        """The ramp that starts with a stage, in steps."""
        if stage + 1 >= len(self.ramps) or (shape := self.ramps[stage + 1]) is None:
            return None
        start = self.steps[stage]
        return Ramp(start, self.steps[stage + 1] - start, self.weights[stage], shape)


@dataclass(frozen=True)
class WeightPolicy:
    """The weights of a run: what is wanted, what is allowed, and from where on it holds.

    Stages hold until the mixer first changes the weights; a rule with a prior (`Mixer.set_prior`) has them as that.
    Steps count from 0.

    Attributes:
        batches: samples of every step.
        weight_lag: steps between the one whose statistics are used and the first with the new weights, not counting
            either.
    """

    stages: Stages
    constraints: Constraints
    batches: Batches
    weight_lag: int

    def effective_step(self, step: int) -> int:
        """The first step that is sampled with the weights that follow from ``step``."""
        return step + 1 + self.weight_lag

    def effective_position(self, step: int) -> int:
        """The first sample of `effective_step`."""
        return self.batches.position(self.effective_step(step))

    def wanted(self, mixer: Mixer, stats: DomainStats, step: int) -> Floats | None:
        """Updates ``mixer`` with the sums of ``step``; returns the weights wanted from `effective_step` on, float64 [K]
        before the constraints, or None where nothing is to change."""
        effective_step = self.effective_step(step)
        staged = self.stages.at(effective_step) if self.stages.changes_at(effective_step) else None
        if staged is not None:
            mixer.set_prior(staged)
        weights = mixer.update(stats, step + 1)
        if not mixer.has_updated and staged is not None:
            return staged
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
        for step in self.stages.changes(last):
            position = self.batches.position(step)
            blend.set_weights(self.allowed(self.stages.at(step), blend.counts_at(position), position), at=position)
        return blend

    @cached_property
    def planned_samples(self) -> Floats:
        """float64 [K]: the samples, of the present length, that the run takes from each domain if no mixer changes the
        weights."""
        counts, batches = np.zeros(self.constraints.num_samples.size), self.batches
        total = self.constraints.total_samples
        constraints = replace(self.constraints, total_samples=total + self.constraints.more, more=0)
        for first, end, weights in self.stages.stretches(batches.step(total)):
            start, stop = batches.tokens(first) / batches.seq_length, batches.tokens(end) / batches.seq_length
            counts = counts + constraints.apply(weights, counts, start) * (stop - start)
        return counts
