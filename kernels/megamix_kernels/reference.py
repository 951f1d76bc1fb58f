"""The domain loss in plain torch: what faster implementations are tested against, and fast on a CPU itself.

Logits are read twice, in the forward and in the backward pass, and in between only two numbers a row are kept (the
row's maximum and the sum of its exponentials). The gradient is therefore computed with the incoming gradient already
known and is rounded once to the logits' dtype. Both passes work on blocks of rows, so that temporary memory is bounded
and on a CPU stays in the cache.

Shapes: N tokens, V logits a token, K domains, R rows of one block; a trailing 1 is a kept dimension of size one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamix_kernels import checks
from megamix_kernels.sums import DomainSums

# Elements of one block. On a CPU, 512 KiB of fp32 fit a core's second-level cache; elsewhere launches should be few,
# and 64 MiB are small.
BLOCK_ELEMENTS_CPU = 2**17
BLOCK_ELEMENTS = 2**24


class DomainLoss(NamedTuple):
    """What `domain_cross_entropy` returns.

    Attributes:
        loss: scalar to differentiate, fp32 (float64 for float64 logits).
        stats: the sums per domain; the object passed as ``sums`` if one was, so that it covers all calls since its last
            ``zero_``.
        token_loss_N: on request, the negative log-likelihood of each token in nats, zero at ignored rows, in the dtype
            of ``loss``; not differentiable. It is the quantity summed in ``stats.nats``.
    """

    loss: Tensor
    stats: DomainSums
    token_loss_N: Tensor | None


class _Options(NamedTuple):
    """Numbers that shape one row's objective; zero turns each of the first three off."""

    z_loss: float
    softcap: float
    label_smoothing: float
    vocab_size: int


