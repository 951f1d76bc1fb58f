"""Engine settings (layout over ranks), and the batch and optimizer settings of a run."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pydantic

from megamix.core.config import Config
from megamix.data.batches import Batches
from megamix.engines.schedule import Schedule, ScheduleName, Shape

_NOT_THERE = {
    "compile": "engine megatron takes the fused layers of Transformer Engine, which torch.compile leaves as they are, or "
    "megatron.core's own, with which it has not been tried. Leave it out, or use name: deepspeed.",
    "fsdp": "no engine shards by FSDP. Leave it out: zero: 3 (deepspeed) spreads weights, gradients and optimizer state over "
    "the data-parallel ranks as FSDP does, distributed_optimizer (megatron) the optimizer's state.",
    "zero": "ZeRO is of engine deepspeed. Leave it out: distributed_optimizer: true spreads the optimizer's state here.",
    "distributed_optimizer": "it is of engine megatron. Leave it out: zero: 1 spreads the optimizer's state here.",
}
"""Keys that people look for, and why there is no such thing."""


REDUCE_BUCKET = 500_000_000
"""Gradients that ZeRO 2 and 3 reduce at once, at most."""
GATHERED_LAYERS = 2
"""Layers whose weights ZeRO 3 holds whole on a rank: the one that computes, and the next one."""


class _LayoutConfig(Config):
    """Settings of both engines."""

    pipeline: int = pydantic.Field(default=1, gt=0, le=10**6)
    """Pipeline stages."""
    data: int | None = pydantic.Field(default=None, gt=0, le=10**6)
    """Data-parallel ranks; default: the ranks of the job divided by the model's, or 1 when megamix starts its own
    ranks."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 keep fp32 master weights and gradients. fp16, for devices without bf16 and engine deepspeed alone,
    scales the loss, and leaves out the steps that show that the scale is too large."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    threads: int | None = pydantic.Field(default=None, gt=0)
    """CPU threads per rank; default: the cores of the node divided by its ranks."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _not_there(cls, data: object) -> object:
        for key, value in data.items() if isinstance(data, dict) else ():
            if key in _NOT_THERE and key not in cls.model_fields:
                raise ValueError(f"{key} is {value!r}, but {_NOT_THERE[key]}")
        return data

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def layout(self) -> dict[str, int]:
        """Parallel sizes whose product is `model_ranks`."""
        raise NotImplementedError

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model."""
        return math.prod(self.layout.values())

    def world_size(self) -> int:
        """Ranks that a job of this layout needs, with one data-parallel rank if ``data`` is not set."""
        return self.model_ranks * (self.data or 1)

    def data_size(self, world_size: int) -> int:
        """Data-parallel ranks in a job of ``world_size`` ranks.

        Raises:
            ValueError: the layout does not match the job.
        """
        if world_size % self.model_ranks or (self.data is not None and self.world_size() != world_size):
            factors = " x ".join(f"{name} {factor}" for name, factor in self.layout.items())
            product = f"{factors} x data {self.data or 'any'}"
            made = f"{self.world_size()} ranks" if self.data else f"a multiple of {self.model_ranks} ranks"
            raise ValueError(
                f"engine: {product} makes {made}, and this job has {world_size}. Change the layout or the ranks."
            )
        return world_size // self.model_ranks


class DeepSpeedConfig(_LayoutConfig):
    """DeepSpeed: pipeline x data parallelism with ZeRO stage 0 or 1, data parallelism with stage 2 or 3."""

    name: Literal["deepspeed"] = "deepspeed"
    """The engine."""
    tensor: Literal[1] = 1
    """Tensor-parallel ranks: this engine has none. Use name: megatron for more than 1."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 1 spreads the optimizer's state over the data-parallel ranks, 2 also the gradients, 3 also the
    weights, which every layer then gathers for its forward and its backward pass. 2 and 3 need pipeline 1."""
    compile: bool = False
    """Compile each decoder layer with torch.compile, at the first step; the loss is a fused kernel without it. Not with
    zero 3."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.precision != "fp32" and self.zero == 0:
            raise ValueError(
                f"precision {self.precision} with zero 0 has no fp32 gradients in DeepSpeed. Set zero to 1 (it costs nothing at "
                "data 1)."
            )
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile is true and zero is 3, which gathers the weights of each module by hooks inside of a layer: "
                "torch.compile would break the layer apart at each of them. Set zero to 2, or leave compile out."
            )
        if self.pipeline > 1 and not self.has_pipeline:
            parts = "gradients" if self.zero == 2 else "gradients and weights"
            raise ValueError(
                f"zero is {self.zero}, which spreads {parts} over the data-parallel ranks, and pipeline is {self.pipeline}: a "
                "pipeline sums gradients over its micro-batches before it reduces them, and DeepSpeed refuses the two together. "
                "Set pipeline to 1, or zero to 1; for less memory a rank there are more pipeline stages, "
                "activation_checkpointing and name: megatron with tensor-parallel ranks."
            )
        return self

    @property
    def has_pipeline(self) -> bool:
        """Whether DeepSpeed's pipeline runs the model, if with one stage; else its plain engine does."""
        return self.zero < 2

    @pydantic.field_validator("tensor", mode="before")
    @classmethod
    def _no_tensor_parallelism(cls, value: object) -> object:
        if value != 1:
            raise ValueError(
                f"tensor is {value}, but engine deepspeed has no tensor parallelism. Set it to 1, or use name: megatron."
            )
        return value

    @property
    def layout(self) -> dict[str, int]:
        return {"pipeline": self.pipeline}


