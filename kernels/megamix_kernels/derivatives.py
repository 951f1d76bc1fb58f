"""The refusal of second derivatives, which the kernels do not compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Any:
    """Decorates a backward pass whose gradients must not be differentiated again: whoever does so gets an error.

    Of `torch.autograd.function.once_differentiable` they get one only where the incoming gradient needs a gradient
    itself. That of a loss is mostly a constant, and the second derivative would be silently incomplete.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grad_outputs: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grad_outputs)
        if not torch.is_grad_enabled():  # nobody asked for create_graph
            return gradients
        return tuple(_Once.apply(gradient.requires_grad_()) if gradient is not None else None for gradient in gradients)

    return once


class _Once(torch.autograd.Function):
    """The gradient itself, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(
            "the loss kernels have first derivatives only; where a gradient is differentiated again (a penalty of its "
            "norm, a Hessian), use torch.nn.functional.cross_entropy"
        )