def domain_cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    domain_N: Tensor,
    num_domains: int,
    *,
    mask_N: Tensor | None = None,
    loss_weights_K: Tensor | None = None,
    reference_loss_N: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    normaliser: float | Tensor | None = None,
    sums: DomainSums | None = None,
    return_token_loss: bool = False,
    implementation: str = "auto",
) -> DomainLoss:
    """Weighted cross-entropy to differentiate, and exact loss sums for each domain, from one reading of the logits.

    With s = softcap * tanh(logits / softcap) (or the logits, if off), lse = log(sum(exp(s))) over the valid vocabulary
    and nll = lse - s[label], a counted token's objective is

        (1 - label_smoothing) * nll + label_smoothing * mean(lse - s) + z_loss * lse**2

    and the loss is sum(loss_weights_K[domain] * objective) / normaliser. The statistics use nll alone: without weight,
    smoothing and z-loss, so that domains are compared by nats per token whatever is being optimised. A token is counted
    unless its label is ``ignore_index`` or its mask is 0; other rows give zero loss and an exactly zero gradient, even
    if their logits are NaN.

    Nothing here waits for an accelerator. Values are hence checked on CPU tensors only: elsewhere a counted row whose
    label or domain id is out of range gets the loss NaN (so that the training loss shows it) and counts as non-finite
    of the nearest valid domain; no memory outside the tensors is touched. Ids and labels of ignored rows may be
    anything. Computed in fp32 (float64 for float64 logits). On a CPU a row's loss is the same to the last bit whichever
    rows come with it; elsewhere that depends on how the device reduces.

    Sources: z-loss, Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), section 5; soft-capped logits, Gemma Team 2024
    (Gemma 2, arXiv:2408.00118), section 2; label smoothing, Szegedy et al. 2016 (arXiv:1512.00567), section 7, weighted
    as in ``torch.nn.functional.cross_entropy``; excess loss, Xie et al. 2023 (DoReMi, arXiv:2305.10429), algorithm 1,
    clipped at zero a token.

    Args:
        logits_NV: fp32, fp16, bf16 or float64, with any strides. Must not be changed in place before the backward pass.
        labels_N: int64 or int32 token ids in [0, vocab_size), or ignore_index.
        domain_N: domain ids in [0, num_domains), any integer dtype.
        num_domains: K, from 1 to 65536.
        mask_N: 0 or 1 (bool, integer or floating); a choice of rows, not a weight. None counts all.
        loss_weights_K: factor of each domain's loss, floating; no gradient reaches it. None means 1.
        reference_loss_N: a reference model's token losses in nats, floating; fills ``stats.excess_nats`` with max(nll -
            reference, 0). A token whose reference loss is not finite counts as non-finite.
        ignore_index: label of rows to ignore.
        z_loss: coefficient of lse**2; 0 is off.
        softcap: bound of the logits; 0 is off.
        label_smoothing: share of the target probability spread evenly over the valid vocabulary, in [0, 1).
        vocab_size: number of valid leading columns where V is padded; the rest join nothing and get a zero gradient.
            None means V.
        normaliser: what the weighted sum is divided by: a positive number, or a tensor with one element on the logits'
            device or the CPU. None: the number of counted tokens of this call, or 1 if there are none (the loss is
            then 0).
        sums: adds into this object in place, across micro-batches. None makes a new one.
        return_token_loss: whether to return the token losses.
        implementation: "torch", or "auto" for the best there is.

    Returns:
        The loss, the sums and the token losses or None. N = 0 is allowed and gives loss 0.

    Raises:
        TypeError: a tensor has an unsupported dtype or is not a tensor; num_domains is not an int; sums is not a
            DomainSums.
        ValueError: a shape, device, option or (on the CPU) a label, domain id, mask or normaliser is out of range.
        NotImplementedError: implementation is "triton".
    """
    checks.check_implementation(implementation)
    checks.check_num_domains(num_domains)
    checks.check_logits(logits_NV)
    checks.check_vectors(
        logits_NV,
        {"labels_N": labels_N, "domain_N": domain_N, "mask_N": mask_N, "reference_loss_N": reference_loss_N},
    )
    checks.check_loss_weights(loss_weights_K, num_domains, logits_NV.device)
    num_columns = logits_NV.shape[1]
    options = _Options(z_loss, softcap, label_smoothing, num_columns if vocab_size is None else vocab_size)
    checks.check_options(**options._asdict(), num_columns=num_columns)
    divisor = checks.check_normaliser(normaliser, logits_NV.device)
    sums = DomainSums(num_domains, logits_NV.device) if sums is None else sums
    if not isinstance(sums, DomainSums):
        raise TypeError(f"sums must be a DomainSums, got {type(sums).__name__}; DomainSums.from_buffer wraps a tensor")
    sums.check_fits(num_domains, logits_NV.device)

    counted_N = labels_N != ignore_index
    if mask_N is not None:
        counted_N &= mask_N != 0
    if logits_NV.device.type == "cpu":
        ranges = {"ignore_index": ignore_index, "vocab_size": options.vocab_size, "num_domains": num_domains}
        checks.check_values(labels_N, domain_N, mask_N, counted_N, **ranges)

    labels_N, domain_id_N = labels_N.long(), domain_N.long()
    valid_N = (labels_N >= 0) & (labels_N < options.vocab_size) & (domain_id_N >= 0) & (domain_id_N < num_domains)
    weight_N = torch.ones(labels_N.shape, dtype=_compute_dtype(logits_NV), device=logits_NV.device)
    if loss_weights_K is not None:
        weight_N = loss_weights_K.detach().to(weight_N.dtype)[domain_id_N.clamp(0, num_domains - 1)]
    # An invalid row's weight is NaN, so that its gradient is too; an ignored row's is zero.
    weight_N = torch.where(counted_N, torch.where(valid_N, weight_N, math.nan), 0.0)
    safe_labels_N = torch.where(counted_N & valid_N, labels_N, 0)

    total, nll_N = _WeightedSum.apply(logits_NV, safe_labels_N, weight_N, counted_N, options)
    nll_N = torch.where(counted_N & ~valid_N, math.nan, nll_N)
    sums.add(domain_N, nll_N, counted_N=counted_N, reference_loss_N=reference_loss_N)
    if divisor is None:
        divisor = counted_N.sum().clamp(min=1)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.dtype)
    return DomainLoss(total / divisor, sums, nll_N if return_token_loss else None)


