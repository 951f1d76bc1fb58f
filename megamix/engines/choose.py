"""The engine that a config names. Each is imported only where it is used: a Megatron user needs no DeepSpeed."""

from __future__ import annotations

from typing import Any

from megamix.engines.base import Engine
from megamix.engines.config import EngineConfig, MegatronConfig, TrainConfig
from megamix.engines.models.config import ModelConfig


def start_distributed(config: EngineConfig) -> None:
    """Joins the process group of the job (torchrun's environment), the way the engine wants it."""
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron.engine import start_distributed as start
    else:
        from megamix.engines.deepspeed.engine import start_distributed as start
    start()


def make_engine(
    config: EngineConfig, model: ModelConfig, train: TrainConfig, *, reset_position_ids: bool = False, **options: Any
) -> Engine:
    """The engine that ``config`` names, with the initial weights of the run's seed; `start_distributed` comes first.

    Args:
        reset_position_ids: whether batches will have positions.
        options: seq_length, num_domains, vocab_size and loss_implementation, as of `DeepSpeedEngine`.
    """
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config, model, train, reset_position_ids=reset_position_ids, **options)
    from megamix.engines.deepspeed.engine import DeepSpeedEngine

    # Here positions travel from stage to stage with the hidden states.
    return DeepSpeedEngine(config, model, train, **options)
