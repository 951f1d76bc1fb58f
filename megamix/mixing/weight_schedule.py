"""The weights a run starts from: one mixture, or several, each from a stated number of tokens on.

Legend: K domains, M stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.errors import InputError
from megamix.interop.average import run_weights
from megamix.interop.weights import read_swarm_weights, read_weights
from megamix.mixers import normalise_weights
from megamix.records.recorded_run import RecordedRun
from megamix.run_config import FileMixture, MixConfig, OneMixture, RunMixture, StagedMixture, SwarmMixture

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightSchedule:
    """Piecewise constant weights over the steps of a run.

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


def make_schedule(config: MixConfig, names: tuple[str, ...], natural: Floats) -> WeightSchedule:
    """Resolves ``mixture``.

    A stage starts with the first step that begins at or after its ``from_tokens``.

    Raises:
        InputError: an unknown or missing domain, a weight that is none, a run without weights, or stages that do not
            rise from 0.
    """
    if not isinstance(config.mixture, StagedMixture):
        return WeightSchedule((0,), _weights(config.mixture, names, natural, "mixture")[None])
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
    return WeightSchedule(tuple(steps), np.stack(rows))


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
