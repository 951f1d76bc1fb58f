"""What the train loop asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megamix.data.loader import Batch

# Long enough for a slow filesystem at start-up; a dead rank is noticed by its closed connections and by whoever started
# the ranks.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)


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
    tensor_rank: int = 0
    context_rank: int = 0
    reads_all_stages: bool = False
    """Whether the stages in between need the batch too."""

    @property
    def reads_data(self) -> bool:
        """Only the first stage (tokens) and the last (labels, domains) need the batch, unless the engine says more."""
        return self.reads_all_stages or self.stage == 0 or self.has_loss

    @property
    def has_loss(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank speaks for all that work on the same samples in the same stage."""
        return self.tensor_rank == 0 and self.context_rank == 0


@dataclass(frozen=True)
class ParameterState:
    """A parameter with its optimizer state, whole and in fp32, as checkpoints hold it."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What a step differentiates: the sum over its tokens of loss_weights[domain] * loss / normaliser.

    Attributes:
        normaliser: known before the forward pass, as every rank knows the tokens of the global batch.
        loss_weights: float32 [K] on the engine's device; None weighs every token 1.
    """

    normaliser: float
    loss_weights: torch.Tensor | None = None


class Engine(ABC):
    """A model, its optimizer and a pipeline schedule over the ranks of the job."""

    place: Place
    micro_batch_multiple: int = 1
    """What the number of micro-batches of a step or an evaluation must divide by."""

    @abstractmethod
    def train_step(
        self, batch: Batch | None, objective: Objective, lr: float, on_statistics: Callable[[torch.Tensor], None]
    ) -> bool:
        """One optimizer step on this rank's part of a global batch (None where the stage reads no data).

        ``on_statistics`` is called exactly once, with this rank's int64 [K, C] sums of the step (zeros on a rank
        without the loss), as soon as the last micro-batch has gone forward, so that their all-reduce runs beside the
        backward pass.

        Returns:
            False where the engine has seen a loss or a gradient that is not finite; the same on all ranks. An engine
            made with ``skip_non_finite`` looks at every step, and has then left weights and optimizer as they were;
            else it tells only what it comes to know anyway, and what became of the weights is not said.
        """

    @abstractmethod
    def non_finite_counts(self) -> torch.Tensor | None:
        """Tokens of each of this rank's samples whose loss was not finite, int32 [M, B] on the device; None on a rank
        without the loss, or where another speaks for it.

        Of the last training step, from its ``on_statistics`` on; a later step does not write over it.
        """

    @abstractmethod
    def evaluate(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor:
        """This rank's int64 [K, C] sums over a validation batch, without touching training state."""

    @abstractmethod
    def token_losses(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor | None:
        """The loss of every token of this rank's part of a batch, float32 [M, B, S] (0 where the label is ignored);
        None on a rank without the loss."""

    @abstractmethod
    def grad_norm(self) -> float | None:
        """The global gradient norm of the last step, before clipping; waits for the device, so for log lines only."""

    @abstractmethod
    def layers(self) -> list[int]:
        """The pipeline layers that live on this rank."""

    @abstractmethod
    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        """(Hugging Face name, state) of each whole parameter of a layer; every rank that holds a part of the layer must
        take part."""

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
