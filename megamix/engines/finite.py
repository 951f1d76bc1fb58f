"""Whether a step may be taken: what all ranks of a job know together of its losses and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist


def is_finite_everywhere(gradients: Sequence[torch.Tensor], bad_tokens: torch.Tensor) -> bool:
    """Whether every loss and the norm of the gradient are finite, over all ranks of the job, which all get the same
    answer. One all-reduce, and the step's one host read.

    Args:
        gradients: the sum over the batch, of what this rank holds; ranks may hold the same, or parts.
        bad_tokens: [] on the device, this rank's tokens whose loss is not finite.
    """
    norm = torch.nn.utils.get_total_norm(gradients).to(bad_tokens.device, torch.float32)
    # Squares: a norm that the engine would find too large for fp32 is too large here as well.
    numbers = torch.stack([norm.square(), bad_tokens.to(torch.float32)])
    dist.all_reduce(numbers)
    square, bad = numbers.tolist()
    return math.isfinite(square) and bad == 0
