"""The domain loss straight from hidden states, for vocabularies whose logits do not fit into memory.

Logits exist for a chunk of rows at a time: they are multiplied out, turned into loss and gradient at once (mode A), and
multiplied into the gradients of hidden states and weight before the next chunk takes their place. The gradients are
therefore finished in the forward pass. If the incoming gradient was promised, it is in them already; if not, they are
those of the weighted sum, and the backward pass multiplies them, not the logits, by what came in.

Shapes: N tokens, H hidden, V vocabulary (of this rank), K domains, R rows of one chunk.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamix_kernels import checks
from megamix_kernels.loss import DomainLoss, PromisedGradient, choose_backend, make_task
from megamix_kernels.sums import DomainSums
from megamix_kernels.task import Task, compute_dtype

CHUNK_ELEMENTS = 2**28


def linear_domain_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
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
    process_group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    chunk_rows: int | None = None,
    accumulate_fp32: bool = True,
) -> DomainLoss:
    """`domain_cross_entropy` of ``hidden_NH @ weight_VH.T``, of which only a chunk of rows exists at a time.

    The result is that of `domain_cross_entropy` on logits rounded to the dtype of the inputs. Beside a chunk's logits,
    memory is needed for the gradients: [N, H], and [V, H] in fp32 or the weight's dtype.

    With ``process_group``, ``weight_VH`` holds this rank's rows of the vocabulary, and the gradient of ``hidden_NH`` is
    this rank's part, to be summed over the group by whatever feeds the hidden states to all ranks. Each chunk then
    costs a collective.

    Args:
        hidden_NH: fp32, fp16, bf16 or float64.
        weight_VH: the output projection, in the dtype of hidden_NH.
        gradient_scale: as for `domain_cross_entropy`; without it, an incoming gradient other than 1 / normaliser is
            multiplied into the finished gradients of hidden states and weight.
        chunk_rows: R. None: as many rows as make 2**28 logits (512 MiB in bf16).
        accumulate_fp32: whether chunks add to the weight's gradient in fp32 before it is rounded once, or in the
            weight's dtype, with half of the memory and a rounding a chunk.

    The other arguments, the result and the errors are those of `domain_cross_entropy`.

    Raises:
        TypeError: as there, or hidden_NH and weight_VH have different dtypes.
        ValueError: as there, or the two do not fit each other, or chunk_rows is not positive.
    """
    checks.check_projection(hidden_NH, weight_VH)
    (num_rows, _), num_columns = hidden_NH.shape, weight_VH.shape[0]
    chunk_rows = max(1, CHUNK_ELEMENTS // num_columns) if chunk_rows is None else chunk_rows
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    # One column stands for the logits, whose own columns will be adjacent whatever the strides of hidden_NH.
    backend = choose_backend(implementation, hidden_NH[:, :1])
    task = make_task(
        (num_rows, num_columns),
        hidden_NH.device,
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
    gradient_scale = checks.check_scalar("gradient_scale", gradient_scale, hidden_NH.device, positive=False)
    enabled = torch.is_grad_enabled()
    plan = _Plan(
        backend=backend,
        task=task,
        gradient_scale=gradient_scale,
        want_hidden=enabled and hidden_NH.requires_grad,
        want_weight=enabled and weight_VH.requires_grad,
        want_token_loss=return_token_loss,
        chunk_rows=chunk_rows,
        accumulate_fp32=accumulate_fp32,
    )
    loss, token_loss_N = _LinearDomainLoss.apply(hidden_NH, weight_VH, plan)
    return DomainLoss(loss, task.sums, token_loss_N)


class _Plan(NamedTuple):
    """What `_LinearDomainLoss` does with its inputs."""

    backend: ModuleType
    task: Task
    gradient_scale: float | Tensor | None
    want_hidden: bool
    want_weight: bool
    want_token_loss: bool
    chunk_rows: int
    accumulate_fp32: bool


class _LinearDomainLoss(torch.autograd.Function):
    """The loss and the token losses; the gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None]:
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        loss, token_loss_N, gradients = _forward_in_chunks(hidden_NH, weight_VH, plan)
        ctx.plan = plan
        ctx.gradients = PromisedGradient(plan.gradient_scale, *gradients)
        if token_loss_N is not None:
            ctx.mark_non_differentiable(token_loss_N)
        ctx.set_materialize_grads(False)
        return loss, token_loss_N

    @staticmethod
    @once_differentiable  # whose type makes ctx positional-only, hence the comment for the type checker
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss, plan = grad_outputs[0], ctx.plan
        if grad_loss is None:
            return None, None, None
        gradients = list(ctx.gradients.take(grad_loss))
        if plan.gradient_scale is None:
            gradients = [gradient.mul_(grad_loss / plan.task.divisor) for gradient in gradients]
        grad_hidden = gradients.pop(0) if plan.want_hidden else None
        grad_weight = gradients.pop(0) if plan.want_weight else None
        return grad_hidden, grad_weight, None


