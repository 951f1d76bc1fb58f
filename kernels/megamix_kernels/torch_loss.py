"""The domain loss in plain PyTorch: the specification of faster implementations, and the path for CPUs and float64.

Logits are read twice, for the loss and for the gradient; between the two, only each row's maximum and sum of
exponentials are kept. The gradient is computed once the incoming gradient is known, and rounded once to the logits'
dtype. Both passes work on blocks of rows: temporary memory is bounded and on a CPU stays in the cache.

Shapes: N tokens, V logits a token (of this rank), K domains, R rows of one block, T ranks that share the vocabulary; a
trailing 1 is a kept dimension of size one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megamix_kernels.inputs import (
    NUM_PARTIALS,
    Inputs,
    VocabularyShard,
    compute_dtype,
    counted_rows,
    divided,
    gather_partials,
)

# Elements of one block. On a CPU, 512 KiB of fp32 fit a core's second-level cache; elsewhere launches should be few,
# and 64 MiB are small.
BLOCK_ELEMENTS_CPU = 2**17
BLOCK_ELEMENTS = 2**24

OVERWRITES = False  # the gradient gets memory of its own


def forward(
    logits_NV: Tensor, inputs: Inputs, grad_NV: Tensor | None = None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Returns the loss, the token losses and the tensors that `gradient` needs; adds to the sums.

    With ``grad_NV``, which must not be the logits, also writes the gradient for ``inputs.gradient_scale`` there (mode
    A).
    """
    options = inputs.options
    counted_N = counted_rows(inputs.labels_N, inputs.mask_N, options.ignore_index)
    labels_N, domain_id_N = inputs.labels_N.long(), inputs.domain_N.long()
    valid_N = (labels_N >= 0) & (labels_N < inputs.vocab_size)
    valid_N &= (domain_id_N >= 0) & (domain_id_N < inputs.num_domains)
    weight_N = torch.ones(labels_N.shape, dtype=compute_dtype(logits_NV), device=logits_NV.device)
    if inputs.loss_weights_K is not None:
        weight_N = inputs.loss_weights_K.to(weight_N.dtype)[domain_id_N.clamp(0, inputs.num_domains - 1)]
    # An invalid row's weight is NaN, so that its gradient is too; an ignored row's is zero.
    weight_N = torch.where(counted_N, torch.where(valid_N, weight_N, math.nan), 0.0)
    safe_labels_N = torch.where(counted_N & valid_N, labels_N, 0)

    partials_4N = _partials(logits_NV, safe_labels_N, inputs, weight_N.dtype)
    if inputs.shard.group is not None:
        partials_4N = _merged(gather_partials(partials_4N, inputs.shard.group), inputs, logits_NV.shape[1])
    max_N, norm_N, target_N, deviation_N = partials_4N
    log_norm_N = norm_N.log()
    nll_N = objective_N = log_norm_N - (target_N - max_N)
    if options.label_smoothing:
        objective_N = (1.0 - options.label_smoothing) * nll_N
        objective_N = objective_N + options.label_smoothing * (log_norm_N - deviation_N / inputs.vocab_size)
    if options.z_loss:
        objective_N = objective_N + options.z_loss * (max_N + log_norm_N).square()
    # Ignored rows have weight 0, and a product with 0 would not make an infinite or NaN loss 0.
    total = torch.where(weight_N != 0, objective_N * weight_N, 0.0).sum()
    nll_N = torch.where(counted_N, torch.where(valid_N, nll_N, math.nan), 0.0)
    if inputs.adds_to_sums:
        inputs.sums.add(inputs.domain_N, nll_N, counted_N=counted_N, reference_loss_N=inputs.reference_loss_N)

    saved = (safe_labels_N, weight_N, max_N, norm_N)
    if grad_NV is not None:
        assert inputs.gradient_scale is not None
        gradient(logits_NV, inputs, saved, inputs.gradient_scale, grad_NV)
    return divided(total, inputs.divisor), nll_N if options.return_token_loss else None, saved


