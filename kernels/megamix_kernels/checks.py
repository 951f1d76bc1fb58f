"""Checks of tensors and scalars; an error names the value seen and the value wanted.

All but `check_values` read only types, shapes, dtypes and devices, so that no accelerator is waited for.

Shapes: N tokens, V logits a token, K domains.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

MAX_DOMAINS = 65536
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
SIGNED_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGER_DTYPES = (*SIGNED_DTYPES, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
VECTOR_DTYPES = {
    "labels_N": LABEL_DTYPES,
    "domain_N": INTEGER_DTYPES,
    "mask_N": (torch.bool, torch.uint8, *SIGNED_DTYPES, *FLOAT_DTYPES),
    "reference_loss_N": FLOAT_DTYPES,
}


def check_num_domains(num_domains: int) -> None:
    """Raise TypeError or ValueError unless num_domains is an int from 1 to `MAX_DOMAINS`."""
    if not isinstance(num_domains, int) or isinstance(num_domains, bool):
        raise TypeError(f"num_domains must be an int, got {num_domains!r} ({type(num_domains).__name__})")
    if not 1 <= num_domains <= MAX_DOMAINS:
        raise ValueError(f"num_domains must be from 1 to {MAX_DOMAINS}, got {num_domains}")


def check_logits(logits_NV: Tensor) -> None:
    """Raise unless the logits are a floating tensor [N, V] with V >= 1."""
    _check_dtype("logits_NV", logits_NV, FLOAT_DTYPES)
    shape = logits_NV.shape
    if len(shape) == 2 and shape[1] >= 1:
        return
    shape = list(shape)
    if len(shape) != 2:
        hint = "; reshape [..., V] to [-1, V], and labels and domains to [-1]" if len(shape) > 2 else ""
        raise ValueError(f"logits_NV must have two dimensions [N, V], got shape {shape}{hint}")
    raise ValueError(f"logits_NV must have at least one column, got shape {shape}")


def check_projection(hidden_NH: Tensor, weight_VH: Tensor) -> None:
    """Raise unless [N, H] and [V, H] have one floating dtype and device, V >= 1 and H >= 1."""
    _check_dtype("hidden_NH", hidden_NH, FLOAT_DTYPES)
    _check_dtype("weight_VH", weight_VH, (hidden_NH.dtype,))
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        shapes = f"{list(hidden_NH.shape)} and {list(weight_VH.shape)}"
        raise ValueError(f"hidden_NH and weight_VH must be [N, H] and [V, H], got {shapes}")
    if not weight_VH.numel():
        raise ValueError(f"weight_VH must have at least one row and one column, got {list(weight_VH.shape)}")
    if hidden_NH.device != weight_VH.device:
        raise ValueError(f"weight_VH is on {weight_VH.device}, but hidden_NH is on {hidden_NH.device}; move it there")


def check_weight_gradient(sum_VH: Tensor, weight_VH: Tensor) -> None:
    """Raise unless gradients of the weight can be added to the sum: its shape and device, and its dtype or fp32."""
    wider = () if weight_VH.dtype == torch.float64 else (torch.float32,)
    _check_dtype("weight_gradient_VH", sum_VH, tuple(dict.fromkeys((*wider, weight_VH.dtype))))
    if sum_VH.shape != weight_VH.shape or sum_VH.device != weight_VH.device:
        seen, wanted = (f"{list(tensor.shape)} on {tensor.device}" for tensor in (sum_VH, weight_VH))
        raise ValueError(f"weight_gradient_VH is {seen}, wanted {wanted}, like weight_VH")


def check_vector(name: str, vector_N: Tensor | None, num_rows: int, device: torch.device) -> None:
    """Raise unless the tensor has one entry a row of the logits, a dtype of `VECTOR_DTYPES` and the logits' device."""
    _check_like(name, vector_N, VECTOR_DTYPES[name], num_rows, device, "one entry a row of logits_NV")


