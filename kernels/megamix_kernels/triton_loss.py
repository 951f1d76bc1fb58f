"""Launches the Triton kernels: what the host does in a call, without ever waiting for the device.

Mode A is one launch of `loss_rows`; mode B one of it and one of `gradient_rows`. The scalar loss is a `torch.sum` of
the rows' losses: one more launch, over N floats, but a deterministic one. Float atomics inside the kernel would not be,
and integer ones would bound the range of the objective and want a buffer to be cleared, which is a launch too.

The launch configuration depends on the width and dtype of the logits alone, never on timing, so that a row's loss is
the same to the last bit in every run.

Shapes: N tokens, V logits a token (of this rank), K domains, T ranks that share the vocabulary.
"""

# A kernel's tl.constexpr parameters take plain Python values:
# pyright: reportArgumentType=false

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megamix_kernels import triton_kernels as kernels
from megamix_kernels.task import NUM_PARTIALS, Task, gather_partials

OVERWRITES = True  # the gradient may be written over the logits
FINISH_ROWS = 128
# Stated, because the default is to change, and with it the last bits.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# TRITON_INTERPRET=1 makes kernels that run on the host.
INTERPRETED = not isinstance(kernels.loss_rows, triton.JITFunction)


class Launch(NamedTuple):
    """How a row is worked on: ``chunks`` x ``chunk`` neighbouring columns at a time, by ``num_warps`` warps."""

    chunks: int
    chunk: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.chunks}x{self.chunk} columns, {self.num_warps} warps"


def launch_for(num_columns: int, element_size: int, *, softcap: bool = False) -> Launch:
    """The launch for rows of that width.

    A chunk is one 16-byte load, and a thread has two of them under way. The number of warps is chosen for the second
    reading of a row to come from the second-level cache: a multiprocessor holds about 32 warps of these kernels, so at
    10 KiB of row a warp, the rows in work on 132 of them are at most 42 MB.
    """
    chunk = 16 // element_size
    # With a softcap there is more to keep in registers: two loads of eight numbers a thread would spill some.
    chunks_a_warp = 32 if softcap and chunk > 4 else 64
    num_warps = min(triton.next_power_of_2(triton.cdiv(num_columns * element_size, 10 * 1024)), 32)
    chunks = min(chunks_a_warp * num_warps, triton.next_power_of_2(triton.cdiv(num_columns, chunk)))
    return Launch(max(chunks, 32 * num_warps), chunk, num_warps)


def why_not(logits_NV: Tensor) -> str | None:
    """Why these kernels cannot work on the logits; None if they can."""
    if logits_NV.dtype == torch.float64:
        return "logits_NV is float64, wanted float32, float16 or bfloat16"
    if logits_NV.stride(1) != 1 and logits_NV.shape[1] > 1:
        return f"logits_NV has columns {logits_NV.stride(1)} elements apart, wanted adjacent ones"
    if not (logits_NV.is_cuda or INTERPRETED):
        return f"logits_NV is on {logits_NV.device}, wanted cuda (or TRITON_INTERPRET=1 before triton is imported)"
    return None


