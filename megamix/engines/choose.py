"""Choice of the engine by config. Imports are lazy, so Megatron users need no DeepSpeed."""

from __future__ import annotations

from typing import Any

from megamix.engines.base import Engine
from megamix.engines.config import EngineConfig, MegatronConfig, TrainConfig
from megamix.engines.models.config import ModelConfig


def start_distributed(config: EngineConfig) -> None:
    """Joins the job's process group (torchrun's environment) as the engine requires."""
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron.engine import start_distributed as start
    else:
        from megamix.engines.deepspeed.engine import start_distributed as start
    start()


def make_engine(
    config: EngineConfig, model: ModelConfig, train: TrainConfig, *, reset_position_ids: bool = False, **options: Any
) -> Engine:
    """Builds the configured engine with the initial weights of the run's seed; call `start_distributed` first.

    Args:
        reset_position_ids: whether batches have positions.
        options: keyword arguments of `DeepSpeedEngine`; with ``within_documents``, batches must have positions.
    """
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config, model, train, reset_position_ids=reset_position_ids, **options)
    from megamix.engines.deepspeed.engine import DeepSpeedEngine

    # Under DeepSpeed positions travel from stage to stage with the hidden states.
    return DeepSpeedEngine(config, model, train, **options)
