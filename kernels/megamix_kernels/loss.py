"""The domain loss of given logits: `domain_cross_entropy` and its place in autograd.

Both modes give the same result. Mode B computes the loss in the forward pass and the gradient in the backward pass,
when the incoming gradient is known; mode A knows that gradient beforehand (`LossOptions.gradient_scale`) and computes
both at once. Neither rescales a finished gradient.

Shapes: N tokens, V logits a token (of this rank), K domains.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megamix_kernels import checks, torch_loss
from megamix_kernels.compilation import not_compiled
from megamix_kernels.derivatives import differentiable_once
from megamix_kernels.inputs import Inputs, make_inputs
from megamix_kernels.options import LossOptions, settled
from megamix_kernels.overwriting import announce_overwriting, may_be_overwritten, refuse_overwritten
from megamix_kernels.sums import DomainSums


class DomainLoss(NamedTuple):
    """Result of `domain_cross_entropy`.

    Attributes:
        loss: scalar to differentiate, fp32 (float64 for float64 logits).
        stats: sums per domain: the object passed as ``sums``, which covers all calls since its last ``zero_``, or a new
            one.
        token_loss_N: with ``return_token_loss``, the negative log-likelihood of each token in nats, zero at ignored
            rows, in the dtype of ``loss``; not differentiable. ``stats.nats`` sums this quantity.
    """

    loss: Tensor
    stats: DomainSums
    token_loss_N: Tensor | None


@not_compiled
def domain_cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    domain_N: Tensor,
    num_domains: int,
    *,
    mask_N: Tensor | None = None,
    loss_weights_K: Tensor | None = None,
    reference_loss_N: Tensor | None = None,
    sums: DomainSums | None = None,
    keep_logits: bool = False,
    options: LossOptions = LossOptions(),
    **settings: Any,
) -> DomainLoss:
    """Weighted cross-entropy to differentiate, and exact loss sums for each domain, from one reading of the logits.

    With s = softcap * tanh(logits / softcap) (or the logits, if off), lse = log(sum(exp(s))) over the valid vocabulary
    and nll = lse - s[label], a counted token's objective is

        (1 - label_smoothing) * nll + label_smoothing * mean(lse - s) + z_loss * lse**2

    and the loss is sum(loss_weights_K[domain] * objective) / normaliser. The statistics sum nll alone, without weight,
    smoothing and z-loss, so that domains are compared by nats per token whatever is optimised. A token is counted
    unless its label is ``ignore_index`` or its mask is 0; other rows have zero loss and an exactly zero gradient, even
    if their logits are NaN. A counted row of weight 0 adds neither loss nor gradient either, whatever its own loss.

    A call inside a backward pass is a recomputation (activation checkpointing) of a call that has added to the sums
    already, so it adds nothing. Under torch.compile a call is run as it is, between two graphs.

    Nothing here waits for an accelerator, so values are checked on CPU tensors only: elsewhere a counted row whose
    label or domain id is out of range gets the loss NaN (so that the training loss shows it) and counts as non-finite
    of the nearest valid domain; no memory outside the tensors is touched. Ignored rows may hold any id and label.
    Computed in fp32 (float64 for float64 logits). On a CPU a row's loss is the same to the last bit whichever rows come
    with it. So it is on a GPU with Triton for logits of the same width and dtype, if rows are a multiple of 16 bytes
    apart; otherwise the last bits depend on where a row lies between two such multiples, which is the same for rows
    that are 8 rows (fp32: 4) or a multiple of it apart.

    The logits are consumed. The Triton path writes the gradient over them unless they are a leaf, a part of another
    tensor, or ``keep_logits`` is true: in the backward pass, or with ``gradient_scale`` at once. Autograd is told, so
    another backward step that needs the old values raises "modified by an inplace operation", and so does a second call
    on them. What nobody can see is any other read after the call (with gradient_scale) or after the backward pass: an
    accuracy or an auxiliary loss of the logits would be one of the gradient. Build it before the call and keep the
    logits.

    With ``process_group``, logits are [N, V / T] on each of its T ranks, rank 0 holding the first columns, and labels,
    domains and options are the same on all of them. The ranks exchange four numbers a row in one collective. Losses are
    equal to the last bit on all ranks; between different T they differ by rounding. Only the group's rank 0 adds to its
    sums: a sum over all ranks, or over the rank 0 of every group, counts each token once.

    Sources: z-loss, Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), section 5; soft-capped logits, Gemma Team 2024
    (Gemma 2, arXiv:2408.00118), section 2; label smoothing, Szegedy et al. 2016 (arXiv:1512.00567), section 7, weighted
    as in ``torch.nn.functional.cross_entropy``; excess loss, Xie et al. 2023 (DoReMi, arXiv:2305.10429), algorithm 1,
    clipped at zero per token.

    Args:
        logits_NV: fp32, fp16, bf16 or float64, with any strides. Must not be changed in place before the backward pass.
        labels_N: int64 or int32 token ids in [0, vocab_size), or ignore_index.
        domain_N: domain ids in [0, num_domains), any integer dtype.
        num_domains: K, from 1 to 65536.
        mask_N: 0 or 1 (bool, integer or floating); a choice of rows, not a weight. None counts all.
        loss_weights_K: factor of each domain's loss, floating; not differentiated. None means 1.
        reference_loss_N: a reference model's token losses in nats, floating; fills ``stats.excess_nats`` with max(nll -
            reference, 0). A token whose reference loss is not finite counts as non-finite.
        sums: accumulates in place, across micro-batches. None makes a new object.
        keep_logits: keep the logits as they are, at the price of memory for the gradient.
        options: the settings of `LossOptions`.
        settings: fields of ``options`` to replace for this call, for example ``z_loss=1e-4``.

    Returns:
        The loss, the sums and the token losses or None. N = 0 gives loss 0.

    Raises:
        TypeError: a tensor has an unsupported dtype, is not a tensor or is a DTensor; num_domains is not an int; sums
            is not a DomainSums; a setting is unknown or has a wrong type.
        ValueError: a shape, device, option or (on the CPU) a label, domain id, mask or normaliser is out of range, or
            the implementation cannot be used here.
        RuntimeError: an earlier call has written its gradient over the logits; the call is inside a transform of
            torch.func; or, when it happens, the gradient is differentiated again.
    """
    checks.check_no_transform()
    options = settled(options, settings)
    checks.check_logits(logits_NV)
    refuse_overwritten(logits_NV)
    backend = choose_backend(options.implementation, logits_NV)
    shape = (logits_NV.shape[0], logits_NV.shape[1])
    tensors = (labels_N, domain_N, num_domains, mask_N, loss_weights_K, reference_loss_N, sums)
    inputs = make_inputs(shape, logits_NV.device, *tensors, options)
    call = _Call(
        backend=backend,
        inputs=inputs,
        want_gradient=logits_NV.requires_grad and torch.is_grad_enabled(),
        overwrite=not keep_logits and may_be_overwritten(logits_NV),
    )
    loss, token_loss_N = _DomainLoss.apply(logits_NV, call)
    return DomainLoss(loss, inputs.sums, token_loss_N)


def choose_backend(implementation: str, logits_NV: Tensor) -> ModuleType:
    """Returns the module that computes the loss: `torch_loss`, or `triton_loss`, which is imported only for use.

    Raises:
        ValueError: "triton" cannot be used here.
    """
    if implementation == "torch" or (implementation == "auto" and not logits_NV.is_cuda):
        return torch_loss
    triton_loss = _triton_loss()
    reason = "the package triton is not installed" if triton_loss is None else triton_loss.why_not(logits_NV)
    if triton_loss is not None and reason is None:
        return triton_loss
    if implementation == "auto":
        return torch_loss
    raise ValueError(f"implementation 'triton' cannot be used: {reason}; use 'auto' or 'torch'")


@functools.cache
def _triton_loss() -> ModuleType | None:
    """The module, which needs triton; None without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from megamix_kernels import triton_loss

    return triton_loss


