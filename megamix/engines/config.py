"""How the model is spread over ranks, and by which engine."""

from __future__ import annotations

from typing import Literal

import pydantic

from megamix.config import Config


class EngineConfig(Config):
    """DeepSpeed: pipeline x data parallelism, ZeRO stage 0 or 1."""

    name: Literal["deepspeed"] = "deepspeed"
    """The engine."""
    pipeline: int = pydantic.Field(default=1, gt=0)
    """Pipeline stages."""
    tensor: int = pydantic.Field(default=1, gt=0)
    """Tensor-parallel ranks; 1 is all that this engine has."""
    data: int | None = pydantic.Field(default=None, gt=0)
    """Data-parallel ranks; default: what the ranks of the job leave after pipeline and tensor, or 1 when megamix starts
    its own ranks."""
    zero: Literal[0, 1] = 1
    """ZeRO stage: 1 spreads the optimizer's state over the data-parallel ranks (2 and 3 do not go with a pipeline)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights and gradients."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    threads: int | None = pydantic.Field(default=None, gt=0)
    """CPU threads per rank; default: the cores of the node divided by its ranks."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.tensor != 1:
            raise ValueError(f"tensor is {self.tensor}, but engine deepspeed has no tensor parallelism. Set it to 1.")
        if self.precision == "bf16" and self.zero == 0:
            raise ValueError(
                "precision bf16 with zero 0 has no fp32 gradients in DeepSpeed. Set zero to 1 (it costs nothing at data 1)."
            )
        return self

    def world_size(self) -> int:
        """Ranks a job of this layout needs, with one data-parallel rank where ``data`` is left open."""
        return self.pipeline * self.tensor * (self.data or 1)

    def data_size(self, world_size: int) -> int:
        """Data-parallel ranks in a job of ``world_size`` ranks.

        Raises:
            ValueError: the layout does not fit the job.
        """
        model_ranks = self.pipeline * self.tensor
        if world_size % model_ranks or (self.data is not None and self.data * model_ranks != world_size):
            wanted = f"pipeline {self.pipeline} x tensor {self.tensor} x data {self.data or 'any'}"
            raise ValueError(f"engine: {wanted} does not make the {world_size} ranks of this job.")
        return world_size // model_ranks
