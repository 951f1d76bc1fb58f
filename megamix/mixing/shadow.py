"""Shadows: mixers that log the weights they would have asked for, and change nothing.

A `Shadow` has a separate blend, from which no sample is taken. Its weights pass the run's constraints and take effect
at the run's positions. The key ``shadow`` of a config adds shadows to a run, on rank 0's mixing thread; `megamix
replay` makes them from a record.

A shadow sees the run's statistics. Their tokens were drawn with the run's weights, by which importance weighting
divides, and the model has learnt from the run's data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import Config
from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import DomainStats, Mixer, evaluated
from megamix.mixing.shadow_change import ShadowChange, statistics_record
from megamix.mixing.steering.steering import Steering, follow
from megamix.mixing.weight_policy import WeightPolicy

REBASE_EVERY = 100
"""Steps after which a shadow drops past weights."""


@dataclass(frozen=True)
class ShadowState:
    """State of a shadow in a checkpoint, JSON-serialisable.

    Attributes:
        config: ``identity`` of `Shadow`.
        mixer: of `Mixer.state_dict`.
        sampler: as of `Sampler.state_dict`.
    """

    config: dict[str, Any] | None
    mixer: dict[str, Any]
    sampler: dict[str, Any]


class Shadow:
    """A mixer and the blend that would follow it.

    Args:
        name: in files and messages.
        blend: at the first step, with the changes announced for later ones.
        policy: of the run.
        first_step: counts from 0.
        change: the ``change`` of its first lines where the run did not begin with this mixer; None where it did.
        announce: whether its first weights are not logged yet.
        identity: the config, as far as it must stay the same on resume (`DataPlan.mixer_fingerprint`).
        steering: of a recorded run that is replayed; a shadow of a run is not steered.
    """

    def __init__(
        self,
        name: str,
        mixer: Mixer,
        blend: Blend,
        policy: WeightPolicy,
        *,
        first_step: int = 0,
        change: dict[str, Any] | None = None,
        announce: bool = True,
        identity: dict[str, Any] | None = None,
        steering: Steering | None = None,
    ) -> None:
        if (config := evaluated(mixer.config)) is not None:
            raise InputError(
                f"shadow '{name}': {config.why_evaluated}, and a shadow sees the losses of training only. "
                f"{config.without_evaluations}"
            )
        self.name = name
        self.mixer = mixer
        self._blend = blend
        self._policy = policy
        self._identity = identity
        self._steering = steering
        self._untold = self._announcements(first_step, change) if announce else []

    def update(self, stats: DomainStats, step: int) -> list[ShadowChange]:
        """Updates the mixer with the sums of ``step``, which counts from 0; returns the changes to log.

        Raises:
            InputError: raised by the mixer.
        """
        effective_step = self._policy.effective_step(step)
        position = self._policy.effective_position(step)
        wanted = self._policy.wanted(self.mixer, stats, step)
        changes, self._untold = self._untold, []
        in_force, counts = partial(self._weights_at, position), partial(self._blend.counts_at, position)
        steered = follow(self._steering, self._policy, self.mixer, wanted, step, in_force, counts)
        if steered is not None:
            self.mixer = steered.mixer
            self._blend.set_weights(steered.weights, at=position)
            segment = self._blend.segment_at(position)
            record = {**self.mixer.record(), **steered.recorded, **statistics_record(stats)}
            changes.append(ShadowChange(self.name, step + 1, effective_step, position, segment, record))
        if step % REBASE_EVERY == 0:
            self._blend = Blend.from_state_dict(self._blend.state_dict(at=self._policy.batches.position(step + 1)))
        return changes

    def _weights_at(self, position: int) -> NDArray[np.float64]:
        return self._blend.segment_at(position).weights.copy()

    def state(self, step: int) -> ShadowState:
        """The state before ``step``."""
        blend = self._blend.state_dict(at=self._policy.batches.position(step))
        return ShadowState(self._identity, self.mixer.state_dict(), {"blend": blend})

    def _announcements(self, step: int, change: dict[str, Any] | None) -> list[ShadowChange]:
        """The first weights, and the changes announced for later steps."""
        extra = {} if change is None else {"change": change}
        batches = self._policy.batches
        start = batches.position(step)
        later = [position for position, _ in self._blend.ledger if position > start]
        found = []
        for position in (start, *later):
            segment, record = self._blend.segment_at(position), {**self.mixer.record(), **extra}
            found.append(ShadowChange(self.name, step, batches.step(position), position, segment, record))
        return found


def shadow_names(configs: Sequence[Config]) -> list[str]:
    """Unique names for files: mixer and preset, with a number where that is taken."""
    names: list[str] = []
    for config in configs:
        parts = [str(getattr(config, key)) for key in ("name", "preset") if getattr(config, key, None) is not None]
        name = re.sub(r"[^\w.-]+", "_", "-".join(parts))
        number = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in names)
        names.append(f"{name}-{number + 1}" if number else name)
    return names
