"""Resolved run plan: a config with its data and ranks, checked before any time is spent.

A `DataPlan` serves any trainer; a `Plan` adds the model and the ranks. `make_plan` reads the manifest and the heads of
the data files and needs neither torch nor a GPU. `megamix doctor` prints a plan, `megamix train` starts from one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import Config
from megamix.core.errors import InputError, did_you_mean, given_twice
from megamix.core.text import by_name, listed
from megamix.data.blend.blend import Blend
from megamix.data.blend.permute import hash_words
from megamix.data.reference_losses import FILE_NAME as LOSSES
from megamix.data.reference_losses import read_info
from megamix.data.sampler import Slice
from megamix.data.tokens.block_files import Verified
from megamix.data.tokens.manifest import DomainEntry, Manifest
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.verify import verify_all, verify_sample
from megamix.data.verify_losses import verify_losses
from megamix.engines.compilation import check_compiler
from megamix.engines.config import MegatronConfig
from megamix.engines.megatron.layout import check_megatron_layout, check_megatron_machine, check_within_documents
from megamix.engines.models.config import ModelConfig
from megamix.mixing.mixers import find_mixer
from megamix.training.config import MixConfig, RunConfig
from megamix.training.mix_plan import MixPlan, document_tokens, make_policy
from megamix.training.objective import objective_weights

if TYPE_CHECKING:
    from megamix.data.blend.rest import Rest
    from megamix.data.loader import WindowReader
    from megamix.data.reference_losses import ReferenceLosses
    from megamix.engines.models.pretrained import PretrainedWeights

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DataPlan(MixPlan):
    """Resolved data plan.

    Attributes:
        manifest: of the data set.
        data_size: data-parallel ranks.
        entries: of the manifest, one a domain.
        domains, validation: their opened token streams.
        verified: what was compared with the manifest; None: nothing.
        verified_losses: what was compared of the reference losses; None: nothing.
    """

    manifest: Manifest
    data_size: int
    entries: tuple[DomainEntry, ...]
    domains: list[DomainTokens]
    validation: list[DomainTokens]
    verified: Verified | None
    verified_losses: Verified | None

    def warnings(self) -> list[str]:
        """Settings that work and are probably not meant, and data that could not be verified."""
        verified = (each for each in (self.verified, self.verified_losses) if each is not None)
        found = [*super().warnings(), *(each.warning for each in verified if each.warning is not None)]
        if self.unevaluated:
            found.append(
                f"no sample of validation text (seq_length {self.config.data.seq_length} needs {self.config.data.seq_length + 1} "
                f"tokens): {listed(self.unevaluated)}. Trained on, not evaluated; the objective loss is of the other domains."
            )
        if single := self._judged_by_one_document:
            found.append(
                f"validation text of one document: {listed(single)}. Such a loss has no standard error, and so the objective "
                "loss has none. Hold out more documents (prepare --validation)."
            )
        if self.config.data.within_documents and (whole := self.of_one_document):
            found.append(
                f"data.attention is document, but the index files know one document each of {listed(whole)}: attention is over "
                "whole samples there."
            )
        return found

    @cached_property
    def of_one_document(self) -> tuple[str, ...]:
        """The domains whose training tokens are all of one document."""
        return tuple(stream.name for stream in self.domains if stream.num_documents < 2)

    @property
    def _judged_by_one_document(self) -> list[str]:
        """The domains of the objective whose validation text is one document, with its tokens."""
        texts = zip(self.validation, self.objective_weights, strict=True)
        evaluated = set(self.evaluated)
        return [
            f"{stream.name} ({stream.num_tokens:,} tokens)"
            for k, (stream, weight) in enumerate(texts)
            if k in evaluated and weight > 0 and stream.num_documents < 2
        ]

    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """The numbers of the domains with at least one sample of validation text."""
        length = self.config.data.seq_length
        return tuple(k for k, stream in enumerate(self.validation) if stream.num_windows(length) > 0)

    @cached_property
    def unevaluated(self) -> tuple[str, ...]:
        """The domains without one: they are in no evaluation."""
        evaluated = set(self.evaluated)
        return tuple(name for k, name in enumerate(self.domain_names) if k not in evaluated)

    def over_evaluated(self, weights: Floats) -> dict[str, float]:
        """{domain: weight} of the `evaluated` domains, in the ratios and with the sum of ``weights`` (float64 [K])."""
        if not self.unevaluated:
            return by_name(self.domain_names, weights)
        part = weights[list(self.evaluated)]
        return by_name([self.domain_names[k] for k in self.evaluated], part * (weights.sum() / part.sum()))

    @property
    def domain_keys(self) -> list[int]:
        """Keys of the domains in the random order."""
        return [domain_key(name) for name in self.domain_names]

    @cached_property
    def reference_sha256(self) -> str | None:
        """SHA-256 of the checkpoint whose losses the mixer reads; None where it reads none.

        Raises:
            InputError: these losses are not there, or not finished.
        """
        folder = getattr(self.config.mixer, "reference", None)
        return None if folder is None else read_info(folder).checkpoint_sha256

    def mixer_identity(self, mixer: Config) -> dict[str, Any]:
        """The config of the run's mixer or of a shadow, JSON-serialisable. The folder of reference losses may move, so
        the hash of the reference model stands in its place."""
        found = mixer.model_dump(mode="json")
        return found if found.get("reference") is None else {**found, "reference": self.reference_sha256}

    def mixer_fingerprint(self, mixer: Config) -> dict[str, Any]:
        """What must not change on resume, JSON-serialisable: the `mixer_identity`, and the objective of a mixer that
        follows it. The words natural and uniform stay what they are where the domains change."""
        found: dict[str, Any] = {"mixer": self.mixer_identity(mixer)}
        if find_mixer(getattr(mixer, "name", None))[1].follows_objective:
            given = self.config.objective
            weights = self.objective_weights.tolist()
            found["objective"] = given if isinstance(given, str) else dict(zip(self.domain_names, weights, strict=True))
        return found

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer."""
        return self.manifest.tokenizer.vocab_size

    def share(self, data_rank: int) -> Slice:
        """The part of a global batch, of ``train.global_batch`` samples, that a data-parallel rank reads."""
        train = self.config.train
        return Slice(train.global_batch, train.micro_batch, data_rank, self.data_size)

    def reader(
        self,
        streams: Sequence[DomainTokens],
        reference: ReferenceLosses | None = None,
        rests: Mapping[int, Rest] | None = None,
    ) -> WindowReader:
        """Reader of the samples of a split: `domains` or `validation`; for the other arguments see `WindowReader`."""
        from megamix.data.loader import WindowReader

        data = self.config.data
        return WindowReader(
            streams,
            data.seq_length,
            self.vocab_size,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.positions_restart,
            reference=reference,
            rests=rests,
        )

    def blend(self, through_step: int | None = None) -> Blend:
        """The blend at position 0; see `WeightPolicy.initial_blend`."""
        config = self.config
        return self.policy.initial_blend(config.train.seed, self.domain_keys, config.data.sampling, through_step)


