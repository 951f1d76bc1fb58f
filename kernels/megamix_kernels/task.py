"""What one call of the loss is about, checked once and handed to whichever implementation does it.

Shapes: N tokens, V logits a token (of this rank), K domains, T ranks that share the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megamix_kernels.sums import DomainSums

NUM_PARTIALS = 4


@dataclass(frozen=True)
class Shard:
    """Which columns of the vocabulary the logits hold.

    Attributes:
        first_column: the global id of the first of them.
        valid_columns: how many of them are below the valid vocabulary's size; 0 where all are padding.
        group: the ranks that hold the other columns; None if there are none.
    """

    first_column: int
    valid_columns: int
    group: dist.ProcessGroup | None

    @property
    def is_whole(self) -> bool:
        return self.group is None

    @property
    def holds_sums(self) -> bool:
        """Whether this rank adds to the domains' sums: one rank of a group does, so that a sum over ranks counts each
        token once."""
        return self.group is None or self.group.rank() == 0


@dataclass(frozen=True)
class Task:
    """The arguments of `domain_cross_entropy` but the logits, after the checks; see there. Tensors are contiguous.

    Attributes:
        vocab_size: of the whole valid vocabulary, over all ranks.
        divisor: what the weighted sum is divided by: a number, or a tensor with one element on the logits' device.
    """

    labels_N: Tensor
    domain_N: Tensor
    num_domains: int
    mask_N: Tensor | None
    loss_weights_K: Tensor | None
    reference_loss_N: Tensor | None
    ignore_index: int
    z_loss: float
    softcap: float
    label_smoothing: float
    vocab_size: int
    divisor: float | Tensor
    sums: DomainSums
    shard: Shard

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the backward pass reads again; kept through autograd, which notices when one was changed meanwhile."""
        return self.labels_N, self.domain_N, self.mask_N, self.loss_weights_K


def gather_partials(partials_4N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's [4, N] as [T, 4, N], in one collective."""
    num_rows = partials_4N.shape[1]
    stacked = partials_4N.new_empty(group.size() * NUM_PARTIALS, num_rows)
    # Its name from torch 2.13 on; the older one warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(stacked, partials_4N, group=group)
    return stacked.view(group.size(), NUM_PARTIALS, num_rows)


def counted_rows(labels_N: Tensor, mask_N: Tensor | None, ignore_index: int) -> Tensor:
    """Bool [N]: the rows that are not ignored."""
    counted_N = labels_N != ignore_index
    if mask_N is not None:
        counted_N &= mask_N != 0
    return counted_N


def make_shard(num_columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> Shard:
    """The shard of logits with that many columns on every rank of the group; ``vocab_size`` counts over all ranks."""
    first = 0 if group is None else group.rank() * num_columns
    return Shard(first, min(max(vocab_size - first, 0), num_columns), group)


def compute_dtype(logits_NV: Tensor) -> torch.dtype:
    """The dtype of losses: float64 for float64 logits, else fp32."""
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