class _Call(NamedTuple):
    """Arguments of `_DomainLoss` beside the logits."""

    backend: ModuleType
    inputs: Inputs
    want_gradient: bool
    overwrite: bool

    def room_for_gradient(self, logits_NV: Tensor) -> Tensor:
        """Returns the logits themselves where they may be overwritten, and announces it; else new memory."""
        if not (self.overwrite and self.backend.OVERWRITES):
            return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        announce_overwriting(logits_NV)
        return logits_NV.detach()


class _DomainLoss(torch.autograd.Function):
    """The loss and the token losses, in either mode."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
        inputs = call.inputs
        at_once = call.want_gradient and inputs.gradient_scale is not None
        grad_NV = call.room_for_gradient(logits_NV) if at_once else None
        loss, token_loss_N, saved = call.backend.forward(logits_NV, inputs, grad_NV)
        ctx.call = call
        if grad_NV is None:
            ctx.save_for_backward(logits_NV, *inputs.tensors, *saved)
        ctx.handed_on = None if grad_NV is None else PromisedGradient(inputs, grad_NV)
        if token_loss_N is not None:
            ctx.mark_non_differentiable(token_loss_N)
        ctx.set_materialize_grads(False)
        return loss, token_loss_N

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return None, None
        if ctx.handed_on is not None:
            return ctx.handed_on.take(grad_loss)[0], None
        logits_NV, *others = ctx.saved_tensors
        call: _Call = ctx.call
        grad_NV = call.room_for_gradient(logits_NV)
        saved = tuple(others[len(call.inputs.tensors) :])
        call.backend.gradient(logits_NV, call.inputs, saved, grad_loss, grad_NV)
        return grad_NV, None


class PromisedGradient:
    """Gradients computed with the loss, handed on once, for the promised incoming gradient of the inputs, if any."""

    def __init__(self, inputs: Inputs, *gradients: Tensor) -> None:
        self._scale = inputs.gradient_scale
        self._check_on_device = inputs.options.check_promise
        self._gradients = gradients
        self._versions = [gradient._version for gradient in gradients]

    def take(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients.

        Raises:
            RuntimeError: they were taken before, were overwritten, or another incoming gradient was promised (seen on
                the CPU, and with ``check_promise``).
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
            check_promise(grad_loss, self._scale)
        elif self._scale is not None and self._check_on_device:
            assert_promise(grad_loss, self._scale)
        gradients, self._gradients = self._gradients, ()
        return gradients


def check_promise(grad_loss: Tensor, scale: float | Tensor) -> None:
    """Raises RuntimeError unless the incoming gradient is the promised one; reads both on the host."""
    promised = torch.as_tensor(scale, dtype=grad_loss.dtype)
    if not _kept(grad_loss, promised):
        raise RuntimeError(
            f"gradient_scale promised an incoming gradient of {promised.item()}, but {grad_loss.item()} came; "
            "scale the loss as promised, or leave gradient_scale out"
        )


def assert_promise(grad_loss: Tensor, scale: float | Tensor) -> None:
    """Like `check_promise`, on the device: nothing waits, and a broken promise ends the process at its next wait."""
    kept = _kept(grad_loss, torch.as_tensor(scale, dtype=grad_loss.dtype, device=grad_loss.device))
    message = "gradient_scale promised another incoming gradient than the one that came"
    torch._assert_async(kept, message)  # pyright: ignore[reportPrivateImportUsage]


def _kept(grad_loss: Tensor, promised: Tensor) -> Tensor:
    return (grad_loss - promised).abs() <= 1e-6 * promised.abs()
