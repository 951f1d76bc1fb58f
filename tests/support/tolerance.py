"""Tolerances that follow from the arithmetic, so that they hold on any machine and still show a fault.

Processors, thread counts, layouts and kernels add up the same numbers in different orders. Each operation rounds by up
to half of the dtype's eps, relative to the numbers that it adds. Such errors are independent and add up as a random
walk, so a result behind a chain of n operations has an error of about eps / 2 * sqrt(n), and the chain behind a number
of a model has

    n = terms * layers * (1 + steps)

Two results have twice one's error, and `SAFETY` covers the largest of a million numbers (5 standard deviations) and
small gradients, which Adam divides by their own size. Measured in the models of `megatron_scenarios`, after four steps
of Adam at a learning rate of 0.01, fp32 against float64: a tenth of the tolerance in token losses, less in means.

A fault is not rounding. In the same models a loss divided by all labels instead of those that count changes gradient
norms by 2000 times their tolerance; one micro-batch left out of one step by 8000 times, and losses by 76 times or more;
one optimizer step left out changes losses by 295 times or more.
"""

from __future__ import annotations

import math
from typing import Any

import torch

SAFETY = 8.0


def rounding(
    dtype: torch.dtype = torch.float32, *, terms: int = 1, layers: int = 1, steps: int = 0, mean_of: int = 1
) -> float:
    """Largest difference of two results by rounding, relative to the largest of the numbers compared.

    Args:
        terms: numbers added up into one: the width of the model, or the tokens of a batch once gradients are compared.
        layers: layers that a result passes.
        steps: optimizer steps before it.
        mean_of: results whose mean or sum is compared; errors of opposite sign cancel, down to the mean's own rounding.
    """
    eps = torch.finfo(dtype).eps
    return SAFETY * eps * max(1.0, math.sqrt(terms * layers * (1 + steps) / mean_of))


def assert_alike(found: Any, expected: Any, tolerance: float, start: Any = None) -> None:
    """No number differs by more than ``tolerance`` times the largest of ``expected``.

    Relative to the largest, because a small sum has the rounding errors of its large terms.

    Args:
        start: parameters before training: what training added is compared then, which is less than the whole.
    """
    seen, wanted = (torch.as_tensor(values).detach().double() for values in (found, expected))
    assert seen.shape == wanted.shape
    assert wanted.isfinite().all()
    largest = wanted.abs().max()
    allowed = tolerance * largest
    if start is not None:
        moved = (wanted - torch.as_tensor(start).detach().double()).abs().max()
        allowed = tolerance * moved + rounding() * largest
    difference = (seen - wanted).abs().max()
    assert difference <= allowed, (
        f"differs by {difference:.2e}, allowed is {allowed:.2e} (the largest is {largest:.2e})"
    )


def assert_alike_after_adam(found: Any, expected: Any, tolerance: float, lr: float, name: str) -> None:
    """A typical number differs by at most twice ``tolerance`` times the largest, and all together by two steps.

    Adam makes as much of a gradient that is rounding noise as of any other, so a single number may be a step up where
    it is a step down in the other. Twice, because its step is a quotient: gradient and root both have the error.

    Args:
        tolerance: of the gradients.
        lr: Adam's learning rate, the size of a step.
    """
    difference = (torch.as_tensor(found) - expected).abs()
    assert difference.median() <= 2 * tolerance * expected.abs().max(), name
    assert difference.norm() <= 2 * lr, name
