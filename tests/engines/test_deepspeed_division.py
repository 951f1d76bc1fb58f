"""The gradient that a loss sends into the model under DeepSpeed, whatever DeepSpeed divides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamix.engines.deepspeed.division import UndividedLoss, leave_outputs_undivided


@pytest.mark.parametrize("divisor", [1.0, 3.0])
def test_what_comes_in_is_passed_over(divisor: float) -> None:
    squares: Any = lambda output, targets: output.square().sum()  # noqa: E731
    loss, output = UndividedLoss(squares), torch.tensor([2.0, 3.0], requires_grad=True)
    loss.gradient = 8.0
    found = loss(output, ())
    assert found.item() == 13
    (found / divisor).backward()
    assert output.grad is not None
    assert output.grad.tolist() == [2 * 2 * 8, 2 * 3 * 8]


def test_gradients_of_outputs_stay() -> None:
    """Where a release has a hook on them; one without stays without."""
    with_hook = SimpleNamespace(_backward_prologue_per_tensor=lambda gradient: gradient / 4)
    leave_outputs_undivided(with_hook)
    assert with_hook._backward_prologue_per_tensor(1.0) == 1.0
    without = SimpleNamespace()
    leave_outputs_undivided(without)
    assert not vars(without)