def forward(
    logits_NV: Tensor,
    task: Task,
    *,
    want_token_loss: bool,
    gradient_scale: float | Tensor | None = None,
    grad_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The loss, the token losses, and what `gradient` needs; adds the statistics.

    With ``grad_NV``, which may be the logits, the gradient for an incoming gradient of ``gradient_scale`` is written
    there (mode A).
    """
    num_rows = logits_NV.shape[0]
    row_loss_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    token_loss_N = torch.empty_like(row_loss_N) if want_token_loss else None
    saved = ()
    if grad_NV is None or not task.shard.is_whole:
        saved = (torch.empty_like(row_loss_N), torch.empty_like(row_loss_N))
    with _device_of(logits_NV):
        if num_rows and task.shard.is_whole:
            _launch_loss(logits_NV, task, row_loss_N, token_loss_N, saved, gradient_scale, grad_NV)
        elif num_rows:
            _launch_parallel_loss(logits_NV, task, row_loss_N, token_loss_N, saved)
            if grad_NV is not None:
                gradient(logits_NV, task, saved, gradient_scale, grad_NV)
    return row_loss_N.sum(), token_loss_N, saved


def gradient(
    logits_NV: Tensor, task: Task, saved: tuple[Tensor, ...], scale: float | Tensor | None, grad_NV: Tensor
) -> None:
    """Write the gradient for an incoming gradient of ``scale`` into grad_NV, which may be the logits."""
    if not logits_NV.shape[0]:
        return
    shard = task.shard
    with _device_of(logits_NV):
        kernels.gradient_rows[(logits_NV.shape[0],)](
            logits_NV,
            grad_NV,
            task.labels_N,
            task.domain_N,
            task.mask_N,
            task.loss_weights_K,
            *saved,
            **_scales(scale=scale, divisor=task.divisor),
            num_columns=logits_NV.shape[1],
            valid_columns=shard.valid_columns,
            first_column=shard.first_column,
            row_stride=logits_NV.stride(0),
            gradient_stride=grad_NV.stride(0),
            **_row_arguments(task),
            softcap=task.softcap,
            **_objective_arguments(task, "Z_LOSS"),
            SOFTCAP=bool(task.softcap),
            **_tile_arguments(logits_NV, task),
        )


def _launch_loss(
    logits_NV: Tensor,
    task: Task,
    row_loss_N: Tensor,
    token_loss_N: Tensor | None,
    saved: tuple[Tensor, ...],
    gradient_scale: float | Tensor | None,
    grad_NV: Tensor | None,
) -> None:
    kernels.loss_rows[(logits_NV.shape[0],)](
        logits_NV,
        grad_NV,
        task.labels_N,
        task.domain_N,
        task.mask_N,
        task.loss_weights_K,
        task.reference_loss_N,
        task.sums.buffer if task.shard.holds_sums else None,
        row_loss_N,
        token_loss_N,
        *(saved or (None, None)),
        **_scales(scale=gradient_scale, divisor=task.divisor),
        num_columns=logits_NV.shape[1],
        row_stride=logits_NV.stride(0),
        gradient_stride=0 if grad_NV is None else grad_NV.stride(0),
        **_row_arguments(task),
        softcap=task.softcap,
        **_objective_arguments(task, "Z_LOSS", "SMOOTHING"),
        SOFTCAP=bool(task.softcap),
        GRADIENT=grad_NV is not None,
        **_tile_arguments(logits_NV, task),
    )


def _launch_parallel_loss(
    logits_NV: Tensor, task: Task, row_loss_N: Tensor, token_loss_N: Tensor | None, saved: tuple[Tensor, ...]
) -> None:
    """Read this rank's columns, exchange four numbers a row, and merge them the same way on every rank."""
    shard, num_rows, num_columns = task.shard, *logits_NV.shape
    assert shard.group is not None
    partials_4N = row_loss_N.new_empty(NUM_PARTIALS, num_rows)
    kernels.partial_rows[(num_rows,)](
        logits_NV,
        task.labels_N,
        task.domain_N,
        task.mask_N,
        partials_4N,
        num_rows=num_rows,
        num_columns=num_columns,
        valid_columns=shard.valid_columns,
        first_column=shard.first_column,
        row_stride=logits_NV.stride(0),
        **_row_arguments(task),
        softcap=task.softcap,
        SOFTCAP=bool(task.softcap),
        SMOOTHING=bool(task.label_smoothing),
        **_tile_arguments(logits_NV, task),
    )
    partials_T4N = gather_partials(partials_4N, shard.group)
    kernels.finish_rows[(triton.cdiv(num_rows, FINISH_ROWS),)](
        partials_T4N,
        task.labels_N,
        task.domain_N,
        task.mask_N,
        task.loss_weights_K,
        task.reference_loss_N,
        task.sums.buffer if shard.holds_sums else None,
        row_loss_N,
        token_loss_N,
        *saved,
        **_scales(divisor=task.divisor),
        num_rows=num_rows,
        num_columns=num_columns,
        **_row_arguments(task),
        **_objective_arguments(task, "Z_LOSS", "SMOOTHING"),
        RANKS=partials_T4N.shape[0],
        ROWS=FINISH_ROWS,
        **COMPILE_OPTIONS,
    )


def _row_arguments(task: Task) -> dict[str, Any]:
    return {"ignore_index": task.ignore_index, "vocab_size": task.vocab_size, "num_domains": task.num_domains}


def _objective_arguments(task: Task, *flags: str) -> dict[str, Any]:
    on = {"Z_LOSS": bool(task.z_loss), "SMOOTHING": bool(task.label_smoothing)}
    return {"z_loss": task.z_loss, "smoothing": task.label_smoothing} | {flag: on[flag] for flag in flags}


def _scales(**values: float | Tensor | None) -> dict[str, Any]:
    """Each value as a number and a pointer, one of which is neutral."""
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        on_device = isinstance(value, Tensor)
        arguments[f"{name}_pointer"] = value if on_device else None
        arguments[name] = 1.0 if on_device or value is None else float(value)
    return arguments


def _tile_arguments(logits_NV: Tensor, task: Task) -> dict[str, Any]:
    launch = launch_for(logits_NV.shape[1], logits_NV.element_size(), softcap=bool(task.softcap))
    return {"CHUNKS": launch.chunks, "CHUNK": launch.chunk, "num_warps": launch.num_warps, **COMPILE_OPTIONS}


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; under its interpreter the tensors are on the host."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