def gradient(
    logits_NV: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], scale: float | Tensor, grad_NV: Tensor
) -> None:
    """Writes the gradient for the incoming gradient ``scale`` into grad_NV, which must not be the logits."""
    options = inputs.options
    labels_N, weight_N, max_N, norm_N = saved
    scale_N = weight_N * (_like(scale, weight_N) / _like(inputs.divisor, weight_N))
    # d objective / d s = softmax * (1 + 2 z_loss lse) - target distribution.
    peak_N = scale_N * (1.0 + 2.0 * options.z_loss * (max_N + norm_N.log())) if options.z_loss else scale_N
    peak_N = peak_N / norm_N
    hit_N = scale_N * (1.0 - options.label_smoothing)
    label_N, here_N = _own_columns(labels_N, inputs.shard)
    if here_N is not None:
        hit_N = torch.where(here_N, hit_N, 0.0)

    num_valid = inputs.shard.valid_columns
    grad_NV[:, num_valid:] = 0
    # Computed in place if the gradient has the dtype of the computation, else in scratch memory and rounded once.
    direct = grad_NV.dtype == scale_N.dtype
    scratch_RV = None if direct else _scratch(logits_NV, num_valid, scale_N.dtype)
    for rows in _blocks(logits_NV) if num_valid else ():
        grad_RV, logits_RV = grad_NV[rows, :num_valid], logits_NV[rows, :num_valid]
        work_RV = grad_RV if scratch_RV is None else scratch_RV[: grad_RV.shape[0]]
        per_row = (label_N[rows, None], max_N[rows, None], scale_N[rows, None], peak_N[rows, None], hit_N[rows, None])
        _row_gradients(work_RV, logits_RV, *per_row, inputs)
        if scratch_RV is not None:
            grad_RV.copy_(work_RV)
    _zero_rows(grad_NV, weight_N == 0)


