"""Engine interface of the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megamix.data.loader import Batch
from megamix.engines.loss_scale import LossScale
from megamix.engines.step_loss import Objective, StepLoss

# Long enough for a slow file system at start-up; a dead rank is noticed earlier, by its closed connections and by the
# parent process.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)


def local_device() -> torch.device:
    """GPU of this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Position of this process in the job."""

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
    """Whether the middle stages need the batch too."""

    @property
    def reads_data(self) -> bool:
        """Whether this stage needs the batch: the first reads tokens, the last labels and domains."""
        return self.reads_all_stages or self.stage == 0 or self.has_loss

    @property
    def has_loss(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank represents all ranks that compute the same samples in the same stage."""
        return self.tensor_rank == 0 and self.context_rank == 0


@dataclass(frozen=True)
class ParameterState:
    """Whole parameter with its optimizer state, in fp32, as in checkpoints."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Engine(ABC):
    """Model, optimizer and pipeline schedule over the ranks of the job."""

    place: Place
    micro_batch_multiple: int = 1
    """Divisor of the number of micro-batches in a step or an evaluation."""
    loss_scale: LossScale | None = None
    """Scale of the loss in fp16; `train_step` uses and updates it."""
    scaling: str | None = None
    """What to say of the last step where it was left out and the loss scale fell; None where it did not. A loss that is
    not finite makes it fall, too."""
    _loss: StepLoss

    @abstractmethod
    def train_step(
        self,
        batch: Batch | None,
        objective: Objective,
        lr: float,
        on_statistics: Callable[[torch.Tensor], None],
        num_micro_batches: int | None = None,
    ) -> bool:
        """Takes one optimizer step on this rank's part of a global batch (None where the stage reads no data).

        Args:
            num_micro_batches: of this rank; default: those of ``train.global_batch``.

        Calls ``on_statistics`` exactly once, with this rank's int64 [K, C] sums of the step (zeros on a rank without
        the loss), right after the last micro-batch's forward pass, so that their all-reduce overlaps the backward pass.

        Returns:
            False if the engine saw a loss or a gradient that is not finite; the same on all ranks. With
            ``skip_non_finite`` the engine checks every step, and such a step leaves weights and optimizer unchanged;
            otherwise it reports only what it computes anyway, and the weights are undefined.
        """

    def non_finite_counts(self) -> torch.Tensor | None:
        """Tokens with a non-finite loss in each of this rank's samples, int32 [M, B] on the device; None on a rank
        without the loss, or if another rank reports them.

        Covers the last training step, from its ``on_statistics`` on; later steps do not overwrite the tensor.
        """
        return self._loss.non_finite_counts if self.place.has_loss else None

    def evaluate(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor:
        """Returns this rank's int64 [K, C] sums over a validation batch; training state is unchanged."""
        self._loss.start_evaluation()
        self._forward(batch, num_micro_batches)
        return self._loss.evaluation_sums

    def token_losses(self, batch: Batch | None, num_micro_batches: int) -> torch.Tensor | None:
        """Returns the token losses of this rank's part of a batch, float32 [M, B, S] (0 where the label is ignored);
        None on a rank without the loss."""
        self._loss.start_evaluation(keep_token_losses=True)
        self._forward(batch, num_micro_batches)
        return self._loss.token_losses()

    @abstractmethod
    def _forward(self, batch: Batch | None, num_micro_batches: int) -> None:
        """Runs the model without gradients and hands the logits of each micro-batch to the loss."""

    @abstractmethod
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; waits for the device, so use it for log lines only."""

    @abstractmethod
    def layers(self) -> list[int]:
        """Indices of the pipeline layers on this rank."""

    def layers_to_load(self) -> list[int]:
        """Indices of the pipeline layers that `load_layer_state` must be given on this rank."""
        return self.layers()

    @abstractmethod
    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        """Yields (Hugging Face name, state) of each whole parameter of a layer; collective over the ranks that hold a
        part of the layer."""

    @abstractmethod
    def load_layer_state(self, layer: int, state: dict[str, ParameterState]) -> None:
        """Loads the result of `layer_state`, taken in any layout."""

    @property
    @abstractmethod
    def optimizer_steps(self) -> int:
        """Optimizer steps since the start of the run. Setting it zeroes Adam's moments, for `load_layer_state`."""

    @optimizer_steps.setter
    @abstractmethod
    def optimizer_steps(self, steps: int) -> None: ...


class OwnFormat(ABC):
    """Additional interface of an engine with its own checkpoint format."""

    own_format: str
    """Name of the format, and of its folder in a checkpoint."""

    @property
    @abstractmethod
    def saves_own_format(self) -> bool:
        """Whether checkpoints use this format instead of layer files."""

    @abstractmethod
    def own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) of this rank's weights and moments, without copies, for checks before a save."""

    @abstractmethod
    def save_own(self, folder: Path) -> None:
        """Writes weights and optimizer state into an empty folder; collective."""

    @abstractmethod
    def load_own(self, folder: Path, steps: int) -> None:
        """Loads a folder that `save_own` wrote in any layout, after ``steps`` optimizer steps; collective."""