def check_loss_weights(loss_weights_K: Tensor | None, num_domains: int, device: torch.device) -> None:
    """Raise unless the weights are None or a floating tensor [K] on the device."""
    if loss_weights_K is not None:
        _check_like("loss_weights_K", loss_weights_K, FLOAT_DTYPES, num_domains, device, "one entry a domain")


def check_scalar(
    name: str, value: float | Tensor | None, device: torch.device, *, positive: bool
) -> float | Tensor | None:
    """Returns the value as a number if the host knows it, else as a tensor on the device; None stays None.

    Raises:
        TypeError: it is neither a number nor a tensor, or the tensor is complex or bool.
        ValueError: the tensor has several elements or is on a third device, or the host sees a value that is not finite
            or, with ``positive``, not positive; a tensor may be 0.
    """
    if value is None:
        return None
    may_be_zero = not positive or isinstance(value, Tensor)
    if isinstance(value, Tensor):
        _check_dtype(name, value, (*FLOAT_DTYPES, *INTEGER_DTYPES))
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {list(value.shape)}")
        if value.device.type != "cpu":
            if value.device != device:
                raise ValueError(f"{name} is on {value.device}; wanted {device}, like logits_NV, or cpu")
            return value.detach().reshape(())
        value = float(value.detach())
    elif not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number or a tensor with one element, got {value!r}")
    if not math.isfinite(value) or (positive and value < 0) or (value == 0 and not may_be_zero):
        raise ValueError(f"{name} must be finite{' and positive' if positive else ''}, got {value}")
    return value


def check_nothing_is_counted(name: str, counted_N: Tensor) -> None:
    """Raise ValueError for a divisor of 0 if there is something to divide; for tensors on the host only."""
    num_counted = int(counted_N.sum())
    if num_counted:
        raise ValueError(f"{name} must be finite and positive, got 0.0 for {num_counted} counted rows")


def check_values(
    labels_N: Tensor,
    domain_N: Tensor,
    mask_N: Tensor | None,
    counted_N: Tensor,
    ignore_index: int,
    vocab_size: int,
    num_domains: int,
) -> None:
    """Raise ValueError for values out of range in counted rows; for tensors on the host only."""
    if mask_N is not None:
        _refuse_any("mask_N", mask_N, (mask_N != 0) & (mask_N != 1), "must be 0 or 1")
    wanted = f"must be in [0, {vocab_size}), or {ignore_index} to ignore the row"
    _refuse_any("labels_N", labels_N, counted_N & ((labels_N < 0) | (labels_N >= vocab_size)), wanted)
    domain_N = domain_N.long()
    outside_N = (domain_N < 0) | (domain_N >= num_domains)
    _refuse_any("domain_N", domain_N, counted_N & outside_N, f"must be in [0, {num_domains}), the number of domains")


def check_no_transform() -> None:
    """Raise RuntimeError inside a transform of torch.func, whose tensors stand for others."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the loss kernels write through pointers and do not work inside torch.func (grad, vmap, jvp, ...); use "
            "torch.autograd, or torch.nn.functional.cross_entropy there"
        )


def _check_dtype(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if isinstance(tensor, Tensor) and tensor.dtype in dtypes:
        if type(tensor) is not Tensor and hasattr(tensor, "to_local"):
            raise TypeError(
                f"{name} is a {type(tensor).__name__}, which is spread over ranks; pass {name}.to_local(), and "
                "process_group= where the ranks share the vocabulary"
            )
        return
    wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    seen = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
    raise TypeError(f"{name} must be a tensor of {wanted}; got {seen}")


def _check_like(
    name: str, tensor: object, dtypes: tuple[torch.dtype, ...], length: int, device: torch.device, meaning: str
) -> None:
    _check_dtype(name, tensor, dtypes)
    assert isinstance(tensor, Tensor)
    if tensor.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], {meaning}; got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but logits_NV is on {device}; move it there")


def _refuse_any(name: str, values_N: Tensor, bad_N: Tensor, wanted: str) -> None:
    if bad_N.any():
        row = int(bad_N.nonzero()[0, 0])
        raise ValueError(f"{name}[{row}] is {values_N[row].item()}; it {wanted} ({int(bad_N.sum())} such rows)")
