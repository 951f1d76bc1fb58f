"""The rule that a steered run goes on with, where a command names another or leaves other domains out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamix.core.config import Config, validate
from megamix.core.errors import InputError
from megamix.mixing.mixers import DomainWeights, Mixer, PartMixer, adopt_state, evaluated, find_mixer, make_mixer
from megamix.mixing.steering.course import Course


def read_rule(own: Config, mixer: Mapping[str, Any] | None) -> Config:
    """The config of a rule that may take the place of ``own``; None: ``own`` itself.

    Raises:
        InputError: it is none, or needs what the run does not measure.
    """
    config = own if mixer is None else validate(find_mixer(mixer.get("name"))[0], dict(mixer), "mixer")
    for each in filter(None, map(evaluated, (own, config))):
        raise InputError(
            f"{each.why_evaluated}, so its domains and its rule stay what they were at the start. {each.without_evaluations}"
        )
    read, wanted = getattr(own, "reference", None), getattr(config, "reference", None)
    if wanted is not None and wanted != read:
        raise InputError(
            f"mixer: its reference is {wanted}, but the run reads {read or 'no reference losses'}. Set reference to null, "
            "or stop the run and resume it with that mixer (checkpoint.accept_changed=[mixer])."
        )
    return config


@dataclass(frozen=True)
class RuleMaker:
    """Makes the rule of a course.

    Attributes:
        own: config of the run's mixer.
        objective: of `make_mixer`.
    """

    own: Config
    domains: tuple[str, ...]
    objective: DomainWeights | None

    def first(self, course: Course | None, weights: DomainWeights, left_out: tuple[str, ...]) -> Mixer:
        """The rule that a run starts or resumes with, without its state."""
        config = self.own if course is None or course.mixer is None else read_rule(self.own, course.mixer)
        return make_mixer(config, self.domains, weights, self.objective, left_out=left_out)

    def __call__(self, course: Course, before: Mixer) -> Mixer:
        """The rule in place of ``before``, whose estimates it keeps where it is the same rule over other domains.

        Raises:
            InputError: it cannot take that place.
        """
        assert course.free is not None
        config = read_rule(self.own, course.mixer)
        # A domain pinned at 0 is mixed, and no rule need go on from 0.
        weights = np.where(course.free > 0, course.free, 1 / len(self.domains))
        mixer = make_mixer(config, self.domains, weights, self.objective, left_out=course.left_out)
        if config == before.config:
            adopt_state(mixer, before.state_dict(), range(mixer.num_domains), mixer.weights)
        elif mixer.loss_weights is not None or before.loss_weights is not None:
            raise InputError(
                f"mixer '{mixer.name if mixer.loss_weights is not None else before.name}' weighs the losses too, which is "
                "fixed while a run goes on. Stop it and resume it with the other mixer (checkpoint.accept_changed=[mixer])."
            )
        return mixer


def left_out_of(mixer: Mixer) -> tuple[str, ...]:
    """The domains that a mixer leaves out."""
    return mixer.left_out if isinstance(mixer, PartMixer) else ()