class _WeightedSum(torch.autograd.Function):
    """sum(weight * objective) over counted rows, and the negative log-likelihood of each row."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, weight_N: Tensor, counted_N: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        max_N, norm_N, nll_N, objective_N = (torch.empty_like(weight_N) for _ in range(4))
        scratch_RV = _scratch(logits_NV, options.vocab_size, weight_N.dtype)
        for rows in _blocks(logits_NV):
            logits_RV, label_R1 = logits_NV[rows, : options.vocab_size], labels_N[rows, None]
            work_RV = scratch_RV[: logits_RV.shape[0]]
            scores_RV = _scores(logits_RV, options.softcap, work_RV)
            max_R1 = scores_RV.amax(dim=1, keepdim=True)
            # Subtracting the maximum first keeps a large common offset from eating the digits of the differences.
            target_R1 = scores_RV.gather(1, label_R1) - max_R1
            torch.sub(scores_RV, max_R1, out=work_RV)
            mean_R = work_RV.mean(dim=1) if options.label_smoothing else None
            work_RV.exp_()
            # A sum with a single result is shared out among the CPU's threads and its last bit then depends on them.
            # Summing two rows at least keeps a token's loss the same in any micro-batch.
            norm_R = scratch_RV[: max(2, len(work_RV))].sum(dim=1)[: len(work_RV)]
            log_norm_R = norm_R.log()

            nll_R = objective_R = log_norm_R - target_R1[:, 0]
            if mean_R is not None:
                objective_R = (1.0 - options.label_smoothing) * nll_R + options.label_smoothing * (log_norm_R - mean_R)
            if options.z_loss:
                objective_R = objective_R + options.z_loss * (max_R1[:, 0] + log_norm_R).square()
            max_N[rows], norm_N[rows] = max_R1[:, 0], norm_R
            nll_N[rows], objective_N[rows] = nll_R, objective_R

        nll_N = torch.where(counted_N, nll_N, 0.0)
        total = torch.where(counted_N, objective_N * weight_N, 0.0).sum()
        ctx.save_for_backward(logits_NV, labels_N, weight_N, counted_N, max_N, norm_N)
        ctx.options = options
        ctx.mark_non_differentiable(nll_N)
        ctx.set_materialize_grads(False)
        return total, nll_N

    @staticmethod
    @once_differentiable  # whose type makes ctx positional-only, hence the comment for the type checker
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_total = grad_outputs[0]
        if grad_total is None:
            return None, None, None, None, None
        logits_NV, labels_N, weight_N, counted_N, max_N, norm_N = ctx.saved_tensors
        options: _Options = ctx.options
        scale_N = weight_N * grad_total
        # d objective / d s = softmax * (1 + 2 z_loss lse) - target distribution.
        peak_N = scale_N * (1.0 + 2.0 * options.z_loss * (max_N + norm_N.log())) if options.z_loss else scale_N
        peak_N = peak_N / norm_N

        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        grad_NV[:, options.vocab_size :] = 0
        # Computed in place if the gradient has the dtype of the computation, else in scratch memory and rounded once.
        direct = grad_NV.dtype == scale_N.dtype
        scratch_RV = None if direct else _scratch(logits_NV, options.vocab_size, scale_N.dtype)
        for rows in _blocks(logits_NV):
            grad_RV, logits_RV = grad_NV[rows, : options.vocab_size], logits_NV[rows, : options.vocab_size]
            work_RV = grad_RV if scratch_RV is None else scratch_RV[: grad_RV.shape[0]]
            per_row = (labels_N[rows, None], max_N[rows, None], scale_N[rows, None], peak_N[rows, None])
            _row_gradients(work_RV, logits_RV, *per_row, options)
            if scratch_RV is not None:
                grad_RV.copy_(work_RV)
        _zero_rows(grad_NV, ~counted_N)
        return grad_NV, None, None, None, None


def _row_gradients(
    work_RV: Tensor,
    logits_RV: Tensor,
    label_R1: Tensor,
    max_R1: Tensor,
    scale_R1: Tensor,
    peak_R1: Tensor,
    options: _Options,
) -> None:
    """Fill work_RV with (exp(s - max) * peak - scale * target distribution) * ds/dlogits."""
    scores_RV = _scores(logits_RV, options.softcap, work_RV)
    slope_RV = 1.0 - (scores_RV / options.softcap).square_() if options.softcap else None
    torch.sub(scores_RV, max_R1, out=work_RV).exp_().mul_(peak_R1)
    # scatter_ after a gather, as scatter_add_ has no deterministic form on a GPU.
    hit_R1 = work_RV.gather(1, label_R1).sub_(scale_R1, alpha=1.0 - options.label_smoothing)
    work_RV.scatter_(1, label_R1, hit_R1)
    if options.label_smoothing:
        work_RV.sub_(scale_R1, alpha=options.label_smoothing / options.vocab_size)
    if slope_RV is not None:
        work_RV.mul_(slope_RV)


def _scores(logits_RV: Tensor, softcap: float, work_RV: Tensor) -> Tensor:
    """The soft-capped logits in the dtype of work_RV: written there, or the logits themselves if nothing changes."""
    if not softcap:
        return logits_RV if logits_RV.dtype == work_RV.dtype else work_RV.copy_(logits_RV)
    return work_RV.copy_(logits_RV).div_(softcap).tanh_().mul_(softcap)


def _zero_rows(grad_NV: Tensor, ignored_N: Tensor) -> None:
    """Set rows to zero. A product with zero would not do: NaN logits of an ignored row would stay NaN."""
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


def _scratch(logits_NV: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Memory for one block, used again for each; two rows at least."""
    num_rows = max(2, min(_rows_per_block(logits_NV), logits_NV.shape[0]))
    return logits_NV.new_empty(num_rows, vocab_size, dtype=dtype)


def _compute_dtype(logits_NV: Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
