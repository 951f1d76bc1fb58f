"""What a config comes to with this data on this many ranks, checked before any time is spent.

`make_plan` reads the manifest and the heads of the data files, neither torch nor a GPU; `megamix doctor` prints it,
`megamix train` starts from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.data.blend import Blend
from megamix.data.manifest import Manifest
from megamix.data.permute import hash_words
from megamix.data.sampler import Slice
from megamix.data.stream import DomainTokens
from megamix.errors import InputError
from megamix.mixers import normalise_weights, project_to_capped_simplex
from megamix.models.config import ModelConfig
from megamix.run_config import RunConfig

Floats = NDArray[np.float64]
MANY_EPOCHS = 4.0
"""More repetitions than this of a domain are worth a warning: up to about 4, repeated data is nearly as good as new
(Muennighoff et al., 2023)."""


@dataclass(frozen=True)
class Plan:
    """A run, resolved.

    Attributes:
        model: with its vocabulary settled.
        domains, validation: the opened token streams, in manifest order.
        num_samples: int64 [K], training windows per domain and epoch.
        natural_weights: float64 [K], shares of the training tokens.
        initial_weights: float64 [K], after the constraints.
    """

    config: RunConfig
    manifest: Manifest
    model: ModelConfig
    world_size: int
    data_size: int
    domains: list[DomainTokens]
    validation: list[DomainTokens]
    num_samples: NDArray[np.int64]
    natural_weights: Floats
    initial_weights: Floats

    @property
    def domain_names(self) -> tuple[str, ...]:
        return tuple(self.manifest.domain_names)

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.config.train.steps * self.config.train.global_batch

    @property
    def total_tokens(self) -> int:
        return self.total_samples * self.config.data.seq_length

    @property
    def epochs(self) -> Floats:
        """float64 [K]: how often each domain is read at the initial weights."""
        return self.initial_weights * self.total_samples / self.num_samples

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows: what joins the softmax."""
        return self.manifest.tokenizer.vocab_size

    def warnings(self) -> list[str]:
        """Things that will work and are probably not meant."""
        found = []
        for name, epochs, weight in zip(self.domain_names, self.epochs, self.initial_weights, strict=True):
            if epochs > MANY_EPOCHS:
                found.append(
                    f"domain '{name}': weight {weight:.4f} reads it {epochs:.1f} times; more than {MANY_EPOCHS:g} epochs add little. "
                    "Lower its weight or set data.max_epochs."
                )
        return found

    def share(self, data_rank: int) -> Slice:
        """The part of every batch that a data-parallel rank reads."""
        train = self.config.train
        return Slice(train.global_batch, train.micro_batch, data_rank, self.data_size)

    def blend(self) -> Blend:
        """The blend at position 0."""
        return Blend(
            self.num_samples,
            self.initial_weights,
            self.config.train.seed,
            domain_keys=[domain_key(name) for name in self.domain_names],
        )

    def constrain(self, weights: Floats, counts: NDArray[np.int64], position: int) -> Floats:
        """The weights nearest to ``weights`` (float64 [K]) with which no domain is read more than ``max_epochs`` times.

        Args:
            counts: int64 [K], samples taken from each domain before ``position``.
            position: where the weights take effect.
        """
        max_epochs, left = self.config.data.max_epochs, self.total_samples - position
        if max_epochs is None or left <= 0:
            return weights
        cap = np.maximum(max_epochs * self.num_samples - counts, 0) / left
        # Counts are whole and weights are not: near the end the caps of a run that uses everything up may sum to a
        # little under 1.
        cap = np.minimum(cap / min(1.0, float(cap.sum())), 1.0)
        return project_to_capped_simplex(weights, np.zeros_like(cap), cap)


def domain_key(name: str) -> int:
    """The integer that names a domain to the random order, whatever its place in the manifest."""
    return int(hash_words(*name.encode()))


def make_plan(config: RunConfig, world_size: int | None = None) -> Plan:
    """Resolves ``config`` for a job of ``world_size`` ranks (default: the fewest that its layout needs).

    Raises:
        InputError: anything that would stop the run later.
    """
    ranks = world_size or config.engine.world_size()
    try:
        data_size = config.engine.data_size(ranks)
    except ValueError as error:
        raise InputError(str(error)) from error
    manifest = Manifest.load(config.data.manifest)
    model = config.model.with_vocabulary(manifest.tokenizer.vocab_size)
    if config.engine.pipeline > model.num_layers:
        raise InputError(
            f"engine.pipeline is {config.engine.pipeline}, but the model has {model.num_layers} decoder layers. "
            "Use at most one stage per layer."
        )
    Slice(config.train.global_batch, config.train.micro_batch, 0, data_size)
    names = tuple(manifest.domain_names)
    domains = [manifest.open_domain(name, "train") for name in names]
    validation = [manifest.open_domain(name, "validation") for name in names]
    num_samples = np.array([_windows(domain, "training", config.data.seq_length) for domain in domains], np.int64)
    for domain in validation:
        _windows(domain, "validation", config.data.seq_length)
    natural = manifest.natural_weights()
    plan = Plan(
        config, manifest, model, ranks, data_size, domains, validation, num_samples, natural,
        initial_weights=_mixture(config, names, natural),
    )  # fmt: skip
    _check_epochs(plan)
    initial = plan.constrain(plan.initial_weights, np.zeros(len(names), np.int64), 0)
    return dataclasses.replace(plan, initial_weights=initial)


def _windows(domain: DomainTokens, split: str, seq_length: int) -> int:
    number = domain.num_windows(seq_length)
    if number < 1:
        raise InputError(
            f"domain '{domain.name}' has {domain.num_tokens} {split} tokens, fewer than one sample of seq_length {seq_length} needs "
            f"({seq_length + 1}). Lower data.seq_length, leave the domain out, or prepare with a larger validation fraction."
        )
    return number


def _mixture(config: RunConfig, names: tuple[str, ...], natural: Floats) -> Floats:
    if config.mixture == "natural":
        return natural
    if config.mixture == "uniform":
        return np.full(len(names), 1 / len(names))
    return normalise_weights(config.mixture, names, "mixture")


def _check_epochs(plan: Plan) -> None:
    max_epochs = plan.config.data.max_epochs
    if max_epochs is None:
        return
    available = float(max_epochs * plan.num_samples.sum())
    if available < plan.total_samples:
        raise InputError(
            f"data.max_epochs {max_epochs:g} allows {available:.0f} samples of the {len(plan.domains)} domains together, but train.steps x "
            f"train.global_batch asks for {plan.total_samples}. Allow more epochs, train for fewer steps, or add data."
        )