class MegatronConfig(_LayoutConfig):
    """Megatron-core: tensor x pipeline (also interleaved) x context x data parallelism."""

    name: Literal["megatron"]
    """The engine."""
    tensor: int = pydantic.Field(default=1, gt=0, le=10**6)
    """Tensor-parallel ranks: each holds a part of every matrix and of the vocabulary."""
    context: int = pydantic.Field(default=1, gt=0, le=10**6)
    """Context-parallel ranks: each holds a part of every sample. More than 1 needs Transformer Engine's attention."""
    virtual_pipeline: int = pydantic.Field(default=1, gt=0, le=10_000)
    """Chunks of layers per pipeline stage; more than 1 interleaves them, which shrinks the pipeline's idle time."""
    sequence_parallel: bool = False
    """Also split what tensor parallelism leaves whole (norms, dropout) along the sequence; needs Transformer Engine or
    Apex."""
    distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel ranks; needs a GPU with Transformer Engine or Apex."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to their sum inside the matrix product; needs Apex's or Transformer Engine's kernel."""
    transformer_engine: Literal["auto", "on", "off"] = "auto"
    """Transformer Engine's layers; auto: on a GPU where it is installed."""
    checkpoint_format: Literal["layers", "dist"] = "layers"
    """layers: megamix's own files, which both engines read in any layout; dist: model and optimizer through
    megatron.core.dist_checkpointing, which only this engine reads as a whole, in any layout. Megatron-LM can take the
    weights of it, not resume it: iteration, arguments and random states are not in it."""

    @pydantic.field_validator("precision", mode="after")
    @classmethod
    def _without_loss_scaling(cls, value: str) -> str:
        if value == "fp16":
            raise ValueError(
                "precision is fp16, whose range is so small that the loss must be scaled, and engine megatron does not scale it "
                "here. Use bf16, which has the range of fp32, or name: deepspeed where a device has no bf16."
            )
        return value

    @property
    def layout(self) -> dict[str, int]:
        return {"pipeline": self.pipeline, "tensor": self.tensor, "context": self.context}


EngineConfig = DeepSpeedConfig | MegatronConfig


DEFAULT_ENGINE = "deepspeed"
"""The engine of an ``engine`` section without a name."""


class BatchStage(Config):
    """Steps of another global batch."""

    global_batch: int = pydantic.Field(gt=0, le=10**7)
    """Samples per step over all ranks."""
    until_tokens: float = pydantic.Field(gt=0, le=2.0**53)
    """Of steps that begin before this many tokens of the run."""


class BatchConfig(Config):
    """Training settings that decide which samples are read when."""

    steps: int = pydantic.Field(gt=0, le=10**11)
    """Optimizer steps of the whole run."""
    global_batch: int = pydantic.Field(gt=0, le=10**7)
    """Samples per step over all ranks."""
    batch_ramp: tuple[BatchStage, ...] = ()
    """Other global batches before that one, by rising tokens: [{global_batch: 64, until_tokens: 1.0e9}, ...]. A resume
    with another batch records the batches so far here."""
    micro_batch: int = pydantic.Field(gt=0, le=10**7)
    """Samples a rank runs forward at once."""
    seed: int = pydantic.Field(default=1234, ge=0)
    """Fixes the initial weights, the order of the data and dropout."""

    @pydantic.field_validator("batch_ramp")
    @classmethod
    def _rises(cls, stages: tuple[BatchStage, ...]) -> tuple[BatchStage, ...]:
        for before, stage in itertools.pairwise(stages):
            if stage.until_tokens <= before.until_tokens:
                raise ValueError(
                    f"until_tokens {stage.until_tokens:g} follows {before.until_tokens:g}. Give stages in rising order of tokens."
                )
        return stages

    def batches(self, seq_length: int, past: tuple[tuple[int, int], ...] = ()) -> Batches:
        """The global batch of every step.

        Args:
            past: of steps that had samples of another length, see `Batches`.

        Raises:
            ValueError: a stage of ``batch_ramp`` that no step begins in.
        """
        stages = [(stage.global_batch, stage.until_tokens) for stage in self.batch_ramp]
        return Batches.ramp(stages, self.global_batch, seq_length, past)


