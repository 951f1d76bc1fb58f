"""The domain loss of given logits: the entry point, its checks, and its place in autograd.

Two modes, with the same result. Mode B computes the loss in the forward pass and the gradient in the backward pass,
when the incoming gradient is known; mode A is told that gradient beforehand (``gradient_scale``) and does both at once.
Neither rescales a finished gradient.

Shapes: N tokens, V logits a token (of this rank), K domains.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from megamix_kernels import checks, reference
from megamix_kernels.sums import DomainSums
from megamix_kernels.task import Task, counted_rows, make_shard


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
    gradient_scale: float | Tensor | None = None,
    keep_logits: bool = False,
    process_group: dist.ProcessGroup | None = None,
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
    rows come with it; on a GPU too with Triton, for logits of the same width and dtype.

    The logits are consumed. The Triton path writes the gradient over them unless they are a leaf (or ``keep_logits`` is
    true): in the backward pass, or with ``gradient_scale`` at once. Autograd is told, so that another backward step
    that needs the old values raises "modified by an inplace operation"; plain reads after the call (with
    gradient_scale) or after the backward pass see the gradient.

    With ``process_group``, logits are [N, V / T] on each of its T ranks, rank 0 holding the first columns, and labels,
    domains and options are the same on all of them. The ranks exchange four numbers a row in one collective. Losses are
    equal to the last bit on all ranks; between different T they differ by rounding. Only the group's rank 0 adds to its
    sums: a sum over all ranks, or over the rank 0 of every group, counts each token once.

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
            None means all. With a process_group it counts the columns of all ranks.
        normaliser: what the weighted sum is divided by: a positive number, or a tensor with one element on the logits'
            device or the CPU. None: the number of counted tokens of this call, or 1 if there are none (the loss is
            then 0).
        sums: adds into this object in place, across micro-batches. None makes a new one.
        return_token_loss: whether to return the token losses.
        gradient_scale: mode A. A promise that the gradient coming to ``loss`` will be this: a number, or a tensor with
            one element on the logits' device or the CPU. The gradient is then ready when the call returns, and the
            backward pass hands it on once. A broken promise is an error on the CPU; elsewhere it could not be seen
            without waiting, and the promised gradient is used.
        keep_logits: keep the logits as they are, at the price of memory for the gradient.
        process_group: the ranks that share the vocabulary; None: the logits hold all of it.
        implementation: "torch"; "triton", for fp32, fp16 and bf16 logits with adjacent columns on a GPU (or under
            Triton's interpreter, TRITON_INTERPRET=1); or "auto": triton on a GPU where it can be used, else torch.

    Returns:
        The loss, the sums and the token losses or None. N = 0 is allowed and gives loss 0.

    Raises:
        TypeError: a tensor has an unsupported dtype or is not a tensor; num_domains is not an int; sums is not a
            DomainSums.
        ValueError: a shape, device, option or (on the CPU) a label, domain id, mask or normaliser is out of range, or
            the implementation cannot be used here.
    """
    checks.check_logits(logits_NV)
    backend = choose_backend(implementation, logits_NV)
    task = make_task(
        (logits_NV.shape[0], logits_NV.shape[1]),
        logits_NV.device,
        labels_N,
        domain_N,
        num_domains,
        mask_N=mask_N,
        loss_weights_K=loss_weights_K,
        reference_loss_N=reference_loss_N,
        ignore_index=ignore_index,
        z_loss=z_loss,
        softcap=softcap,
        label_smoothing=label_smoothing,
        vocab_size=vocab_size,
        normaliser=normaliser,
        sums=sums,
        process_group=process_group,
    )
    gradient_scale = checks.check_scalar("gradient_scale", gradient_scale, logits_NV.device, positive=False)
    plan = _Plan(
        backend=backend,
        task=task,
        gradient_scale=gradient_scale,
        want_gradient=logits_NV.requires_grad and torch.is_grad_enabled(),
        overwrite=not keep_logits and _may_be_overwritten(logits_NV),
        want_token_loss=return_token_loss,
    )
    loss, token_loss_N = _DomainLoss.apply(logits_NV, plan)
    return DomainLoss(loss, task.sums, token_loss_N)


def _may_be_overwritten(logits_NV: Tensor) -> bool:
    """Whether each logit has its own memory, and none of it is a leaf's, which is somebody's variable."""
    owner = logits_NV if logits_NV._base is None else logits_NV._base
    return not owner.is_leaf and logits_NV.stride(0) >= logits_NV.shape[1]


def choose_backend(implementation: str, logits_NV: Tensor) -> ModuleType:
    """The module that does the work: `reference` or `triton_loss`, which is imported where it is used only.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot be used.
    """
    checks.check_implementation(implementation)
    if implementation == "torch" or (implementation == "auto" and not logits_NV.is_cuda):
        return reference
    if importlib.util.find_spec("triton") is None:
        reason = "the package triton is not installed"
    else:
        from megamix_kernels import triton_loss

        reason = triton_loss.why_not(logits_NV)
        if reason is None:
            return triton_loss
    if implementation == "auto":
        return reference
    raise ValueError(f"implementation 'triton' cannot be used: {reason}; use 'auto' or 'torch'")


