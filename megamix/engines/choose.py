"""The engine that a config names. Each is imported only where it is used: a Megatron user needs no DeepSpeed."""

from __future__ import annotations

from typing import Any

from megamix.engines.base import Engine
from megamix.engines.config import EngineConfig, MegatronConfig


def start_distributed(config: EngineConfig) -> None:
    """Joins the process group of the job (torchrun's environment), the way the engine wants it."""
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron import start_distributed as start
    else:
        from megamix.engines.deepspeed import start_distributed as start
    start()


def make_engine(config: EngineConfig, *arguments: Any, **options: Any) -> Engine:
    """The engine that ``config`` names, with the initial weights of the run's seed; arguments as of `DeepSpeedEngine`.

    `start_distributed` comes first.
    """
    if isinstance(config, MegatronConfig):
        from megamix.engines.megatron import MegatronEngine

        return MegatronEngine(config, *arguments, **options)
    from megamix.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, *arguments, **options)
