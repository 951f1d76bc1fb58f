"""The config of a whole run: one YAML file, printed by ``megamix train --help-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from megamix.core.config import Config
from megamix.engines.config import BatchConfig, DeepSpeedConfig, MegatronConfig, TrainConfig, with_default_engine
from megamix.engines.models.config import ModelConfig
from megamix.mixing.mixers import MixerConfig, StaticConfig, wants_evaluation


class SwarmBound(Config):
    """Bounds around a mixture that `megamix swarm propose` has found."""

    from_swarm: Path
    """The swarm's directory; its domains must be those of this run."""
    factor: float = pydantic.Field(ge=0, allow_inf_nan=False)
    """The bound of a domain is this many times its weight there, 1 at most; so 2 for max_weight, or 0.5 for
    min_weight, keeps weights within a factor of 2 of the mixture."""


def _kind_of_bound(value: object) -> str:
    if isinstance(value, SwarmBound) or (isinstance(value, dict) and isinstance(value.get("from_swarm"), str | Path)):
        return "from_swarm"
    return "domains" if isinstance(value, dict) else "number"


Bound = Annotated[
    Annotated[float, pydantic.Tag("number")]
    | Annotated[dict[str, float], pydantic.Tag("domains")]
    | Annotated[SwarmBound, pydantic.Tag("from_swarm")],
    pydantic.Discriminator(_kind_of_bound),
]


class DataConfig(Config):
    """What is read, and in which pieces."""

    manifest: Path
    """manifest.json of `megamix prepare`, or its folder."""
    domains: tuple[str, ...] | None = None
    """The domains to train on, in this order; default: all of the manifest."""
    seq_length: int = pydantic.Field(gt=0)
    """Tokens per sample."""
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
    min_weight: Bound = 0.0
    """No weight falls below this: one number for all, {domain: number} (the others: 0), or {from_swarm: DIR, factor:
    NUMBER}, the weights that a swarm proposes times the factor. Default: 0."""
    max_weight: Bound = 1.0
    """No weight rises above this: one number for all, {domain: number} (the others: 1), or {from_swarm: DIR, factor:
    NUMBER}. Default: 1."""
    eod_mask_loss: bool = False
    """Leave the first token of every document out of the loss: it follows the end of another document, which says
    nothing about it."""
    reset_position_ids: bool = False
    """Count positions from 0 again in every document of a sample (attention still sees the whole sample)."""
    weight_lag: int = pydantic.Field(default=1, ge=1)
    """Steps between the one whose losses change the weights and the first that is sampled with them; what loading ahead
    hides behind."""


class FileMixture(Config):
    """Weights from a file."""

    file: Path
    """JSON: {domain: weight}, DoReMi's domain config, a line of weights.jsonl; or Megatron's blend as text or JSON."""


class RunMixture(Config):
    """Weights that a run has found."""

    from_run: Path
    """Its directory; its domains must be those of this run."""
    which: Literal["mean", "final"] = "mean"
    """mean: over the samples it has trained on, or DoReMi's mean of alpha; final: the last ones, or DoReMi's last
    alpha."""


class SwarmMixture(Config):
    """Weights that a swarm of proxy runs has led to."""

    from_swarm: Path
    """Its directory, with the mixture.json of `megamix swarm propose`; its domains must be those of this run."""


OneMixture = Literal["uniform", "natural"] | dict[str, float] | FileMixture | RunMixture | SwarmMixture


class StageConfig(Config):
    """One stretch of a staged mixture."""

    from_tokens: float = pydantic.Field(ge=0)
    """Tokens of the run before it."""
    weights: OneMixture
    """uniform, natural, {domain: weight}, {file: PATH}, {from_run: RUN} or {from_swarm: DIR}."""


class StagedMixture(Config):
    """Weights that change at stated numbers of tokens."""

    stages: tuple[StageConfig, ...]
    """In rising order; the first has from_tokens 0."""


