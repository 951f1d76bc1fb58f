"""Domains that are left out: their weight is 0 in the mixture, and stays 0 under any rule.

The rule is a mixer of the other domains alone. So nothing of it, exploration and smoothing included, counts a domain
that is left out, and the weights are those of the same run without it.

Shapes: K domains, of which the rule mixes A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megamix.core.config import Config
from megamix.core.errors import InputError
from megamix.core.text import listed
from megamix.mixing.mixers.base import Mixer
from megamix.mixing.mixers.stats import DomainStats
from megamix.mixing.mixers.weights import DomainWeights, FloatArray, normalise_weights

RULE = "rule_of_mixed"
"""Key of a state that holds the state of the rule."""


class PartMixer(Mixer):
    """A rule over some of the domains; the others have weight 0.

    Args:
        make: makes the rule, from its config, the A domains and their initial weights.
        left_out: names.

    Attributes:
        rule: the mixer of the other domains.
        left_out: names, in the order of the domains.
    """

    def __init__(
        self,
        make: Callable[[Config, Sequence[str], FloatArray], Mixer],
        config: Config,
        domains: Sequence[str],
        initial_weights: FloatArray,
        left_out: Sequence[str],
    ) -> None:
        super().__init__(config, domains, initial_weights)
        out = set(left_out)
        self.left_out = tuple(name for name in self.domains if name in out)
        self._mixed = np.array([index for index, name in enumerate(self.domains) if name not in out])
        names = [self.domains[index] for index in self._mixed]
        self.rule = make(config, names, self._part(np.asarray(initial_weights)))
        self.name = self.rule.name
        self._objective = self._whole(self.rule.objective)

    def _new_weights(self, step: int) -> FloatArray | None:
        raise NotImplementedError  # `update` asks the rule

    def _part(self, weights: FloatArray) -> FloatArray:
        """float64 [A], sum 1: the weights of the mixed domains; equal ones where all are 0."""
        part = np.asarray(weights, np.float64)[self._mixed]
        total = part.sum()
        if total == 0:
            return np.full(part.size, 1 / part.size)
        return part if abs(total - 1.0) <= 1e-12 else part / total

    def _whole(self, part: FloatArray) -> FloatArray:
        whole = np.zeros(self.num_domains)
        whole[self._mixed] = part
        return whole

    @property
    def weights(self) -> FloatArray:
        return self._whole(self.rule.weights)

    @property
    def loss_weights(self) -> FloatArray | None:
        """float64 [K]; 0 for what is left out, of which there are no tokens."""
        part = self.rule.loss_weights
        return None if part is None else self._whole(part)

    @property
    def is_warmup(self) -> bool:
        return self.rule.is_warmup

    @property
    def has_updated(self) -> bool:
        return self.rule.has_updated

    def changed_at(self, step: int) -> bool:
        return self.rule.changed_at(step)

    def set_objective(self, weights: DomainWeights) -> None:
        super().set_objective(weights)
        if not self._objective[self._mixed].any() and type(self.rule).follows_objective:
            raise InputError(
                f"mixer '{self.name}' follows the objective, in which every domain that is sampled has weight 0 "
                f"(left out: {listed(self.left_out)}). Give one of the others a weight in it, or use another mixer."
            )
        self.rule.set_objective(self._part(self._objective))

    def set_prior(self, weights: FloatArray) -> None:
        self.rule.set_prior(self._part(weights))

    def update(self, stats: DomainStats, step: int) -> FloatArray:
        if stats.num_domains != self.num_domains:
            raise InputError(
                f"mixer '{self.name}': statistics of {stats.num_domains} domains, expected {self.num_domains} "
                f"({listed(self.domains)})."
            )
        mixed = self._mixed
        part = DomainStats(
            stats.nats[mixed],
            stats.tokens[mixed],
            None if stats.excess_nats is None else stats.excess_nats[mixed],
            None if stats.weights is None else self._part(stats.weights),
            None if stats.non_finite is None else stats.non_finite[mixed],
        )
        return self._whole(self.rule.update(part, step))

    def record(self) -> dict[str, Any]:
        """That of the rule, with 0 for the weights and null for the estimates of a domain that is left out."""
        found = {key: self._whole_list(key, value) for key, value in self.rule.record().items()}
        return {**found, "left_out": list(self.left_out)}

    def _whole_list(self, key: str, value: Any) -> Any:
        numbers = isinstance(value, list) and all(isinstance(each, int | float | None) for each in value)
        if not numbers or len(value) != self._mixed.size:
            return value
        whole: list[Any] = [0.0 if key.endswith("weights") else None] * self.num_domains
        for index, each in zip(self._mixed.tolist(), value, strict=True):
            whole[index] = each
        return whole

    def state_dict(self) -> dict[str, Any]:
        rule = self.rule.state_dict()
        same = {key: rule[key] for key in ("mixer", "step", "num_updates", "last_update")}
        return {**same, "domains": list(self.domains), "weights": self.weights.tolist(), RULE: rule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if tuple(state.get("domains", ())) != self.domains or mixed_domains(state) != self.rule.domains:
            raise InputError(
                f"mixer '{self.name}': the state is of other domains: it mixes {listed(mixed_domains(state))}, this "
                f"{listed(self.rule.domains)}, and leaves out {listed(self.left_out)}."
            )
        self.rule.load_state_dict(rule_state(state))

    def adopt_state(self, state: Mapping[str, Any], parents: Sequence[int | None], weights: FloatArray) -> None:
        self.rule.adopt_state(rule_state(state), _of_rule(state, parents, self._mixed), self._part(weights))


def rule_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of the rule in a `Mixer.state_dict`."""
    return state.get(RULE, state)


def mixed_domains(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The domains of a `Mixer.state_dict` that are not left out."""
    return tuple(rule_state(state).get("domains", ()))


def adopt_state(mixer: Mixer, state: Mapping[str, Any], parents: Sequence[int | None], weights: FloatArray) -> None:
    """`Mixer.adopt_state`, whatever either side leaves out."""
    if isinstance(mixer, PartMixer):
        mixer.adopt_state(state, parents, weights)
    else:
        mixer.adopt_state(rule_state(state), _of_rule(state, parents, np.arange(mixer.num_domains)), weights)


def _of_rule(state: Mapping[str, Any], parents: Sequence[int | None], mixed: Any) -> list[int | None]:
    """The parents of the mixed domains, by their place in the state of the rule."""
    place = {name: index for index, name in enumerate(mixed_domains(state))}
    names = state["domains"]
    found = (parents[index] for index in mixed.tolist())
    return [None if parent is None else place.get(names[parent]) for parent in found]


def zero_domains(domains: Sequence[str], weights: DomainWeights) -> tuple[str, ...]:
    """The domains whose weight is 0; raises as `normalise_weights`."""
    if not domains:
        return ()
    values = normalise_weights(weights, domains, "initial weights")
    return tuple(name for name, value in zip(domains, values.tolist(), strict=True) if value == 0)