def make_task(
    shape: tuple[int, int],
    device: torch.device,
    labels_N: Tensor,
    domain_N: Tensor,
    num_domains: int,
    *,
    mask_N: Tensor | None,
    loss_weights_K: Tensor | None,
    reference_loss_N: Tensor | None,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    label_smoothing: float,
    vocab_size: int | None,
    normaliser: float | Tensor | None,
    sums: DomainSums | None,
    process_group: dist.ProcessGroup | None,
) -> Task:
    """The checked arguments of a loss of logits of that shape on that device; see `domain_cross_entropy`."""
    num_rows, num_columns = shape
    checks.check_num_domains(num_domains)
    vectors = {"labels_N": labels_N, "domain_N": domain_N, "mask_N": mask_N, "reference_loss_N": reference_loss_N}
    checks.check_vectors(num_rows, device, vectors)
    checks.check_loss_weights(loss_weights_K, num_domains, device)
    num_all = num_columns * (1 if process_group is None else process_group.size())
    vocab_size = num_all if vocab_size is None else vocab_size
    checks.check_options(
        z_loss=z_loss, softcap=softcap, label_smoothing=label_smoothing, vocab_size=vocab_size, num_columns=num_all
    )
    divisor = checks.check_scalar("normaliser", normaliser, device, positive=True)
    sums = DomainSums(num_domains, device) if sums is None else sums
    if not isinstance(sums, DomainSums):
        raise TypeError(f"sums must be a DomainSums, got {type(sums).__name__}; DomainSums.from_buffer wraps a tensor")
    sums.check_fits(num_domains, device)
    if device.type == "cpu" or divisor is None:
        counted_N = counted_rows(labels_N, mask_N, ignore_index)
        if device.type == "cpu":
            ranges = {"ignore_index": ignore_index, "vocab_size": vocab_size, "num_domains": num_domains}
            checks.check_values(labels_N, domain_N, mask_N, counted_N, **ranges)
        divisor = counted_N.sum().clamp(min=1) if divisor is None else divisor
    return Task(
        labels_N=labels_N.contiguous(),
        domain_N=domain_N.contiguous(),
        num_domains=num_domains,
        mask_N=None if mask_N is None else mask_N.contiguous(),
        loss_weights_K=None if loss_weights_K is None else loss_weights_K.detach().contiguous(),
        reference_loss_N=None if reference_loss_N is None else reference_loss_N.detach().contiguous(),
        ignore_index=ignore_index,
        z_loss=z_loss,
        softcap=softcap,
        label_smoothing=label_smoothing,
        vocab_size=vocab_size,
        divisor=divisor,
        sums=sums,
        shard=make_shard(num_columns, vocab_size, process_group),
    )


class _Plan(NamedTuple):
    """What `_DomainLoss` does with its logits."""

    backend: ModuleType
    task: Task
    gradient_scale: float | Tensor | None
    want_gradient: bool
    overwrite: bool
    want_token_loss: bool

    def room_for_gradient(self, logits_NV: Tensor) -> Tensor:
        """The logits themselves where they may be overwritten; the autograd graph then knows that they were."""
        if not (self.overwrite and self.backend.OVERWRITES):
            return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        increment_version(logits_NV)
        return logits_NV.detach()


class _DomainLoss(torch.autograd.Function):
    """The loss and the token losses, in either mode."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        at_once = plan.want_gradient and plan.gradient_scale is not None
        grad_NV = plan.room_for_gradient(logits_NV) if at_once else None
        loss, token_loss_N, saved = plan.backend.forward(
            logits_NV,
            plan.task,
            want_token_loss=plan.want_token_loss,
            gradient_scale=plan.gradient_scale,
            grad_NV=grad_NV,
        )
        ctx.plan = plan
        if grad_NV is None:
            ctx.save_for_backward(logits_NV, *plan.task.tensors, *saved)
        ctx.handed_on = None if grad_NV is None else PromisedGradient(plan.gradient_scale, grad_NV)
        if token_loss_N is not None:
            ctx.mark_non_differentiable(token_loss_N)
        ctx.set_materialize_grads(False)
        return loss, token_loss_N

    @staticmethod
    @once_differentiable  # whose type makes ctx positional-only, hence the comment for the type checker
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return None, None
        if ctx.handed_on is not None:
            return ctx.handed_on.take(grad_loss)[0], None
        logits_NV, *others = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad_NV = plan.room_for_gradient(logits_NV)
        saved = tuple(others[len(plan.task.tensors) :])
        plan.backend.gradient(logits_NV, plan.task, saved, grad_loss, grad_NV)
        return grad_NV, None


class PromisedGradient:
    """Gradients computed with the loss, to be handed on once; for the promised incoming gradient ``scale``, if any."""

    def __init__(self, scale: float | Tensor | None, *gradients: Tensor) -> None:
        self._scale = scale
        self._gradients = gradients
        self._versions = [gradient._version for gradient in gradients]

    def take(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """The gradients.

        Raises:
            RuntimeError: taken before, overwritten since, or (on the CPU) promised for another incoming gradient.
        """
        if not self._gradients:
            raise RuntimeError(
                "the gradient, computed with the loss, was handed on by an earlier backward pass; a second backward "
                "pass needs a second call"
            )
        if [gradient._version for gradient in self._gradients] != self._versions:
            raise RuntimeError(
                "the logits were modified by an inplace operation after their gradient had been written over them; "
                "pass keep_logits=True or leave them alone"
            )
        if self._scale is not None and grad_loss.device.type == "cpu":
            self._check(grad_loss, self._scale)
        gradients, self._gradients = self._gradients, ()
        return gradients

    def _check(self, grad_loss: Tensor, scale: float | Tensor) -> None:
        promised = torch.as_tensor(scale, dtype=grad_loss.dtype)
        if not torch.allclose(grad_loss, promised, rtol=1e-6, atol=0.0):
            raise RuntimeError(
                f"gradient_scale promised an incoming gradient of {promised.item()}, but {grad_loss.item()} came; "
                "scale the loss as promised, or leave gradient_scale out"
            )
