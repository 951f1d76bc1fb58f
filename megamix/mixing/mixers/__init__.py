"""Mixers: from the loss statistics of a run to the weights with which its domains are sampled.

    mixer = make_mixer({"name": "odm", "preset": "official"}, domains=["web", "code"], initial_weights=[0.7, 0.3])
    weights = mixer.update(DomainStats(nats=[310.0, 95.0], tokens=[100, 40]), step=1)

A new mixer of megamix is added here alone: its config class to `MixerConfig`, its class to `MIXERS`. A custom mixer
needs neither: see `megamix.mixing.mixers.own`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict

from megamix.core.config import ByName, Config, validate
from megamix.core.errors import InputError, did_you_mean
from megamix.mixing.mixers.ado import AdoConfig, AdoMixer
from megamix.mixing.mixers.aioli import AioliConfig, AioliMixer
from megamix.mixing.mixers.base import EvaluatedConfig, Mixer, ScheduleConfig, evaluated
from megamix.mixing.mixers.doremi import DoremiConfig, DoremiMixer
from megamix.mixing.mixers.left_out import PartMixer, adopt_state, mixed_domains, rule_state, zero_domains
from megamix.mixing.mixers.odm import BEFORE_THESE_KEYS, OdmConfig, OdmMixer
from megamix.mixing.mixers.own import check_installed, installed, own_mixer
from megamix.mixing.mixers.recommended import RecommendedConfig, RecommendedMixer
from megamix.mixing.mixers.static import StaticConfig, StaticMixer
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, normalise_weights, project_to_capped_simplex

MIXERS: dict[str, tuple[type[Config], type[Mixer]]] = {
    "static": (StaticConfig, StaticMixer),
    "odm": (OdmConfig, OdmMixer),
    "ado": (AdoConfig, AdoMixer),
    "aioli": (AioliConfig, AioliMixer),
    "recommended": (RecommendedConfig, RecommendedMixer),
    "doremi": (DoremiConfig, DoremiMixer),
}
"""Config class and mixer class by name."""


def find_mixer(name: object) -> tuple[type[Config], type[Mixer]]:
    """Config class and mixer class by name, custom mixers included.

    Raises:
        InputError: no name, an unknown one, or one whose class cannot be imported.
    """
    if name is None:
        raise InputError("a mixer needs the key 'name'." + did_you_mean("", MIXERS))
    if name not in list(MIXERS):
        return own_mixer(str(name), tuple(MIXERS))
    check_installed(list(MIXERS))
    return MIXERS[str(name)]


def _installed_configs() -> list[type[Config]]:
    """The config classes of the installed mixers that can be imported."""
    found = []
    for name in sorted(installed()):
        with contextlib.suppress(InputError):
            found.append(find_mixer(name)[0])
    return found


MixerConfig = Annotated[
    StaticConfig | OdmConfig | AdoConfig | AioliConfig | RecommendedConfig | DoremiConfig,
    ByName(lambda name: find_mixer(name)[0], _installed_configs, variant="preset"),
]
"""The config of any mixer, told apart by ``name``; another ``preset`` makes it another one, too."""


def with_later_keys(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a mixer in the checkpoint of an earlier version, with the keys that came since, at what it did."""
    return {**(BEFORE_THESE_KEYS if recorded.get("name") == "odm" else {}), **recorded}


class RecordedConfig(Config):
    """The config of a custom mixer in the record of a run."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Which mixer this configures."""


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config that validates without its custom mixers: a run can be inspected where their code is
    missing."""

    def readable(mixer: Any) -> Any:
        is_own = isinstance(mixer, dict) and isinstance(mixer.get("name"), str) and mixer["name"] not in MIXERS
        return RecordedConfig(**mixer) if is_own else mixer

    result = dict(config)
    if "mixer" in config:
        result["mixer"] = readable(config["mixer"])
    if isinstance(config.get("shadow"), list):
        result["shadow"] = [readable(mixer) for mixer in config["shadow"]]
    return result


def make_mixer(
    config: Mapping[str, Any] | Config,
    domains: Sequence[str],
    initial_weights: DomainWeights,
    objective: DomainWeights | None = None,
    left_out: Sequence[str] | None = None,
) -> Mixer:
    """Builds the mixer that ``config`` names.

    Args:
        config: A mapping such as ``{"name": "odm", "preset": "official", "warmup_steps": 50}``, or a mixer's config
            object.
        domains: The K domain names.
        initial_weights: K relative weights in that order, or by name.
        objective: K relative weights of the domains in the loss that the run is judged by. Default: the initial ones.
        left_out: Names of domains that have weight 0 and keep it. Default: those whose initial weight is 0.

    Raises:
        InputError: An unknown mixer or key (the message names the nearest right one), a value out of range, weights
            that cannot be used.
    """
    name = config.get("name") if isinstance(config, Mapping) else getattr(config, "name", None)
    config_class, mixer_class = find_mixer(name)
    if not isinstance(config, config_class):
        config = validate(config_class, dict(config), f"mixer '{name}'")
    out = zero_domains(domains, initial_weights) if left_out is None else tuple(left_out)
    if out:
        weights = normalise_weights(initial_weights, domains, "initial weights")
        mixer: Mixer = PartMixer(mixer_class, config, domains, weights, out)
    else:
        mixer = mixer_class(config, domains, initial_weights)
    if objective is not None:
        mixer.set_objective(objective)
    return mixer


__all__ = [
    "MIXERS",
    "AdoConfig",
    "AdoMixer",
    "AioliConfig",
    "AioliMixer",
    "DomainStats",
    "DoremiConfig",
    "DoremiMixer",
    "EvaluatedConfig",
    "Mixer",
    "MixerConfig",
    "OdmConfig",
    "OdmMixer",
    "PartMixer",
    "RecommendedConfig",
    "RecommendedMixer",
    "ScheduleConfig",
    "StaticConfig",
    "StaticMixer",
    "adopt_state",
    "evaluated",
    "find_mixer",
    "make_mixer",
    "mixed_domains",
    "normalise_weights",
    "project_to_capped_simplex",
    "rule_state",
    "with_later_keys",
    "without_code",
]