@dataclass(frozen=True)
class Plan(DataPlan):
    """Resolved run plan.

    Attributes:
        model: with its vocabulary resolved.
        world_size: ranks of the job.
    """

    config: RunConfig
    model: ModelConfig
    world_size: int

    @property
    def softmax_size(self) -> int:
        """Token ids that join the softmax."""
        return self.model.token_ids or self.vocab_size

    def pretrained(self) -> PretrainedWeights | None:
        """The weights that ``model.from_pretrained`` names; None where it names none.

        Raises:
            InputError: the folder is no such model, or its tokenizer is not the data's.
        """
        if self.model.from_pretrained is None:
            return None
        from megamix.engines.models.pretrained import read_pretrained

        tokenizer = self.manifest.tokenizer
        return read_pretrained(self.model, self.manifest.folder / tokenizer.file, tokenizer.vocab_size)


def domain_key(name: str) -> int:
    """The key of a domain in the random order, independent of its place in the manifest."""
    return int(hash_words(*name.encode()))


def make_plan(
    config: RunConfig,
    world_size: int | None = None,
    *,
    verify: bool = True,
    share: tuple[int, int] = (0, 1),
    begun: Callable[[RunConfig], RunConfig] | None = None,
) -> Plan:
    """Resolves ``config`` for a job of ``world_size`` ranks (default: the fewest that its layout needs).

    Args:
        verify: also check every index (`IndexedTokens`) and verify the data; on one rank of a job.
        share: number of this rank, and of ranks, that do ``data.verify: all`` together, also without ``verify``.
        begun: the config with the batches that the run has had so far; asked where the weights that ``config`` wants
            cannot be with its own batches from the first step on.

    Raises:
        InputError: anything that would stop the run later.
        DataChanged: the data are not those of the manifest.
    """
    _, data_size = check_layout(config, world_size)
    check_compiler(config.engine)
    if isinstance(config.engine, MegatronConfig):
        check_megatron_machine(config.engine)
    earlier = None if begun is None else partial(begun, config)
    data = make_data_plan(config, data_size, verify=verify, share=share, begun=earlier)
    model = config.model.with_vocabulary(data.vocab_size)
    # Once more: now the rows of the embedding are known.
    ranks, _ = check_layout(config.model_copy(update={"model": model}), world_size)
    parts = {field.name: getattr(data, field.name) for field in fields(data)}
    return Plan(**{**parts, "config": config, "model": model, "world_size": ranks})


