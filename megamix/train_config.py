"""The optimisation of a run: how long, how large the steps, which learning rate."""

from __future__ import annotations

import math

import pydantic

from megamix.config import Config


class BatchConfig(Config):
    """What of the optimisation decides which samples are read when."""

    steps: int = pydantic.Field(gt=0)
    """Optimizer steps of the whole run."""
    global_batch: int = pydantic.Field(gt=0)
    """Samples per step over all ranks."""
    micro_batch: int = pydantic.Field(gt=0)
    """Samples a rank runs forward at once."""
    seed: int = pydantic.Field(default=1234, ge=0)
    """Fixes the initial weights, the order of the data and dropout."""


class TrainConfig(BatchConfig):
    """AdamW with linear warm-up and cosine decay."""

    stop_after: int | None = pydantic.Field(default=None, gt=0)
    """Stop, with a checkpoint, once this many steps are done; the schedule stays that of ``steps``, so a resume without
    it continues the run."""
    lr: float = pydantic.Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr: float | None = pydantic.Field(default=None, ge=0)
    """Learning rate at the last step; default: a tenth of lr."""
    warmup: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Share of the steps over which the learning rate rises to lr."""
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
        return self

    def lr_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        warmup_steps = round(self.warmup * self.steps)
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.steps - 1 - warmup_steps)
        return low + (self.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
