"""The config of a whole run: one YAML file, printed by ``megamix train --help-config``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from megamix.core.config import IS_PATH, Config, DefaultName, kinds_of
from megamix.data.batches import Batches
from megamix.engines.config import DEFAULT_ENGINE, BatchConfig, DeepSpeedConfig, MegatronConfig, TrainConfig
from megamix.engines.models.config import ModelConfig
from megamix.mixing.mixers import MixerConfig, RecommendedConfig, StaticConfig, evaluated
from megamix.mixing.sources import weights_by_domain
from megamix.training.bounds import BoundConfig
from megamix.training.mixture import MixtureConfig
from megamix.training.objective import ObjectiveConfig


class EarlierLength(Config):
    """Steps of a resumed run whose samples had another length."""

    seq_length: int = pydantic.Field(gt=0, le=2**30)
    """Tokens per sample."""
    until_step: int = pydantic.Field(gt=0)
    """Of the steps up to this one."""


class DataConfig(Config):
    """What is read, and in which pieces."""

    manifest: Path
    """manifest.json of `megamix prepare`, or its folder."""
    verify: Literal["sample", "all"] = "sample"
    """What is compared with the manifest before the run. sample: all sizes, the tokenizer and some blocks of the token
    files, other ones each time, in under a second; all: every byte, the ranks sharing the work."""
    domains: tuple[str, ...] | None = None
    """The domains to train on, in this order; default: all of the manifest."""
    seq_length: int = pydantic.Field(gt=0, le=2**30)
    """Tokens per sample. A resume with checkpoint.accept_changed=[sequence] may have another."""
    seq_length_before: tuple[EarlierLength, ...] = ()
    """The lengths that a resumed run had before, which its resolved config is filled in with; not to be given to a new
    run."""
    token_counts: dict[str, float] | None = None
    """{domain: training tokens} that the data set is to have. `megamix doctor --plan-only` works out the epochs from
    them; a data set with other domains is refused."""
    sampling: Literal["low_discrepancy", "iid"] = "low_discrepancy"
    """low_discrepancy: every domain stays within K samples of its share at every position; iid: the domain of every
    sample is drawn by itself (counter-based random numbers). A domain's own samples come once per epoch in both."""
    max_epochs: float | dict[str, float] | None = None
    """After how many epochs a domain is used up, one number for all or {domain: number} (the others: never). Default:
    never, a domain is repeated as often as its weight asks."""
    on_exhausted: Literal["cap", "repeat", "stop"] = "cap"
    """What max_epochs does. cap: bounds each weight by what is left of its domain, so that none is used up before the
    run ends; repeat: the domain is read again, and doctor warns; stop: the run ends, with a checkpoint, before the step
    that would read a domain once more."""
    min_weight: BoundConfig = 0.0
    """No weight falls below this: one number for all, {domain: number} (the others: 0), or {from_swarm: DIR, factor:
    NUMBER}, the weights that a swarm proposes times the factor. A source in a domain's place (`web` of `web:news` and
    `web:forums`) bounds the sum of its domains' weights. Default: 0."""
    max_weight: BoundConfig = 1.0
    """No weight rises above this: one number for all, {domain: number} (the others: 1), or {from_swarm: DIR, factor:
    NUMBER}; a source in a domain's place as for min_weight. Default: 1."""
    eod_mask_loss: bool = False
    """Leave the first token of every document out of the loss: it follows the end of another document, which says
    nothing about it."""
    reset_position_ids: bool = False
    """Count positions from 0 again in every document of a sample."""
    attention: Literal["sample", "document"] = "sample"
    """What a token attends to. sample: all tokens before it in its sample; document: those of its own document alone,
    as if that were a sample, positions included. Documents end where the index files say."""
    weight_lag: int = pydantic.Field(default=1, ge=1, le=10_000)
    """Steps between the one whose losses change the weights and the first that is sampled with them; what loading ahead
    hides behind."""

    @pydantic.field_validator("seq_length_before")
    @classmethod
    def _rises(cls, lengths: tuple[EarlierLength, ...]) -> tuple[EarlierLength, ...]:
        for before, after in itertools.pairwise(lengths):
            if after.until_step <= before.until_step:
                raise ValueError(
                    f"until_step {after.until_step} follows {before.until_step}. Use what a resume has filled in."
                )
        return lengths

    @property
    def past_lengths(self) -> tuple[tuple[int, int], ...]:
        """(tokens of a sample, end step) of the steps before that had another length."""
        return tuple((each.seq_length, each.until_step) for each in self.seq_length_before)

    @property
    def positions_restart(self) -> bool:
        """Whether positions count from 0 in every document."""
        return self.reset_position_ids or self.within_documents

    @property
    def within_documents(self) -> bool:
        """Whether attention stays within documents."""
        return self.attention == "document"


