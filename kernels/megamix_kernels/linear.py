"""The domain loss from hidden states, for vocabularies whose logits do not fit into memory.

Logits exist for a chunk of rows at a time: they are computed, turned into loss and gradient at once (mode A), and
multiplied into the gradients of hidden states and weight before the next chunk replaces them. So the forward pass
finishes the gradients. A promised incoming gradient is part of them; else they are gradients of the weighted sum, and
the backward pass multiplies them, not the logits, by the incoming gradient, as it rounds them. A trainer that keeps
sums of gradients lets the chunks add to its sum of the weight's.

Shapes: N tokens, H hidden, V vocabulary (of this rank), K domains, R rows of one chunk.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamix_kernels import checks
from megamix_kernels.compilation import not_compiled
from megamix_kernels.derivatives import differentiable_once
from megamix_kernels.inputs import Inputs, compute_dtype, divided, is_recomputation, make_inputs
from megamix_kernels.loss import DomainLoss, PromisedGradient, choose_backend
from megamix_kernels.options import LossOptions, settled
from megamix_kernels.sums import DomainSums

CHUNK_ELEMENTS = 2**28
# Products of fewer or odd numbers of rows leave tensor cores idle.
CHUNK_MULTIPLE = 128


@not_compiled
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
    sums: DomainSums | None = None,
    weight_gradient_VH: Tensor | None = None,
    chunk_rows: int | None = None,
    accumulate_fp32: bool = True,
    options: LossOptions = LossOptions(),
    **settings: Any,
) -> DomainLoss:
    """`domain_cross_entropy` of ``hidden_NH @ weight_VH.T``, of which only a chunk of rows exists at a time.

    The result equals `domain_cross_entropy` on logits rounded to the dtype of the inputs. Beside a chunk's logits, the
    gradients take memory: [N, H], and [V, H] in fp32 or the weight's dtype. Under autocast, both factors are cast as
    those of any other product. Hidden states of ignored rows must be finite: 0 times NaN is NaN in the gradient of the
    weight.

    With ``process_group``, ``weight_VH`` holds this rank's rows of the vocabulary, and the gradient of ``hidden_NH`` is
    this rank's part, to be summed over the group by the caller. Each chunk then costs a collective.

    Without ``gradient_scale``, an incoming gradient other than 1 / normaliser is multiplied into the finished gradients
    of hidden states and weight.

    Args:
        hidden_NH: fp32, fp16, bf16 or float64.
        weight_VH: the output projection, in the dtype of hidden_NH.
        weight_gradient_VH: a sum of gradients, such as Megatron's ``main_grad``, in fp32 or the weight's dtype. A call
            with gradients enabled adds the weight's to it in the forward pass, and autograd hands none to the weight.
            Wants ``gradient_scale``.
        chunk_rows: R. None: as many rows as make 2**28 logits (512 MiB in bf16), a multiple of 128.
        accumulate_fp32: whether chunks add to the weight's gradient in fp32, rounded once at the end, or in the
            weight's dtype, with half of the memory and a rounding per chunk.

    The other arguments, the result and the errors are those of `domain_cross_entropy`.

    Raises:
        TypeError: as there, or hidden_NH and weight_VH have different dtypes.
        ValueError: as there, or their shapes do not match, or chunk_rows is not positive, or weight_gradient_VH comes
            without gradient_scale.
        RuntimeError: weight_gradient_VH in a recomputation, which would add to it a second time.
    """
    checks.check_no_transform()
    options = settled(options, settings)
    factors = _as_in_products(hidden_NH), _as_in_products(weight_VH)
    checks.check_projection(*factors)
    shape = (hidden_NH.shape[0], weight_VH.shape[0])
    chunk_rows = default_chunk_rows(shape[1]) if chunk_rows is None else chunk_rows
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be positive, got {chunk_rows}")
    # One column stands for the logits, whose columns will be adjacent whatever the strides of hidden_NH.
    backend = choose_backend(options.implementation, factors[0][:, :1])
    tensors = (labels_N, domain_N, num_domains, mask_N, loss_weights_K, reference_loss_N, sums)
    inputs = make_inputs(shape, hidden_NH.device, *tensors, options)
    enabled = torch.is_grad_enabled()
    if weight_gradient_VH is not None:
        checks.check_weight_gradient(weight_gradient_VH, factors[1])
        if enabled:
            _check_adds_once(inputs)
    call = _LinearCall(
        backend=backend,
        inputs=inputs,
        factors=factors,
        want_hidden=enabled and hidden_NH.requires_grad,
        want_weight=enabled and (weight_VH.requires_grad or weight_gradient_VH is not None),
        weight_gradient_VH=weight_gradient_VH,
        chunk_rows=chunk_rows,
        accumulate_fp32=accumulate_fp32,
    )
    loss, token_loss_N = _LinearDomainLoss.apply(hidden_NH, weight_VH, call)
    return DomainLoss(loss, inputs.sums, token_loss_N)


def default_chunk_rows(num_columns: int) -> int:
    """Returns the rows of a chunk for a vocabulary of this width (of this rank)."""
    return max(1, CHUNK_ELEMENTS // num_columns // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _check_adds_once(inputs: Inputs) -> None:
    """Raises unless a call can add the gradient of the weight to a sum."""
    if inputs.gradient_scale is None:
        raise ValueError("weight_gradient_VH is added to before the incoming gradient is known; give gradient_scale")
    if is_recomputation():
        raise RuntimeError(
            "weight_gradient_VH is added to in the forward pass, and activation checkpointing runs this one again; take "
            "the loss out of the checkpointed part, or leave weight_gradient_VH out"
        )


def _as_in_products(factor: Tensor) -> Tensor:
    """Returns the values of a factor in the dtype in which autocast multiplies them; it spares float64."""
    if not isinstance(factor, Tensor):
        return factor  # an error of the checks to come
    factor, device_type = factor.detach(), factor.device.type
    is_cast = factor.is_floating_point() and factor.dtype != torch.float64
    if is_cast and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return factor.to(torch.get_autocast_dtype(device_type))
    return factor


class _LinearCall(NamedTuple):
    """Arguments of `_LinearDomainLoss` beside hidden states and weight, which ``factors`` are the values of, cast."""

    backend: ModuleType
    inputs: Inputs
    factors: tuple[Tensor, Tensor]
    want_hidden: bool
    want_weight: bool
    weight_gradient_VH: Tensor | None
    chunk_rows: int
    accumulate_fp32: bool


class _LinearDomainLoss(torch.autograd.Function):
    """The loss and the token losses; the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, call: _LinearCall) -> tuple[Tensor, Tensor | None]:
        returns_weight = call.want_weight and call.weight_gradient_VH is None
        wanted = ((hidden_NH, call.want_hidden), (weight_VH, returns_weight))
        dtypes = [factor.dtype for factor, is_wanted in wanted if is_wanted]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            loss, token_loss_N, gradients = _forward_in_chunks(*call.factors, call)
        if call.inputs.gradient_scale is not None:
            gradients = [_scaled(gradient, None, dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
        ctx.inputs = call.inputs
        ctx.wanted = call.want_hidden, returns_weight
        ctx.dtypes = dtypes
        ctx.gradients = PromisedGradient(call.inputs, *gradients)
        # Kept by autograd for the notice of changes in place.
        ctx.save_for_backward(*[divisor for divisor in (call.inputs.divisor,) if isinstance(divisor, Tensor)])
        if token_loss_N is not None:
            ctx.mark_non_differentiable(token_loss_N)
        ctx.set_materialize_grads(False)
        return loss, token_loss_N

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss, inputs = grad_outputs[0], ctx.inputs
        if grad_loss is None:
            return None, None, None
        gradients = list(ctx.gradients.take(grad_loss))
        if inputs.gradient_scale is None:
            (divisor,) = ctx.saved_tensors or (inputs.divisor,)
            factor = grad_loss / divisor
            if isinstance(divisor, Tensor):
                factor = factor.where(divisor != 0, 0.0)  # no row is counted
            gradients = [
                _scaled(gradient, factor, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
        want_hidden, want_weight = ctx.wanted
        grad_hidden = gradients.pop(0) if want_hidden else None
        grad_weight = gradients.pop(0) if want_weight else None
        return grad_hidden, grad_weight, None


def _forward_in_chunks(
    hidden_NH: Tensor, weight_VH: Tensor, call: _LinearCall
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Returns the loss, the token losses and the wanted gradients; that of the weight in the dtype of its sum, or added
    to the caller's sum."""
    inputs, is_promised = call.inputs, call.inputs.gradient_scale is not None
    if not is_promised:
        # Gradients of the weighted sum have size one, which fp16 can hold.
        inputs = inputs._replace(divisor=1.0, gradient_scale=1.0)
    grad_hidden_NH = torch.empty_like(hidden_NH) if call.want_hidden else None
    grad_weight_VH = call.weight_gradient_VH
    sum_dtype = torch.float32 if call.accumulate_fp32 and weight_VH.dtype != torch.float64 else weight_VH.dtype
    if grad_weight_VH is not None:
        sum_dtype = grad_weight_VH.dtype

    losses, token_losses = [], []
    for start in range(0, hidden_NH.shape[0], call.chunk_rows):
        rows = slice(start, start + call.chunk_rows)
        hidden_RH = hidden_NH[rows]
        logits_RV = hidden_RH @ weight_VH.T
        grad_RV = None
        if call.want_hidden or call.want_weight:
            grad_RV = logits_RV if call.backend.OVERWRITES else torch.empty_like(logits_RV)
        loss, token_loss_R, _ = call.backend.forward(logits_RV, _rows_of(inputs, rows), grad_RV)
        losses.append(loss)
        token_losses.append(token_loss_R)
        if grad_RV is not None and grad_hidden_NH is not None:
            torch.mm(grad_RV, weight_VH, out=grad_hidden_NH[rows])
        if grad_RV is not None and call.want_weight:
            grad_weight_VH = add_product(grad_weight_VH, grad_RV.T, hidden_RH, sum_dtype)

    zero = torch.zeros((), dtype=compute_dtype(hidden_NH), device=hidden_NH.device)
    loss = torch.stack(losses).sum() if losses else zero
    token_loss_N = None
    if inputs.options.return_token_loss:
        token_loss_N = torch.cat(token_losses) if token_losses else zero.expand(0)
    if call.want_weight and grad_weight_VH is None:
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=sum_dtype)
    if call.weight_gradient_VH is not None:
        grad_weight_VH = None
    gradients = [gradient for gradient in (grad_hidden_NH, grad_weight_VH) if gradient is not None]
    return loss if is_promised else divided(loss, call.inputs.divisor), token_loss_N, gradients


def _rows_of(inputs: Inputs, rows: slice) -> Inputs:
    """Inputs of some of the rows."""
    return inputs._replace(
        labels_N=inputs.labels_N[rows],
        domain_N=inputs.domain_N[rows],
        mask_N=None if inputs.mask_N is None else inputs.mask_N[rows],
        reference_loss_N=None if inputs.reference_loss_N is None else inputs.reference_loss_N[rows],
    )


def add_product(sum_VH: Tensor | None, left_VR: Tensor, right_RH: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum in this dtype, with the product added in place; None is a sum of nothing."""
    if left_VR.dtype != dtype and left_VR.device.type != "cpu":
        if sum_VH is None:
            return torch.mm(left_VR, right_RH, out_dtype=dtype)
        return torch.addmm(sum_VH, left_VR, right_RH, out_dtype=dtype, out=sum_VH)
    # A CPU has no product that is wider than its factors.
    left_VR, right_RH = left_VR.to(dtype), right_RH.to(dtype)
    return left_VR @ right_RH if sum_VH is None else sum_VH.addmm_(left_VR, right_RH)


def _scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns the gradient times the factor in this dtype, rounded once: in place, or in the pass that casts it."""
    if factor is None:
        return gradient.to(dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
