"""What the train loop asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megamix.data.loader import Batch


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    stage: int
    num_stages: int
    device: torch.device

    @property
    def reads_data(self) -> bool:
        """Only the first stage (tokens) and the last (labels, domains) need the batch."""
        return self.stage in (0, self.num_stages - 1)

    @property
    def has_loss(self) -> bool:
        return self.stage == self.num_stages - 1


@dataclass(frozen=True)
class ParameterState:
    """A parameter with its optimizer state, whole and in fp32, as checkpoints hold it."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Engine(ABC):
    """A model, its optimizer and a pipeline schedule over the ranks of the job."""

    place: Place

    @abstractmethod
    def train_step(self, batch: Batch | None, lr: float, on_statistics: Callable[[torch.Tensor], None]) -> None:
        """One optimizer step on this rank's part of a global batch (None where the stage reads no data).

        ``on_statistics`` is called exactly once, with this rank's int64 [K, C] sums of the step (zeros on a rank
        without the loss), as soon as the last micro-batch has gone forward, so that their all-reduce runs beside the
        backward pass.
        """

    @abstractmethod
    def evaluate(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor:
        """This rank's int64 [K, C] sums over a validation batch, without touching training state."""

    @abstractmethod
    def grad_norm(self) -> float | None:
        """The global gradient norm of the last step, before clipping; waits for the device, so for log lines only."""

    @abstractmethod
    def layers(self) -> list[int]:
        """The pipeline layers that live on this rank."""

    @abstractmethod
    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        """(Hugging Face name, state) of each parameter of a layer; every data-parallel rank must take part."""

    @abstractmethod
    def load_layer_state(self, layer: int, state: dict[str, ParameterState]) -> None:
        """Sets what `layer_state` gave, whatever the layout it was taken from."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Optimizer steps taken since the start of the run."""

    @optimizer_steps.setter
    @abstractmethod
    def optimizer_steps(self, steps: int) -> None: ...