class DomainChangeConfig(Config):
    """How the domains of a resumed run may differ from those it was saved with. What was done already is passed
    over."""

    add: dict[str, float] = pydantic.Field(default={})
    """{domain: weight}: new domains and the weight each begins with; the others are scaled down."""
    remove: tuple[str, ...] = ()
    """Domains that are no longer there; the others are scaled up."""
    split: dict[str, tuple[str, ...] | dict[str, float]] = pydantic.Field(default={})
    """{domain: [parts]}: new domains share the weight of the old one by their training tokens, or by {part: share}."""
    replace: tuple[str, ...] = ()
    """Domains with other data under the same name: they keep their weight and are read from their beginning."""


class EvaluateConfig(Config):
    """Per-domain validation loss, on the same samples every time."""

    every: int = pydantic.Field(default=100, ge=0)
    """Steps between evaluations; one before the first step and one after the last are always made. 0: only those
    two."""
    samples: int = pydantic.Field(default=64, gt=0, le=10**9)
    """Validation samples per domain (fewer where a domain has not that many). `batches` in its place is read as that
    many times train.micro_batch, as in configs written before there was this key."""


class ResumeConfig(Config):
    """What may differ between a run and the checkpoint that it continues from."""

    accept_changed: tuple[
        Literal["data", "tokenizer", "mixture", "mixer", "constraints", "batch", "sequence", "train", "precision"], ...
    ] = ()
    """What may differ from the run that wrote the checkpoint; everything else that differs refuses the resume. A
    changed mixture is sampled with from there on, a changed batch (train.global_batch, train.batch_ramp) or sequence
    (data.seq_length) taken from there on."""
    domains: DomainChangeConfig = DomainChangeConfig()
    """Which domains may be added, removed, split or replaced on resume."""


class CheckpointConfig(ResumeConfig):
    """When a run is saved, and how it continues."""

    every: int = pydantic.Field(default=200, ge=0)
    """Steps between checkpoints; one after the last step is always written. 0: only that one."""
    every_minutes: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """Also save when the last checkpoint, or the start, is this many minutes ago."""
    keep: int = pydantic.Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_every: int = pydantic.Field(default=0, ge=0)
    """Checkpoints of steps that divide by this stay for good, beside the newest. 0: none."""
    asynchronous: bool = True
    """Write files in the background while training goes on, from a copy of weights and moments in host memory (12 bytes
    a parameter over all ranks). An engine's own format is always written before the next step."""
    resume: Annotated[str, IS_PATH] = "auto"
    """auto: continue from the newest complete checkpoint, or start where there is none; never: start anew and refuse a
    run directory that holds one; a path: continue from that checkpoint."""


class GuardConfig(Config):
    """What happens when a loss goes wrong."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A step with a loss or gradient that is NaN or infinite: stop ends the run, the checkpoint before it is the one to
    go on from; skip leaves the weights as they were before the step, names its samples and goes on, which costs one
    host read a step."""
    max_skips: int = pydantic.Field(default=10, gt=0)
    """Steps skipped in a row that end the run all the same."""
    explosion: float = pydantic.Field(default=3.0, ge=0, allow_inf_nan=False)
    """The run ends when the mean loss of a step is above this many times ln(vocabulary), the loss of a guess.
    0: never."""


class WatchdogConfig(Config):
    """When a job whose ranks no longer work together ends itself."""

    silence_seconds: float = pydantic.Field(default=60.0, ge=0, allow_inf_nan=False)
    """A rank that is not heard of for this long (killed, its node gone) ends all others, which say so. 0: never."""
    stall_minutes: float = pydantic.Field(default=30.0, ge=0, allow_inf_nan=False)
    """A job in which no step, evaluation or checkpoint has come to its end for this long is ended. 0: never."""


