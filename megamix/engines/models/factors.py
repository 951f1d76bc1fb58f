"""Output of a model whose loss takes the linear form.

Legend: B samples, S tokens, H hidden size, V vocabulary of a rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class OutputFactors(NamedTuple):
    """Factors of the logits, for a loss that never holds all of these.

    Attributes:
        hidden: [B, S, H], or [S, B, H] where tokens come first.
        weight_VH: the output projection.
        weight_gradient_VH: the engine's sum of the weight's gradients, to which the loss adds; None leaves the gradient
            to autograd.
    """

    hidden: torch.Tensor
    weight_VH: torch.Tensor
    weight_gradient_VH: torch.Tensor | None = None
