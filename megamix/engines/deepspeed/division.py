"""The gradient of a micro-batch's loss, whatever DeepSpeed divides by the number of micro-batches.

Its releases divide the loss (0.19), under a pipeline nothing (0.16), or the gradient of every stage's output, after the
loss and once more on each stage before the last (0.18). Here nothing is divided: the loss sends a gradient that the
engine sets into the model, and the hook on outputs is switched off.
"""

from __future__ import annotations

from typing import Any

import torch

from megamix.engines.step_loss import StepLoss


class UndividedLoss:
    """A `StepLoss` whose gradient is set, not what DeepSpeed's backward pass sends.

    Attributes:
        gradient: of each loss of the step: 1, or the loss scale under fp16.
    """

    def __init__(self, loss: StepLoss) -> None:
        self._loss = loss
        self.gradient = 1.0

    def __call__(self, output: Any, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """As `StepLoss`."""
        loss: Any = _SetGradient.apply(self._loss(output, targets), self.gradient)
        return loss


class _SetGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradient: float) -> torch.Tensor:
        ctx.gradient = gradient
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
        return torch.full_like(grads[0], ctx.gradient), None


def leave_outputs_undivided(engine: Any) -> None:
    """Switches DeepSpeed's hook on the gradients of outputs off, in releases that have one."""
    if hasattr(engine, "_backward_prologue_per_tensor"):
        # Called by name in every forward pass, for the gradient of each output.
        engine._backward_prologue_per_tensor = lambda gradient: gradient