def make_data_plan(
    config: MixConfig,
    data_size: int,
    *,
    verify: bool = True,
    share: tuple[int, int] = (0, 1),
    begun: Callable[[], MixConfig] | None = None,
) -> DataPlan:
    """Resolves the data side of ``config`` for ``data_size`` data-parallel ranks; see `make_plan`.

    Raises:
        InputError: anything about data, mixture or batches that would stop the run later.
        DataChanged: the data are not those of the manifest.
    """
    check_batches(config, data_size)
    manifest = Manifest.load(config.data.manifest)
    entries = _entries(config, manifest)
    names = tuple(entry.name for entry in entries)
    verified, verified_losses = _verify(config, manifest, entries, verify, share)
    domains = [manifest.open_domain(name, "train", verify=verify) for name in names]
    validation = [manifest.open_domain(name, "validation", verify=verify) for name in names]
    num_samples = np.array([_windows(domain, "training", config.data.seq_length) for domain in domains], np.int64)
    natural, lengths = manifest.natural_weights(names), document_tokens(entries)
    objective = objective_weights(config.objective, names, natural)  # before the mixture, which may follow it
    try:
        policy = make_policy(config, names, num_samples, natural, lengths)
    except InputError:
        earlier = config if begun is None else begun()
        if earlier is config:
            raise
        policy = make_policy(earlier, names, num_samples, natural, lengths)
    plan = DataPlan(
        config=config,
        domain_names=names,
        num_samples=num_samples,
        natural_weights=natural,
        objective_weights=objective,
        policy=policy,
        manifest=manifest,
        data_size=data_size,
        entries=entries,
        domains=domains,
        validation=validation,
        verified=verified,
        verified_losses=verified_losses,
    )
    if not plan.evaluated:
        _windows(validation[0], "validation", config.data.seq_length)
    if config.data.within_documents and len(plan.of_one_document) == len(names):
        raise InputError(
            f"data.attention is document, but the index files of {manifest.folder} know one document for every domain, so "
            "where documents end is not known. Prepare the data with one document a text, or leave data.attention out."
        )
    if not plan.objective_weights[list(plan.evaluated)].any():
        raise InputError(
            f"objective gives weight to {listed(plan.unevaluated)} alone, of which there is no sample of validation text to "
            "evaluate. Give it to other domains, lower data.seq_length, or prepare with a larger validation fraction."
        )
    return plan