class AlertsConfig(Config):
    """What is told while it happens: an event of the run, a line on the console, and what `run` says. Once, until it
    has ceased. null: never."""

    forgetting: int | None = pydantic.Field(default=3, ge=1)
    """A domain's validation loss that rose in this many evaluations in a row."""
    stalled: int | None = pydantic.Field(default=None, ge=1)
    """A domain's validation loss that none of this many evaluations in a row brought below its best."""
    jump: float | None = pydantic.Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """A weight that moves by more than this in one change."""
    at_bound: int | None = pydantic.Field(default=None, ge=1)
    """A weight that stands at its data.min_weight or data.max_weight for this many steps."""
    epochs: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)
    """A domain that, at its present weight, is read more often than this by the end of the run; without it, more often
    than data.max_epochs where data.on_exhausted is repeat or stop."""
    data_wait: float | None = pydantic.Field(default=0.5, gt=0, le=1, allow_inf_nan=False)
    """Share of a step spent waiting for data, mean over log.every steps."""
    slowdown: float | None = pydantic.Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    """Throughput that is lower than the median of the last 20 lines of the log by this share."""
    non_finite: bool = True
    """A step that guard.non_finite: skip left out."""
    again_after: int = pydantic.Field(default=100, ge=1)
    """Steps before an alert that has ceased may come again."""
    run: tuple[str, ...] = ()
    """A program and its arguments, run without a shell on rank 0's machine for each alert, which it reads from its
    standard input as one line of JSON; the run does not wait for it."""


class LossConfig(Config):
    """The domain loss."""

    implementation: Literal["auto", "triton", "torch", "linear"] = "auto"
    """triton: the fused kernel, on a GPU; torch: plain PyTorch; linear: from hidden states and output weight, with the
    logits of some rows at a time, by the kernel where it can be used; auto: the kernel where it can be used, in the
    linear form where a micro-batch's logits would take more than a tenth of the GPU's memory."""


class LogConfig(Config):
    """The record of a run beside weights.jsonl."""

    every: int = pydantic.Field(default=10, gt=0)
    """Steps per line of metrics.jsonl and of the log; a line sums over them."""
    tensorboard: bool = False
    """Also write TensorBoard files to RUN/tensorboard (needs the tensorboard extra)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the wandb extra)."""
    samples: bool = False
    """Also write RUN/samples/data_RANK.jsonl, every sample that each data-parallel rank reads: proof of the data
    order."""