class TrainConfig(BatchConfig):
    """Training settings: AdamW, and a learning rate by the step."""

    stop_after: int | None = pydantic.Field(default=None, gt=0)
    """Stop, with a checkpoint, once this many steps are done; the schedule still spans ``steps``, so a resume without
    it continues the run."""
    lr: float = pydantic.Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr: float | None = pydantic.Field(default=None, ge=0)
    """Learning rate at the last step, but for schedule: constant; default: a tenth of lr."""
    schedule: ScheduleName = "cosine"
    """What follows the warm-up. cosine, linear: a fall to min_lr at the last step; constant: lr to the end; wsd: lr,
    and a fall over the last decay_steps steps, which can be begun late, from any checkpoint of a run that is level."""
    schedule_over: Literal["steps", "tokens"] = "steps"
    """What warm-up and fall go by where steps differ in size (batch_ramp): steps; or tokens, as if all steps had
    equally many."""
    warmup: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Share of the steps over which the learning rate rises to lr."""
    warmup_steps: int | None = pydantic.Field(default=None, ge=0)
    """Steps of the warm-up, in the place of warmup: they stay what they are in a run of other length."""
    decay_steps: int | None = pydantic.Field(default=None, ge=0)
    """wsd: steps of the fall, the last of the run; 0: none. Default: a tenth of steps."""
    decay_shape: Shape = "linear"
    """wsd: what is left of the way to min_lr after a share x of decay_steps. linear: 1 - x; sqrt: 1 - sqrt(x); cosine:
    half a wave."""
    clip: float = pydantic.Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 leaves gradients as they are."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    """Decay of matrices; biases and norms have none."""
    beta1: float = pydantic.Field(default=0.9, ge=0, lt=1)
    """Adam's decay of the first moment."""
    beta2: float = pydantic.Field(default=0.95, ge=0, lt=1)
    """Adam's decay of the second moment."""
    epsilon: float = pydantic.Field(default=1e-8, gt=0)
    """Adam's epsilon."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}.")
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay_steps is {self.decay_steps}, but schedule {self.schedule} has no decay of its own. Use schedule: wsd, or "
                "leave decay_steps out (null)."
            )
        rise, fall = self._warmup_steps, self._decay_steps if self.schedule == "wsd" else 0
        if rise + fall > self.steps:
            parts = f"warm-up of {rise:,} steps" + (f" and decay of {fall:,}" if self.schedule == "wsd" else "")
            raise ValueError(f"{parts} do not fit into steps {self.steps:,}. Make them shorter, or the run longer.")
        return self

    @property
    def _warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def _decay_steps(self) -> int:
        return round(self.steps / 10) if self.decay_steps is None else self.decay_steps

    @property
    def learning_rate(self) -> Schedule:
        """The learning rate over the run."""
        shape: Shape = "linear" if self.schedule == "linear" else "cosine"
        fall_from: int | None = self._warmup_steps
        if self.schedule == "wsd":
            shape, fall_from = self.decay_shape, self.steps - 1 - self._decay_steps if self._decay_steps else None
        elif self.schedule == "constant":
            fall_from = None
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        return Schedule(self.schedule, self.lr, low, self._warmup_steps, self.steps, fall_from, shape)

    def lr_at(self, step: int, batches: Batches | None = None) -> float:
        """Returns the learning rate of ``step``, counted from 0.

        Args:
            batches: of the run; default: all equal.
        """
        last = self.steps - 1
        if self.schedule_over == "steps" or batches is None or last == 0:
            return self.learning_rate.at(step)
        # The first and the last step stay the first and the last of the schedule.
        return self.learning_rate.at(last * batches.tokens(step) / batches.tokens(last))


BEFORE_THESE_KEYS = {
    "schedule": "cosine",
    "schedule_over": "steps",
    "warmup_steps": None,
    "decay_steps": None,
    "decay_shape": "linear",
}
"""What runs have that began before ``train`` had these keys."""
