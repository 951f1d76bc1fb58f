"""Checked inputs of a loss call, which every implementation reads.

Shapes: N tokens, V logits a token (of this rank), K domains, T ranks that share the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megamix_kernels import checks
from megamix_kernels.options import LossOptions
from megamix_kernels.sums import DomainSums

NUM_PARTIALS = 4


class VocabularyShard(NamedTuple):
    """Columns of the vocabulary that this rank's logits hold.

    Attributes:
        first_column: global id of the first column.
        valid_columns: number of columns below the valid vocabulary's size; 0 where all are padding.
        group: ranks that hold the other columns; None if there are none.
    """

    first_column: int
    valid_columns: int
    group: dist.ProcessGroup | None

    @property
    def is_whole(self) -> bool:
        return self.group is None

    @property
    def holds_sums(self) -> bool:
        """Whether this rank adds to the domain sums; one rank of a group does, so a sum over ranks counts each token
        once."""
        return self.group is None or self.group.rank() == 0


class Inputs(NamedTuple):
    """Inputs of a loss call beside its logits; tensors are contiguous.

    Attributes:
        vocab_size: size of the whole valid vocabulary, over all ranks.
        divisor: ``options.normaliser``, or the number of counted tokens.
        gradient_scale: ``options.gradient_scale``, as a number where the host knows it.
        adds_to_sums: whether this call adds its tokens to the sums; a recomputation does not.
    """

    labels_N: Tensor
    domain_N: Tensor
    num_domains: int
    mask_N: Tensor | None
    loss_weights_K: Tensor | None
    reference_loss_N: Tensor | None
    sums: DomainSums
    options: LossOptions
    vocab_size: int
    divisor: float | Tensor
    gradient_scale: float | Tensor | None
    shard: VocabularyShard
    adds_to_sums: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors that the backward pass reads again; autograd keeps them and notices changes in place."""
        divisor = self.divisor if isinstance(self.divisor, Tensor) else None
        return self.labels_N, self.domain_N, self.mask_N, self.loss_weights_K, divisor


def make_inputs(
    shape: tuple[int, int],
    device: torch.device,
    labels_N: Tensor,
    domain_N: Tensor,
    num_domains: int,
    mask_N: Tensor | None,
    loss_weights_K: Tensor | None,
    reference_loss_N: Tensor | None,
    sums: DomainSums | None,
    options: LossOptions,
) -> Inputs:
    """Checks the inputs of a loss of logits with this shape, on this device; see `domain_cross_entropy`."""
    num_rows, num_columns = shape
    group, ignore_index = options.process_group, options.ignore_index
    checks.check_num_domains(num_domains)
    checks.check_vector("labels_N", labels_N, num_rows, device)
    checks.check_vector("domain_N", domain_N, num_rows, device)
    if mask_N is not None:
        checks.check_vector("mask_N", mask_N, num_rows, device)
    if reference_loss_N is not None:
        checks.check_vector("reference_loss_N", reference_loss_N, num_rows, device)
    checks.check_loss_weights(loss_weights_K, num_domains, device)
    num_all = num_columns * (1 if group is None else group.size())
    vocab_size = num_all if options.vocab_size is None else options.vocab_size
    if not 1 <= vocab_size <= num_all:
        raise ValueError(f"vocab_size must be from 1 to {num_all}, the columns of logits_NV; got {vocab_size}")
    divisor = checks.check_scalar("normaliser", options.normaliser, device, positive=True)
    sums = DomainSums(num_domains, device) if sums is None else sums
    if not isinstance(sums, DomainSums):
        raise TypeError(f"sums must be a DomainSums, got {type(sums).__name__}; DomainSums.from_buffer wraps a tensor")
    sums.check_fits(num_domains, device)
    if device.type == "cpu" or divisor is None:
        counted_N = counted_rows(labels_N, mask_N, ignore_index)
        if device.type == "cpu":
            checks.check_values(labels_N, domain_N, mask_N, counted_N, ignore_index, vocab_size, num_domains)
            if divisor == 0:
                checks.check_nothing_is_counted("normaliser", counted_N)
        divisor = counted_N.sum().clamp(min=1) if divisor is None else divisor
    if isinstance(divisor, float) and divisor == 0:
        # The host can neither divide by it nor, on a device, know whether a row is counted.
        divisor = torch.zeros((), device=device)
    first_column = 0 if group is None else group.rank() * num_columns
    shard = VocabularyShard(first_column, min(max(vocab_size - first_column, 0), num_columns), group)
    return Inputs(
        labels_N=labels_N.contiguous(),
        domain_N=domain_N.contiguous(),
        num_domains=num_domains,
        mask_N=None if mask_N is None else mask_N.contiguous(),
        loss_weights_K=None if loss_weights_K is None else loss_weights_K.detach().contiguous(),
        reference_loss_N=None if reference_loss_N is None else reference_loss_N.detach().contiguous(),
        sums=sums,
        options=options,
        vocab_size=vocab_size,
        divisor=divisor,
        gradient_scale=checks.check_scalar("gradient_scale", options.gradient_scale, device, positive=False),
        shard=shard,
        adds_to_sums=shard.holds_sums and not is_recomputation(),
    )


def is_recomputation() -> bool:
    """Whether a backward pass is running: activation checkpointing then calls again what was called before."""
    return torch._C._current_graph_task_id() != -1


def divided(total: Tensor, divisor: float | Tensor) -> Tensor:
    """Returns total / divisor, and 0 for 0 / 0: no row is counted, and a tensor said so."""
    if not isinstance(divisor, Tensor):
        return total / divisor
    return torch.where(total == 0, total, total / divisor.to(total.dtype))


def counted_rows(labels_N: Tensor, mask_N: Tensor | None, ignore_index: int) -> Tensor:
    """Bool [N]: the rows that are not ignored."""
    counted_N = labels_N != ignore_index
    if mask_N is not None:
        counted_N &= mask_N != 0
    return counted_N


def gather_partials(partials_4N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's [4, N] as [T, 4, N], in one collective."""
    num_rows = partials_4N.shape[1]
    stacked = partials_4N.new_empty(group.size() * NUM_PARTIALS, num_rows)
    # Its name from torch 2.13 on; the older one warns there.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(stacked, partials_4N, group=group)
    return stacked.view(group.size(), NUM_PARTIALS, num_rows)


def compute_dtype(logits_NV: Tensor) -> torch.dtype:
    """Dtype of losses: float64 for float64 logits, else fp32."""
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