def _kind_of_mixture(value: object) -> str:
    if isinstance(value, StagedMixture) or (isinstance(value, dict) and isinstance(value.get("stages"), list | tuple)):
        return "stages"
    if isinstance(value, FileMixture) or (isinstance(value, dict) and isinstance(value.get("file"), str | Path)):
        return "file"
    if isinstance(value, RunMixture) or (isinstance(value, dict) and isinstance(value.get("from_run"), str | Path)):
        return "from_run"
    if isinstance(value, SwarmMixture) or (isinstance(value, dict) and isinstance(value.get("from_swarm"), str | Path)):
        return "from_swarm"
    return "weights" if isinstance(value, dict) else "word"


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
    batches: int = pydantic.Field(default=16, gt=0)
    """Micro-batches of validation samples per domain (fewer where a domain has not that many)."""


class ResumeConfig(Config):
    """What may differ between a run and the checkpoint it continues from."""

    accept_changed: tuple[
        Literal["data", "tokenizer", "mixture", "mixer", "constraints", "train", "precision"], ...
    ] = ()
    """What may differ from the run that wrote the checkpoint; everything else that differs refuses the resume. A
    changed mixture is sampled with from there on."""
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
    resume: str = "auto"
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


class LossConfig(Config):
    """The domain loss."""

    implementation: Literal["auto", "triton", "torch"] = "auto"
    """triton: the fused kernel, on a GPU; torch: plain PyTorch; auto: the kernel where it can be used."""


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
    """What decides which samples are read when: all that a trainer of one's own needs of a run's config."""

    data: DataConfig
    mixture: Annotated[
        Annotated[Literal["uniform", "natural"], pydantic.Tag("word")]
        | Annotated[dict[str, float], pydantic.Tag("weights")]
        | Annotated[FileMixture, pydantic.Tag("file")]
        | Annotated[RunMixture, pydantic.Tag("from_run")]
        | Annotated[SwarmMixture, pydantic.Tag("from_swarm")]
        | Annotated[StagedMixture, pydantic.Tag("stages")],
        pydantic.Discriminator(_kind_of_mixture),
    ] = "natural"
    """Initial weights: uniform; natural (each domain's share of the training tokens); {domain: weight}, normalised to
    sum 1; {file: PATH}; {from_run: RUN, which: mean or final}; {from_swarm: DIR}; or {stages: [...]}, in force until
    the mixer first changes the weights."""
    mixer: Annotated[MixerConfig, pydantic.Field(validate_default=True)] = StaticConfig()
    """What changes the weights during the run; default: nothing."""
    shadow: tuple[MixerConfig, ...] = ()
    """Mixers that see what the run's mixer sees and only log the weights they would have asked for, to
    RUN/shadow/NAME.jsonl. They may be added, changed or left out on resume."""
    train: BatchConfig
    checkpoint: ResumeConfig = ResumeConfig()

    @pydantic.model_validator(mode="after")
    def _shadows_see_what_the_mixer_sees(self) -> MixConfig:
        read = getattr(self.mixer, "reference", None)
        for shadow in self.shadow:
            if wants_evaluation(shadow):
                raise ValueError(
                    "a shadow's reward_from is evaluation, and a shadow sees the losses of training only. Set it to training."
                )
            wanted = getattr(shadow, "reference", None)
            if wanted is not None and wanted != read:
                raise ValueError(
                    f"a shadow's reference is {wanted}, but the run's mixer reads {read or 'no reference losses'}. A shadow "
                    "sees only what the run measures: set its reference to null, or give the same to the mixer."
                )
        return self

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_run(cls, data: object) -> object:
        for key, command in (("doremi", "doremi"), ("swarm", "swarm all")):
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
                f"got {value!r}, expected uniform, natural, {{domain: weight}}, {{file: PATH}}, {{from_run: RUN}}, "
                "{from_swarm: DIR} or {stages: [...]}."
            )
        return value


class RunConfig(MixConfig):
    """Everything that defines a run."""

    run_dir: Path
    """Where the run's record and checkpoints go."""
    model: ModelConfig
    engine: Annotated[
        DeepSpeedConfig | MegatronConfig,
        pydantic.Field(discriminator="name"),
        pydantic.BeforeValidator(with_default_engine),
    ] = DeepSpeedConfig()
    """How the model is spread over ranks, and by which engine (name: deepspeed or megatron; default: deepspeed)."""
    train: TrainConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    loss: LossConfig = LossConfig()
    log: LogConfig = LogConfig()
