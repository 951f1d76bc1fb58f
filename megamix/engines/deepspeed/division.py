"""Where DeepSpeed divides a step's gradients by its number of micro-batches, which its releases do in two places.

    loss --(0.16, 0.17, 0.19: before the backward pass)--> megamix's loss --(0.18: outputs of every stage)--> layers

The division of outputs would come after the gradient of the loss, and once more on every earlier stage of a pipeline,
so it is switched off. Releases are told apart by what they have, not by their number.
"""

from __future__ import annotations

from typing import Any


def divides_loss(engine: Any) -> bool:
    """Returns whether DeepSpeed's engine divides each loss before its backward pass, and makes that its only division.

    Where the answer is wrong, for a release of another kind, the loss refuses its first incoming gradient.
    """
    if hasattr(engine, "_backward_prologue_per_tensor"):
        # Called by name in every forward pass, for the gradient of each output.
        engine._backward_prologue_per_tensor = lambda gradient: gradient
    # The switch of that hook; `backward` then leaves the loss as it is.
    return not hasattr(engine, "_scale_wrt_gas")
