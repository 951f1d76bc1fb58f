"""Mixtures of a swarm, drawn from a prior within the bounds of `GenerateConfig`: one row of weights per member.

Legend: K domains, S sources, N members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, check_known
from megamix.mixing.sources import source_of
from megamix.studies.swarm.generate.config import GenerateConfig
from megamix.studies.swarm.generate.levels import (
    SLACK,
    Bools,
    Floats,
    Level,
    distance,
    flattened,
    largest_total,
    strength_of,
)

ATTEMPTS = 200
"""Draws for a member, until one is away from all others, before this is given up."""


@dataclass(frozen=True)
class MixtureSpace:
    """Prior and bounds of a swarm's mixtures, which it draws. Call `check` first.

    Attributes:
        domains: the K domains.
        prior: float64 [K], sums to 1; the manual priors of the config are not in it yet.
        token_counts: {domain: training tokens}; needed where `GenerateConfig.repetition` is set.
        repetition_tokens: tokens of the run that `GenerateConfig.repetition` bounds.
    """

    domains: tuple[str, ...]
    prior: Floats
    config: GenerateConfig
    token_counts: Mapping[str, float] = field(default_factory=dict)
    repetition_tokens: float = 0.0

    @cached_property
    def sources(self) -> dict[str, NDArray[np.int64]]:
        """int64 [topics]: the domains of each source, which is in the order of its first one."""
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.domains):
            found.setdefault(source_of(name), []).append(index)
        return {name: np.array(indices, np.int64) for name, indices in found.items()}

    @cached_property
    def caps(self) -> Floats:
        """float64 [K]: the largest weight of each domain, by its tokens and by max_weight."""
        caps = np.array([self.config.max_weight.get(name, 1.0) for name in self.domains])
        if self.config.repetition is not None:
            tokens = np.array([self.token_counts[name] for name in self.domains], np.float64)
            caps = np.minimum(caps, self.config.repetition * tokens / self.repetition_tokens)
        return caps

    @cached_property
    def centre(self) -> Floats:
        """float64 [K]: the prior with the manual priors in the place of its shares: what a proposal is compared
        with."""
        sizes = np.array([self.prior[indices].sum() for indices in self.sources.values()])
        for place, name in enumerate(self.sources):
            sizes[place] = self.config.manual_prior.get(name, sizes[place])
        if sizes.sum() <= 0:
            raise InputError("the shares of the prior are all 0. Give at least one source a share above 0.")
        sizes /= sizes.sum()
        centre = np.zeros(len(self.domains))
        for size, indices in zip(sizes, self.sources.values(), strict=True):
            centre[indices] = size * self._topic_shares(indices)
        return centre

    def check(self) -> None:
        """Looks at all that can be known before anything is drawn.

        Raises:
            InputError: a name that is no domain, or bounds that no mixture keeps; with the numbers.
        """
        config = self.config
        for keys, known in (
            (("manual_topic_prior", "fixed_topic_weights"), self.domains),
            (("manual_prior", "fixed_source_weights"), self.sources),
            (("max_weight", "nonzero_weight"), (*self.domains, *self.sources)),
        ):
            for key in keys:
                check_known(getattr(config, key), known, f"swarm.generate.{key}: there is no")
        self._check_repetition()
        self._check_fixed_topics()
        for name, indices in self.sources.items():
            if len(indices) > 1 and name not in self._fixed_topics and self.centre[indices].sum() > 0:
                least = self._least(name)
                self._topics(name, least).check("topic", f" of '{name}'")
        free, rest = self._free_sources()
        if free.any():
            self._source_level(free, rest).check("source" if len(self.sources) < len(self.domains) else "domain")

    def draw(self, number: int, random: np.random.Generator) -> Floats | None:
        """float64 [K]: one mixture; None where this draw leads to none.

        Args:
            number: of the member, which settles its strength.
        """
        source = strength_of(number, *self.config.strengths("source"))
        topic = strength_of(number, *self.config.strengths("topic"))
        return self._compose(lambda level: level.draw(source, random), lambda level: level.draw(topic, random))

    @cached_property
    def nearest_to_prior(self) -> Floats | None:
        """float64 [K]: the prior, brought within the bounds."""
        return replace(self, config=_without_temperature(self.config))._compose(_bounded_prior, _bounded_prior)

    def _compose(
        self, source_weights: Callable[[Level], Floats | None], topic_weights: Callable[[Level], Floats | None]
    ) -> Floats | None:
        weights = np.zeros(len(self.domains))
        free, rest = self._free_sources()
        of_sources = self._fixed_sources.copy()
        if free.any():
            found = source_weights(self._source_level(free, rest))
            if found is None:
                return None
            of_sources[free] = rest * found
        for weight, (name, indices) in zip(of_sources, self.sources.items(), strict=True):
            if weight <= 0:
                continue
            if len(indices) == 1:
                shares = np.ones(1)
            elif name in self._fixed_topics:
                shares = self._fixed_topics[name]
            else:
                shares = topic_weights(self._topics(name, float(weight)))
            if shares is None:
                return None
            weights[indices] = weight * shares
        return weights / weights.sum()

    # Sources ---------------------------------------------------------------------------------------------------------

    def _source_level(self, free: Bools, rest: float) -> Level:
        """The sources whose weights are free, which share ``rest``."""
        names = np.array(list(self.sources), dtype=object)
        sizes = np.array([self.centre[indices].sum() for indices in self.sources.values()])
        if sizes[free].sum() <= 0:
            raise InputError(
                f"the sources {', '.join(names[free])} share a weight of {rest:.6g}, but the prior of all of them is 0. "
                "Give one of them a prior above 0."
            )
        caps = np.array([self._largest(name) for name in self.sources])
        required = np.array([self._is_required(name) for name in self.sources])
        if self.config.support == "dense":
            required |= sizes > 0
        sparse = self.config.support == "sparse" and len(self.sources) == len(self.domains)
        return Level(
            tuple(names[free]),
            flattened(sizes[free], self.config.temperature("source")),
            self.config.minimum("source") / rest,
            np.minimum(caps[free] / rest, 1.0),
            required[free],
            self.config.left_out if sparse else 0.0,
        )

    @cached_property
    def _fixed_sources(self) -> Floats:
        """float64 [S]: the weights of the sources that are fixed, 0 of the others."""
        return np.array([self.config.fixed_source_weights.get(name, 0.0) for name in self.sources])

    def _free_sources(self) -> tuple[Bools, float]:
        """bool [S] and the weight they share."""
        fixed = self.config.fixed_source_weights
        free = np.array([name not in fixed for name in self.sources])
        total = float(sum(fixed.values()))
        if total > 1 + SLACK or (not free.any() and abs(total - 1) > 1e-6):
            wanted = "at most 1" if free.any() else "1, as no other source is left"
            raise InputError(f"swarm.generate.fixed_source_weights sum to {total:.6g}, expected {wanted}. Change them.")
        for name, weight in fixed.items():
            if weight > self._largest(name) + SLACK:
                raise InputError(
                    f"swarm.generate.fixed_source_weights: '{name}' is to have {weight:.6g}, but can have {self._largest(name):.6g} "
                    "at most. Allow more repetition, or lower it."
                )
            if weight == 0 and self._is_required(name):
                raise InputError(
                    f"'{name}' is fixed at 0, and named in swarm.generate.nonzero_weight. Change one of them."
                )
        rest = 1 - total
        return (free, rest) if rest > SLACK else (np.zeros_like(free), 0.0)

    def _is_required(self, source: str) -> bool:
        return any(source_of(name) == source for name in self.config.nonzero_weight)

    def _largest(self, source: str) -> float:
        """The largest weight a source can have."""
        indices = self.sources[source]
        own = self.config.max_weight.get(source, 1.0)
        caps = self.caps[indices]
        if len(indices) == 1:
            return min(own, float(caps[0]), 1.0)
        if source in self._fixed_topics:
            shares = self._fixed_topics[source]
            return min(own, float((caps[shares > 0] / shares[shares > 0]).min()), 1.0)
        usable = np.where(self.centre[indices] > 0, caps, 0.0)
        return min(own, largest_total(usable, self._required_topics(source), self.config.minimum("topic")))

    def _least(self, source: str) -> float:
        """Weight of a source at which `check` shares out its topics."""
        fixed = self.config.fixed_source_weights.get(source, 0.0)
        return fixed if fixed > 0 else max(min(self.config.minimum("source"), self._largest(source)), 1e-12)

    # Topics ----------------------------------------------------------------------------------------------------------

    def _topics(self, source: str, weight: float) -> Level:
        """The topics of a source that has this weight."""
        indices = self.sources[source]
        sparse = self.config.support == "sparse"
        return Level(
            tuple(self.domains[index] for index in indices),
            flattened(self._topic_shares(indices), self.config.temperature("topic")),
            self.config.minimum("topic"),
            np.minimum(self.caps[indices] / max(weight, 1e-300), 1.0),
            self._required_topics(source),
            self.config.left_out if sparse else 0.0,
        )

    def _required_topics(self, source: str) -> Bools:
        indices = self.sources[source]
        named = np.array([self.domains[index] in self.config.nonzero_weight for index in indices])
        return named | (self._topic_shares(indices) > 0) if self.config.support == "dense" else named

    def _topic_shares(self, indices: NDArray[np.int64]) -> Floats:
        """float64 [topics]: the prior within a source; equal shares where it has none."""
        shares = self.prior[indices].copy()
        total = shares.sum()
        shares = shares / total if total > 0 else np.full(len(indices), 1 / len(indices))
        for place, index in enumerate(indices):
            shares[place] = self.config.manual_topic_prior.get(self.domains[index], shares[place])
        if shares.sum() <= 0:
            raise InputError(
                f"swarm.generate.manual_topic_prior of '{source_of(self.domains[indices[0]])}' is 0 for all topics. "
                "Give at least one a share above 0."
            )
        return shares / shares.sum()

    @cached_property
    def _fixed_topics(self) -> dict[str, Floats]:
        """float64 [topics]: the shares of the topics of the sources where they are fixed."""
        found = {}
        for source, indices in self.sources.items():
            given = [self.config.fixed_topic_weights.get(self.domains[index], 0.0) for index in indices]
            if any(given):
                found[source] = np.array(given) / sum(given)
        return found

    def _check_fixed_topics(self) -> None:
        fixed = self.config.fixed_topic_weights
        for source, indices in self.sources.items():
            names = [self.domains[index] for index in indices]
            missing = [name for name in names if name not in fixed]
            if missing and len(missing) < len(names):
                raise InputError(
                    f"swarm.generate.fixed_topic_weights names some topics of '{source}', but not {', '.join(missing)}. "
                    "Give each a share; 0 leaves one out."
                )
            if not missing and not any(fixed[name] for name in names):
                raise InputError(
                    f"swarm.generate.fixed_topic_weights of '{source}' are all 0. Give one a share above 0."
                )

    def _check_repetition(self) -> None:
        if self.config.repetition is None:
            return
        missing = [name for name in self.domains if name not in self.token_counts]
        if missing:
            raise InputError(
                f"swarm.generate.repetition needs the tokens of every domain, and those of {', '.join(missing)} are not known. "
                "Add them to token_counts of the priors."
            )
        room = float(np.minimum(self.caps, 1.0)[self.centre > 0].sum())
        if room >= 1 - SLACK:
            return
        total = float(sum(self.token_counts[name] for name in self.domains))
        factor, tokens = self.config.repetition, self.repetition_tokens
        raise InputError(
            f"swarm.generate.repetition {factor:g} allows {factor * total:,.0f} tokens of all {len(self.domains)} domains together "
            f"({total:,.0f} tokens read {factor:g} times), and with max_weight a total weight of {room:.6g}, but a run has "
            f"{tokens:,.0f} tokens. Repetition of at least {tokens / total:.3g}, or runs of at most {factor * total:,.0f} "
            "tokens would do, were there no max_weight."
        )


def draw_mixtures(space: MixtureSpace, members: int, existing: Floats | None = None) -> Floats:
    """Draws the mixtures of a swarm.

    The n-th depends on the seed, the config, the prior and the ones before it, but not on their number.

    Args:
        existing: float64 [rows, K], mixtures to keep away from.

    Returns:
        float64 [N, K], rows that sum to 1.

    Raises:
        InputError: see `MixtureSpace.check`; or a member for which no mixture away from the others was found.
    """
    space.check()
    config = space.config
    others = np.empty((0, len(space.domains))) if existing is None else existing
    found: list[Floats] = []
    if config.include_prior:
        prior = space.nearest_to_prior
        if prior is None:
            raise InputError(
                "the prior cannot be brought within the bounds. Set swarm.generate.include_prior to false."
            )
        found.append(prior)
    first = len(found)
    while len(found) < members:
        number = len(found) - first
        near = np.inf
        for attempt in range(ATTEMPTS):
            random = np.random.default_rng(np.random.SeedSequence([config.seed, number, attempt]))
            weights = space.draw(number, random)
            if weights is None:
                continue
            if config.min_distance:
                near = distance(weights, np.array([*others, *found]).reshape(-1, len(weights)))
            if near >= config.min_distance:
                found.append(weights)
                break
        else:
            raise InputError(
                f"member {len(found)} of {members}: each of {ATTEMPTS} draws "
                + ("is out of the bounds. Loosen them." if np.isinf(near) else
                   f"is nearer than swarm.generate.min_distance {config.min_distance:g} to one drawn before (the last one "
                   f"{near:.3g}). Ask for fewer members, lower min_distance, or widen min_strength and max_strength.")
            )  # fmt: skip
    return np.stack(found[:members])


def _bounded_prior(level: Level) -> Floats | None:
    return level.bounded(level.prior)


def _without_temperature(config: GenerateConfig) -> GenerateConfig:
    changes = {"mix_temperature": 1.0, "source_mix_temperature": None, "topic_mix_temperature": None}
    return config.model_copy(update=changes)