def _partials(logits_NV: Tensor, labels_N: Tensor, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """[4, N] of this rank's valid columns: maximum, sum of exp(s - maximum), s at the label (-inf if it is another
    rank's) and, for smoothing, sum of s - maximum."""
    num_valid = inputs.shard.valid_columns
    partials_4N = torch.zeros(NUM_PARTIALS, logits_NV.shape[0], dtype=dtype, device=logits_NV.device)
    max_N, norm_N, target_N, deviation_N = partials_4N
    if not num_valid:
        max_N.fill_(-math.inf)
        target_N.fill_(-math.inf)
        return partials_4N
    label_N, here_N = _own_columns(labels_N, inputs.shard)
    scratch_RV = _scratch(logits_NV, num_valid, dtype)
    for rows in _blocks(logits_NV):
        logits_RV = logits_NV[rows, :num_valid]
        work_RV = scratch_RV[: logits_RV.shape[0]]
        scores_RV = _scores(logits_RV, inputs.options.softcap, work_RV)
        max_R1 = scores_RV.amax(dim=1, keepdim=True)
        max_N[rows] = max_R1[:, 0]
        target_N[rows] = scores_RV.gather(1, label_N[rows, None])[:, 0]
        if not inputs.shard.is_whole:
            # A part of -inf adds nothing to a row that has something else on another rank; alone it makes NaN.
            max_R1 = max_R1.masked_fill(max_R1 == -math.inf, 0.0)
        # Subtracting the maximum first keeps a large common offset from eating the digits of the differences.
        torch.sub(scores_RV, max_R1, out=work_RV)
        if inputs.options.label_smoothing:
            deviation_N[rows] = work_RV.sum(dim=1)
        work_RV.exp_()
        # A sum with a single result is shared out among the CPU's threads and its last bit then depends on them.
        # Summing two rows at least keeps a token's loss the same in any micro-batch.
        norm_N[rows] = scratch_RV[: max(2, len(work_RV))].sum(dim=1)[: len(work_RV)]
    if here_N is not None:
        target_N.masked_fill_(~here_N, -math.inf)
    return partials_4N


def _merged(partials_T4N: Tensor, inputs: Inputs, num_columns: int) -> Tensor:
    """Returns [4, N] of all columns from [T, 4, N] of each rank; in the order of ranks, so all ranks get the same."""
    part_max_TN, norm_TN, target_TN, deviation_TN = partials_T4N.unbind(dim=1)
    max_N = part_max_TN.amax(dim=0)
    safe_N = max_N.masked_fill(max_N == -math.inf, 0.0)
    part_safe_TN = part_max_TN.masked_fill(part_max_TN == -math.inf, 0.0)
    first_T1 = torch.arange(len(part_max_TN), device=max_N.device)[:, None] * num_columns
    columns_T1 = (inputs.vocab_size - first_T1).clamp(0, num_columns)
    norm_N = (norm_TN * (part_max_TN - safe_N).exp()).sum(dim=0)
    deviation_N = (deviation_TN + columns_T1 * (part_safe_TN - safe_N)).sum(dim=0)
    return torch.stack([max_N, norm_N, target_TN.amax(dim=0), deviation_N])


def _own_columns(labels_N: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor | None]:
    """Returns labels as columns of this rank, and whether the rank holds them (None: all); other columns are 0."""
    if shard.is_whole:
        return labels_N, None
    column_N = labels_N - shard.first_column
    here_N = (column_N >= 0) & (column_N < shard.valid_columns)
    return column_N.where(here_N, 0), here_N


def _row_gradients(
    work_RV: Tensor,
    logits_RV: Tensor,
    label_R1: Tensor,
    max_R1: Tensor,
    scale_R1: Tensor,
    peak_R1: Tensor,
    hit_R1: Tensor,
    inputs: Inputs,
) -> None:
    """Fills work_RV with (exp(s - max) * peak - scale * target distribution) * ds/dlogits."""
    scores_RV = _scores(logits_RV, inputs.options.softcap, work_RV)
    slope_RV = 1.0 - (scores_RV / inputs.options.softcap).square_() if inputs.options.softcap else None
    torch.sub(scores_RV, max_R1, out=work_RV).exp_().mul_(peak_R1)
    # scatter_ after a gather, as scatter_add_ has no deterministic form on a GPU.
    work_RV.scatter_(1, label_R1, work_RV.gather(1, label_R1).sub_(hit_R1))
    if inputs.options.label_smoothing:
        work_RV.sub_(scale_R1, alpha=inputs.options.label_smoothing / inputs.vocab_size)
    if slope_RV is not None:
        work_RV.mul_(slope_RV)


def _scores(logits_RV: Tensor, softcap: float, work_RV: Tensor) -> Tensor:
    """Returns soft-capped logits in the dtype of work_RV: written there, or the logits if nothing changes."""
    if not softcap:
        return logits_RV if logits_RV.dtype == work_RV.dtype else work_RV.copy_(logits_RV)
    return work_RV.copy_(logits_RV).div_(softcap).tanh_().mul_(softcap)


def _zero_rows(grad_NV: Tensor, ignored_N: Tensor) -> None:
    """Sets rows to zero. A product with zero would not do: NaN logits of such a row would stay NaN."""
    if grad_NV.device.type == "cpu":
        # A masked fill would go through all rows; this touches the ignored ones only, and the host may ask which.
        grad_NV.index_fill_(0, ignored_N.nonzero()[:, 0], 0.0)
    else:
        grad_NV.masked_fill_(ignored_N[:, None], 0.0)


def _rows_per_block(logits_NV: Tensor) -> int:
    limit = BLOCK_ELEMENTS_CPU if logits_NV.device.type == "cpu" else BLOCK_ELEMENTS
    return max(1, limit // logits_NV.shape[1])


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    """Slices of rows that bound the temporary memory."""
    num_rows, step = logits_NV.shape[0], _rows_per_block(logits_NV)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _scratch(logits_NV: Tensor, num_valid: int, dtype: torch.dtype) -> Tensor:
    """Memory of one block, reused for each; two rows at least."""
    num_rows = max(2, min(_rows_per_block(logits_NV), logits_NV.shape[0]))
    return logits_NV.new_empty(num_rows, num_valid, dtype=dtype)


def _like(value: float | Tensor, other: Tensor) -> float | Tensor:
    """A number as it is, a tensor in the other's dtype."""
    return value.to(other.dtype) if isinstance(value, Tensor) else value
