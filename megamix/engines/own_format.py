"""Engines that can write their part of a checkpoint in a format of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch


class OwnFormat(ABC):
    """What such an engine adds to `Engine`."""

    own_format: str
    """The name of the format, and of the folder of a checkpoint that holds it."""

    @property
    @abstractmethod
    def saves_own_format(self) -> bool:
        """Whether checkpoints are to be written in it, instead of layer by layer."""

    @abstractmethod
    def own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of what this rank holds of weights and moments, no copies; to look at before they are
        written."""

    @abstractmethod
    def save_own(self, folder: Path) -> None:
        """Writes weights and optimizer state into an empty folder; every rank calls it."""

    @abstractmethod
    def load_own(self, folder: Path, steps: int) -> None:
        """Sets them from a folder that `save_own` filled, in whatever layout, after ``steps`` optimizer steps; every
        rank calls it."""
