"""One matrix for embedding and output projection where these are on two pipeline stages.

The first stage owns it, with its optimizer state; the last has a copy of the weights alone:

    last stage   gradients of a step's micro-batches --sum--> first stage's gradient --> norm, clipping, Adam
    first stage  weights --before the next step or evaluation--> last stage

DeepSpeed's `TiedLayerSpec` trains both copies instead, with the sum of their gradients. It takes that sum before the
one over data-parallel ranks, which rounds in an order that depends on a parameter's place among those of its stage:
with more than two of these ranks the copies need not stay alike. Here they are the same bits, for the same traffic and
without an optimizer state on the last stage.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megamix.engines.base import COLLECTIVE_TIMEOUT
from megamix.engines.models.layers import Embedding


class TiedMatrix:
    """The matrix on this rank: the first stage's parameter, the last stage's copy, or nothing of it in between.

    Args:
        grid: DeepSpeed's, of more than one stage. Every rank makes a matrix, as that makes process groups.
        embedding: on the first stage, its layer.
        size: (V, H).
        like: a weight of this rank, whose type and device the copy has.

    Attributes:
        weight: [V, H]; on the last stage no parameter of a module.
    """

    def __init__(self, grid: Any, embedding: Embedding | None, size: tuple[int, int], like: torch.Tensor) -> None:
        self._group: Any = None
        self._owner = -1
        for data_rank in range(grid.data_parallel_size):
            ends = [grid.stage_to_global(stage_id=stage, data=data_rank) for stage in (0, grid.pipe_parallel_size - 1)]
            group = dist.new_group(ends, timeout=COLLECTIVE_TIMEOUT)
            if dist.get_rank() in ends:
                self._group, self._owner = group, ends[0]
        self._is_stale = True
        self._gradient: torch.Tensor | None = None
        if embedding is not None:
            self.weight: torch.Tensor = embedding.embedding.weight
        elif self._group is not None:
            self.weight = torch.zeros(size, dtype=like.dtype, device=like.device, requires_grad=True)
            self._gradient = torch.zeros(size, device=like.device)
            self.weight.register_post_accumulate_grad_hook(self._add)

    def _add(self, weight: torch.Tensor) -> None:
        """Adds a micro-batch's gradient to the step's, in fp32."""
        assert self._gradient is not None
        if weight.grad is not None:
            self._gradient.add_(weight.grad)
            weight.grad = None

    def changed(self) -> None:
        """Notes that the first stage's weights are others; every rank calls it."""
        self._is_stale = True

    def refresh(self) -> None:
        """Brings the copy up to date; collective over the two stages. The last one waits for its first micro-batch
        anyway."""
        if self._is_stale and self._group is not None:
            dist.broadcast(self.weight.detach(), self._owner, group=self._group)
        self._is_stale = False

    def sum_gradients(self) -> None:
        """Adds the last stage's gradient of a step to the first's; collective over the two stages."""
        if self._group is None:
            return
        if self._gradient is not None:
            dist.reduce(self._gradient, self._owner, group=self._group)
            self._gradient.zero_()
            return
        # DeepSpeed sums in fp32 beside the parameter in bf16, and under another name in fp16.
        gradient: Any = getattr(self.weight, "_hp_grad", None)
        if gradient is None:
            gradient = getattr(self.weight, "grad_accum", None)
        if gradient is None:
            gradient = self.weight.grad
        dist.reduce(gradient, self._owner, group=self._group)