class MixConfig(Config):
    """The part of a run's config that decides which samples are read when; enough for a custom trainer."""

    data: DataConfig
    objective: ObjectiveConfig = "natural"
    """What the model is to be good at: the weights of the domains in the objective loss, by which evaluations judge it.
    natural (each domain's share of the training tokens), uniform, or {domain: weight}, normalised to sum 1."""
    mixer: Annotated[MixerConfig, pydantic.Field(validate_default=True)] = StaticConfig()
    """What changes the weights during the run; default: nothing."""
    mixture: MixtureConfig = pydantic.Field(default_factory=lambda given: _first_mixture(given))
    """Initial weights: uniform; natural (each domain's share of the training tokens); {domain: weight}, normalised to
    sum 1, where {source: {weight: WEIGHT, topics: {TOPIC: WEIGHT}}} may stand for the domains `source:topic`;
    {documents: the same, or uniform}, shares of documents, which their mean lengths make weights; {temperature: POWER},
    natural shares to a power; {unimax: {max_epochs: N}}, uniform as far as N epochs of every domain allow; {file:
    PATH}; {from_run: RUN, which: mean or final}; {from_swarm: DIR}; or {stages: [...]}, in force until the mixer first
    changes the weights. Default: natural; with the mixer recommended the objective's weights, unless those leave a
    domain out."""
    shadow: tuple[MixerConfig, ...] = ()
    """Mixers that see what the run's mixer sees and only log the weights they would have asked for, to
    RUN/shadow/NAME.jsonl. They may be added, changed or left out on resume."""
    train: BatchConfig
    checkpoint: ResumeConfig = ResumeConfig()

    @property
    def batches(self) -> Batches:
        """The global batch of every step."""
        return self.train.batches(self.data.seq_length, self.data.past_lengths)

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.batches.position(self.train.steps)

    @pydantic.model_validator(mode="after")
    def _shadows_see_what_the_mixer_sees(self) -> MixConfig:
        read = getattr(self.mixer, "reference", None)
        for shadow in self.shadow:
            if (config := evaluated(shadow)) is not None:
                raise ValueError(
                    f"a shadow sees the losses of training only, but {config.why_evaluated}. {config.without_evaluations}"
                )
            wanted = getattr(shadow, "reference", None)
            if wanted is not None and wanted != read:
                raise ValueError(
                    f"a shadow's reference is {wanted}, but the run's mixer reads {read or 'no reference losses'}. A shadow "
                    "sees only what the run measures: set its reference to null, or give the same to the mixer."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _every_batch_has_a_step(self) -> MixConfig:
        try:
            _ = self.batches
        except ValueError as problem:
            raise ValueError(f"train.batch_ramp: {problem}") from problem
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_run(cls, data: object) -> object:
        for key, command in (("doremi", "doremi"), ("swarm", "swarm all"), ("arena", "arena")):
            if isinstance(data, dict) and key in data and key not in cls.model_fields:
                raise ValueError(
                    f"the key {key} is for `megamix {command}`, which makes several runs. Use that, or remove the key."
                )
        return data

    @pydantic.field_validator("mixture", mode="before")
    @classmethod
    def _known_word(cls, value: object) -> object:
        known = isinstance(value, dict | Config) or value in ("uniform", "natural")
        if not known:
            raise ValueError(
                f"got {value!r}, expected uniform, natural, {{domain: weight}}, {{documents: {{domain: share}}}}, "
                "{temperature: POWER}, {unimax: {max_epochs: N}}, {file: PATH}, {from_run: RUN}, {from_swarm: DIR} or {stages: [...]}."
            )
        return value


def _first_mixture(given: Mapping[str, Any]) -> Any:
    """The default of ``mixture``, by the keys before it. `recommended` follows the objective, so that steps with other
    weights, before its first update acts, would only be lost; a weight of 0 would keep a domain from it for good."""
    objective = given.get("objective", "natural")
    follows = isinstance(given.get("mixer"), RecommendedConfig)
    if isinstance(objective, Mapping) and follows:
        follows = all(weights_by_domain(objective, "objective").values())
    return objective if follows else "natural"


class RunConfig(MixConfig):
    """Everything that defines a run."""

    run_dir: Path
    """Where the run's record and checkpoints go."""
    model: ModelConfig
    engine: Annotated[
        DeepSpeedConfig | MegatronConfig,
        pydantic.Field(discriminator="name"),
        DefaultName(DEFAULT_ENGINE),
    ] = DeepSpeedConfig()
    """How the model is spread over ranks, and by which engine (name: deepspeed or megatron; default: deepspeed)."""
    train: TrainConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    alerts: AlertsConfig = AlertsConfig()
    loss: LossConfig = LossConfig()
    log: LogConfig = LogConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _samples_of_batches(cls, data: object) -> object:
        """Configs outside, and those that older runs recorded, count micro-batches."""
        evaluate = data.get("evaluate") if isinstance(data, dict) else None
        if not isinstance(data, dict) or not isinstance(evaluate, dict) or "batches" not in evaluate:
            return data
        batches = evaluate["batches"]
        if "samples" in evaluate:
            raise ValueError(
                f"evaluate: samples is {evaluate['samples']} and batches is {batches}, and either says how many samples a "
                "domain is evaluated on. Remove batches."
            )
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(
                f"evaluate.batches is {batches!r}, expected a whole number above 0. Or give evaluate.samples."
            )
        train = data.get("train")
        micro_batch = train.get("micro_batch") if isinstance(train, dict) else getattr(train, "micro_batch", None)
        # A micro-batch that is none is reported under its own key.
        samples = batches * (micro_batch if isinstance(micro_batch, int) and micro_batch > 0 else 1)
        kept = {key: value for key, value in evaluate.items() if key != "batches"}
        return {**data, "evaluate": {**kept, "samples": samples}}


KINDS = kinds_of(RunConfig)
"""The keys of a run's config whose mappings are of several kinds; for `megamix.core.config_files.merge`."""
