"""Warnings about the mixer of a run, for `megamix doctor`."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray

from megamix.core.text import listed, plural
from megamix.mixing.mixers import (
    MIXERS,
    AdoConfig,
    AioliConfig,
    DoremiConfig,
    RecommendedConfig,
    ScheduleConfig,
    evaluated,
    make_mixer,
)
from megamix.mixing.mixers.recommended import observations_to_suspect
from megamix.training.config import RunConfig

FEW_SAMPLES = 4.0
"""A mean over fewer samples than this follows single ones: of losses that spread by 1 nat it is off by half a nat or
more."""


def mixer_warnings(
    config: RunConfig,
    names: tuple[str, ...],
    initial: NDArray[np.float64],
    objective: NDArray[np.float64] | None = None,
) -> list[str]:
    """Settings of the mixer that work and are probably not meant.

    Args:
        initial: float64 [K], the initial weights.
        objective: float64 [K], the objective's; None where they are not known.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_mixer(config.mixer, names, initial)  # which checks its parameters against the number of domains
    said = [str(warning.message) for warning in caught]
    return (
        said
        + _never_acts(config, initial, objective)
        + _few_samples(config, names, initial)
        + _probes_in_warmup(config, len(names))
    )


def _never_acts(config: RunConfig, initial: NDArray[np.float64], objective: NDArray[np.float64] | None) -> list[str]:
    """A mixer whose first change of the weights would come after the end."""
    mixer, steps, lag = config.mixer, config.train.steps, config.data.weight_lag
    follows = objective is not None and np.allclose(initial, objective, rtol=0, atol=1e-12)
    needed = observations_to_suspect(mixer) if isinstance(mixer, RecommendedConfig) and follows else 1
    first, keys = _first_change(mixer, needed)
    if np.count_nonzero(initial) < 2 or first == 0:
        return []
    most = getattr(mixer, "update_times", -1)
    if 0 <= most < needed:
        why = f"it stops after {plural(most, 'update')}, and no weight changes before update {needed}"
        return [
            f"mixer {mixer.name}: {why}, so the weights stay the mixture's. Raise mixer.update_times, or leave it out."
        ]
    if first + lag < steps:
        return []
    after = f"after step {first}" + (f" and act {lag + 1} steps later" if lag else "")
    return [
        f"mixer {mixer.name}: its weights change {after} at the earliest, and the run ends after step {steps}, so the weights "
        f"stay the mixture's. {f'Lower {keys}, or train' if keys else 'Train'} longer."
    ]


def _first_change(mixer: object, needed: int) -> tuple[int, str]:
    """The first step, from 1, after whose losses a mixer can ask for other weights, and the keys that say so; (0, "")
    for one whose effect does not begin there.

    Args:
        needed: losses of a domain without which a mixer with a schedule changes nothing.
    """
    if isinstance(mixer, AdoConfig):
        start = mixer.fit_from if mixer.start is None else mixer.start
        fit = math.ceil(start / mixer.refit_every) * mixer.refit_every + mixer.fit_delay
        return fit + 1, "mixer.fit_from, start, refit_every and fit_delay"
    if isinstance(mixer, AioliConfig):
        return mixer.first_round, "mixer.first_round"
    # DoReMi's weights are of the loss, from the first step on.
    if not isinstance(mixer, ScheduleConfig) or isinstance(mixer, DoremiConfig):
        return 0, ""
    every = mixer.update_every
    keys = [key for key, least in (("warmup_steps", 0), ("update_every", 1)) if getattr(mixer, key) > least]
    return max(mixer.warmup_steps // every + 1, needed) * every, "mixer." + " and ".join(keys) if keys else ""


def _probes_in_warmup(config: RunConfig, num_domains: int) -> list[str]:
    """Aioli's first probes while the learning rate still rises: the chapter on mixing has what they cost there."""
    mixer, rise = config.mixer, config.train.learning_rate.warmup_steps
    first = getattr(mixer, "first_round", None)
    if mixer.name != "aioli" or num_domains == 1 or first is None:
        return []
    last_before = first + config.data.weight_lag
    if last_before >= rise:
        return []
    return [
        f"mixer aioli: its first probe begins at step {last_before + 1}, while the learning rate rises until step {rise}. Steps of mostly "
        f"one domain can then throw the model back for the rest of the run. Set mixer.first_round to {first + rise - last_before} "
        "or more."
    ]


def _few_samples(config: RunConfig, names: tuple[str, ...], initial: NDArray[np.float64]) -> list[str]:
    """Domains of which an update has so few samples that a rule which rewards losses follows single ones."""
    mixer, batch = config.mixer, min(size for _, size in config.batches.sizes)
    rewards_losses = mixer.name == "odm" or mixer.name not in MIXERS
    if not rewards_losses or evaluated(mixer) is not None:
        return []
    over_steps = getattr(mixer, "reward_over", "interval") == "interval"
    every = getattr(mixer, "update_every", 1) if over_steps else 1
    expected = {name: float(weight) * batch * every for name, weight in zip(names, initial, strict=True) if weight > 0}
    few = sorted((number, name) for name, number in expected.items() if number < FEW_SAMPLES)
    if not few:
        return []
    fewest, name = few[0]
    others = f" (below {FEW_SAMPLES:g} too: {listed(other for _, other in few[1:])})" if few[1:] else ""
    longer = f"mixer.update_every to {math.ceil(FEW_SAMPLES / (fewest / every))}"
    longer = longer if over_steps else f"mixer.reward_over to interval and {longer},"
    return [
        f"mixer {mixer.name}: an update has {fewest:.2g} samples of domain '{name}' at its initial weight{others}, so weights "
        f"will follow the losses of single samples. Set {longer} or train.global_batch to "
        f"{math.ceil(batch * FEW_SAMPLES / fewest)}, or use the mixer recommended, which is made for noise."
    ]