def _forward_in_chunks(hidden_NH: Tensor, weight_VH: Tensor, plan: _Plan) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The loss, the token losses and the wanted gradients."""
    num_rows = hidden_NH.shape[0]
    # Without a promise the logits' gradients are those of the weighted sum, of size one, which fp16 can hold.
    task = plan.task if plan.gradient_scale is not None else replace(plan.task, divisor=1.0)
    scale = 1.0 if plan.gradient_scale is None else plan.gradient_scale
    gradients: list[Tensor] = []
    grad_hidden_NH = torch.empty_like(hidden_NH) if plan.want_hidden else None
    grad_weight_VH = None
    if plan.want_weight:
        dtype = torch.float32 if plan.accumulate_fp32 and weight_VH.dtype != torch.float64 else weight_VH.dtype
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype)

    losses, token_losses = [], []
    for start in range(0, num_rows, plan.chunk_rows):
        rows = slice(start, start + plan.chunk_rows)
        hidden_RH = hidden_NH[rows]
        logits_RV = hidden_RH @ weight_VH.T
        grad_RV = None
        if plan.want_hidden or plan.want_weight:
            grad_RV = logits_RV if plan.backend.OVERWRITES else torch.empty_like(logits_RV)
        loss, token_loss_R, _ = plan.backend.forward(
            logits_RV,
            _rows_of(task, rows),
            want_token_loss=plan.want_token_loss,
            gradient_scale=scale,
            grad_NV=grad_RV,
        )
        losses.append(loss)
        token_losses.append(token_loss_R)
        if grad_RV is not None and grad_hidden_NH is not None:
            torch.mm(grad_RV, weight_VH, out=grad_hidden_NH[rows])
        if grad_RV is not None and grad_weight_VH is not None:
            _add_product(grad_weight_VH, grad_RV.T, hidden_RH)

    zero = torch.zeros((), dtype=compute_dtype(hidden_NH), device=hidden_NH.device)
    loss = torch.stack(losses).sum() if losses else zero
    if plan.gradient_scale is None:
        loss = loss / plan.task.divisor
    token_loss_N = None
    if plan.want_token_loss:
        token_loss_N = torch.cat(token_losses) if token_losses else zero.expand(0)
    if grad_hidden_NH is not None:
        gradients.append(grad_hidden_NH)
    if grad_weight_VH is not None:
        gradients.append(grad_weight_VH.to(weight_VH.dtype) if plan.gradient_scale is not None else grad_weight_VH)
    return loss, token_loss_N, gradients


def _rows_of(task: Task, rows: slice) -> Task:
    """The task of some of the rows."""
    return replace(
        task,
        labels_N=task.labels_N[rows],
        domain_N=task.domain_N[rows],
        mask_N=None if task.mask_N is None else task.mask_N[rows],
        reference_loss_N=None if task.reference_loss_N is None else task.reference_loss_N[rows],
    )


def _add_product(sum_VH: Tensor, left_VR: Tensor, right_RH: Tensor) -> None:
    """Add a product to the sum in place, in the sum's dtype also where the factors are narrower."""
    if sum_VH.dtype == left_VR.dtype:
        sum_VH.addmm_(left_VR, right_RH)
    elif sum_VH.is_cuda:
        torch.addmm(sum_VH, left_VR, right_RH, out_dtype=sum_VH.dtype, out=sum_VH)
    else:
        sum_VH.addmm_(left_VR.to(sum_VH.dtype), right_RH.to(sum_VH.dtype))