def _verify(
    config: MixConfig, manifest: Manifest, entries: Sequence[DomainEntry], verify: bool, share: tuple[int, int]
) -> tuple[Verified | None, Verified | None]:
    """Verifies the data and, where they are there, the reference losses; see `make_plan`."""
    folder, names = getattr(config.mixer, "reference", None), [entry.name for entry in entries]
    if folder is not None and not (folder / LOSSES).is_file():
        folder = None  # whoever opens the losses says so
    if config.data.verify == "all" and (verify or share[1] > 1):
        progress = share[0] == 0
        data = verify_all(manifest, entries, share=share, progress=progress)
        return data, None if folder is None else verify_losses(folder, names, share=share, progress=progress)
    if not verify:
        return None, None
    data = verify_sample(manifest, entries)
    return data, None if folder is None else verify_losses(folder, names, sample=True)


def check_layout(config: RunConfig, world_size: int | None = None) -> tuple[int, int]:
    """The ranks of the job and the data-parallel ranks among them; see `make_plan`.

    Raises:
        InputError: ranks, pipeline stages, parts of the model or batches that do not divide.
    """
    engine = config.engine
    ranks = world_size or engine.world_size()
    try:
        data_size = engine.data_size(ranks)
    except ValueError as error:
        raise InputError(str(error)) from error
    numbers = check_batches(config, data_size)
    if isinstance(engine, MegatronConfig):
        for micro_batches in numbers:
            check_megatron_layout(engine, config.model, config.data.seq_length, micro_batches, config.model.vocab_size)
        if config.data.within_documents:
            check_within_documents(engine)
    elif engine.pipeline > config.model.num_layers:
        raise InputError(
            f"engine.pipeline is {engine.pipeline}, but the model has {config.model.num_layers} decoder layers. "
            "Use at most one stage per layer."
        )
    return ranks, data_size


def check_batches(config: MixConfig, data_size: int) -> list[int]:
    """The micro-batches of a rank in a step, for each size of global batch that the run is still to have.

    Raises:
        InputError: one does not divide into ranks and micro-batches.
    """
    sizes = dict.fromkeys(size for _, size in config.batches.sizes)
    return [Slice(size, config.train.micro_batch, 0, data_size).num_micro_batches for size in sizes]


def _entries(config: MixConfig, manifest: Manifest) -> tuple[DomainEntry, ...]:
    """The domains to train on: all of the manifest, or those that ``data.domains`` names."""
    wanted = config.data.domains
    planned = config.data.token_counts
    if planned is not None and set(planned) != {entry.name for entry in manifest.domains}:
        missing = ", ".join(sorted(set(planned).symmetric_difference(entry.name for entry in manifest.domains)))
        raise InputError(
            f"data.token_counts and {config.data.manifest} do not have the same domains: {missing} is only in one of them. "
            "Correct the names, or leave token_counts out."
        )
    if wanted is None:
        return manifest.domains
    known = {entry.name: entry for entry in manifest.domains}
    for name in wanted:
        if name not in known:
            raise InputError(
                f"data.domains: {config.data.manifest} has no domain '{name}'." + did_you_mean(name, known)
            )
    if doubled := given_twice(wanted):
        raise InputError(f"data.domains names '{doubled[0]}' twice. Name each domain once.")
    if not wanted:
        raise InputError("data.domains is empty. Name at least one domain, or leave it out for all.")
    return tuple(known[name] for name in wanted)


def _windows(domain: DomainTokens, split: str, seq_length: int) -> int:
    number = domain.num_windows(seq_length)
    if number < 1:
        raise InputError(
            f"domain '{domain.name}' has {domain.num_tokens} {split} tokens, fewer than one sample of seq_length {seq_length} needs "
            f"({seq_length + 1}). Lower data.seq_length, leave the domain out of data.domains, or prepare with a larger validation fraction."
        )
    return number
