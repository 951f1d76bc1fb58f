"""Sinks: TensorBoard and Weights & Biases, optional beside the run's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megamix.core.packages import check_extra
from megamix.training.config import RunConfig


class Sink(Protocol):
    """Logs named numbers at steps. The steps of one name rise; names may interleave."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text("alerts", f"{title}: {text}")

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of a Weights & Biases project; a resumed run continues it under the same name."""

    def __init__(self, project: str, config: RunConfig) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        name = config.run_dir.name
        settings = config.model_dump(mode="json")
        self._run: Any = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(config.run_dir), config=settings
        )
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text)

    def close(self) -> None:
        self._run.finish()


def check_sinks(config: RunConfig) -> None:
    """Refuses a sink whose package is not installed.

    Raises:
        InputError: which, and how to install it.
    """
    for name, wanted in (("tensorboard", config.log.tensorboard), ("wandb", config.log.wandb)):
        if wanted:
            check_extra(name, f"log.{name}")


def make_sinks(config: RunConfig, first_step: int) -> list[Sink]:
    """The sinks of the config; ``first_step`` is the first step to log."""
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoardSink(config.run_dir, first_step))
    if config.log.wandb:
        sinks.append(WandbSink(config.log.wandb, config))
    return sinks
