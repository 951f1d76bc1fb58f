"""Host side of the Triton path: launches kernels, without waiting for the device.

Mode A launches `loss_rows`; mode B launches it and `gradient_rows`. The scalar loss is a `torch.sum` of the rows'
losses: one more launch, over N floats, but a deterministic one. Float atomics inside the kernel would not be, and
integer ones would bound the range of the objective and need a cleared buffer, which is a launch too.

The launch configuration depends only on the width and dtype of the logits, never on timing, so that a row's loss is the
same to the last bit in every run.

Shapes: N tokens, V logits a token (of this rank), K domains, T ranks that share the vocabulary.
"""

# A kernel's tl.constexpr parameters take plain Python values:
# pyright: reportArgumentType=false

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megamix_kernels import triton_kernels as kernels
from megamix_kernels.inputs import NUM_PARTIALS, Inputs, gather_partials

OVERWRITES = True  # the gradient may be written over the logits
FINISH_ROWS = 128
MAX_WARPS = 32
# Stated, because the default is to change, and with it the last bits.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
# TRITON_INTERPRET=1 makes kernels that run on the host.
INTERPRETED = not isinstance(kernels.loss_rows, triton.JITFunction)


class Launch(NamedTuple):
    """Launch configuration: ``num_warps`` warps read ``chunks`` x ``chunk`` neighbouring columns at a time."""

    chunks: int
    chunk: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.chunks}x{self.chunk} columns, {self.num_warps} warps"

    @property
    def ahead(self) -> bool:
        """Whether tiles are loaded ahead: a row with the most warps has a multiprocessor to itself, so that no other
        row's work hides its loads."""
        return self.num_warps == MAX_WARPS

    def rest(self, num_columns: int, valid_columns: int, edges: int) -> int:
        """Returns the columns of a chunk in a row's last tile: the fewest with which one tile is enough."""
        block = self.chunks * self.chunk
        left = 1
        for head in range(self.chunk if edges else 1):
            body = (num_columns - head) // self.chunk * self.chunk
            left = max(left, body - min(valid_columns - head, body) // block * block)
        return min(triton.next_power_of_2(triton.cdiv(left, self.chunks)), self.chunk)


@functools.lru_cache
def launch_for(num_columns: int, element_size: int, *, softcap: bool = False) -> Launch:
    """Returns the launch configuration for rows of this width.

    A chunk is one 16-byte load, and a thread has two loads in flight. The number of warps lets the second reading of a
    row come from the second-level cache: a multiprocessor holds about 32 warps of these kernels, so with 10 KiB of row
    per warp, the active rows of 132 multiprocessors take at most 42 MB.
    """
    chunk = 16 // element_size
    # With a softcap there is more to keep in registers: two loads of eight numbers a thread would spill some.
    chunks_a_warp = 32 if softcap and chunk > 4 else 64
    num_warps = min(triton.next_power_of_2(triton.cdiv(num_columns * element_size, 10 * 1024)), MAX_WARPS)
    chunks = min(chunks_a_warp * num_warps, triton.next_power_of_2(triton.cdiv(num_columns, chunk)))
    return Launch(max(chunks, 32 * num_warps), chunk, num_warps)


def edges_of(logits_NV: Tensor, grad_NV: Tensor | None) -> int:
    """Returns EDGES of `megamix_kernels.triton_rows`: where rows lie relative to multiples of 16 bytes."""
    place = _place(logits_NV)
    if grad_NV is not None and _place(grad_NV) != place:
        return 2
    return int(place != (0, 0) or logits_NV.shape[1] * logits_NV.element_size() % 16 != 0)


def _place(rows_NV: Tensor) -> tuple[int, int]:
    """The first row's place and the way from row to row, both modulo 16 bytes."""
    return rows_NV.data_ptr() % 16, rows_NV.stride(0) * rows_NV.element_size() % 16


def why_not(logits_NV: Tensor) -> str | None:
    """Returns the reason why these kernels cannot read the logits; None if they can."""
    if logits_NV.dtype == torch.float64:
        return "logits_NV is float64, wanted float32, float16 or bfloat16"
    if logits_NV.stride(1) != 1 and logits_NV.shape[1] > 1:
        return f"logits_NV has columns {logits_NV.stride(1)} elements apart, wanted adjacent ones"
    if not (logits_NV.is_cuda or INTERPRETED):
        return f"logits_NV is on {logits_NV.device}, wanted cuda (or TRITON_INTERPRET=1 before triton is imported)"
    return None


def forward(
    logits_NV: Tensor, inputs: Inputs, grad_NV: Tensor | None = None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Returns the loss, the token losses and the tensors that `gradient` needs; adds to the sums.

    With ``grad_NV``, which may be the logits, also writes the gradient for ``inputs.gradient_scale`` there (mode A).
    """
    num_rows, shard = logits_NV.shape[0], inputs.shard
    row_loss_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    token_loss_N = torch.empty_like(row_loss_N) if inputs.options.return_token_loss else None
    losses = {"row_losses": row_loss_N, "token_losses": token_loss_N}
    saved = ()
    if grad_NV is None or not shard.is_whole:
        saved = (torch.empty_like(row_loss_N), torch.empty_like(row_loss_N))
    if shard.group is None:
        _launch(kernels.loss_rows, num_rows, logits_NV, inputs, saved, inputs.gradient_scale, grad_NV, **losses)
    elif num_rows:
        # Each rank reads its columns, exchanges four numbers a row, and merges them the same way as all others.
        partials_4N = row_loss_N.new_empty(NUM_PARTIALS, num_rows)
        _launch(kernels.partial_rows, num_rows, logits_NV, inputs, partials=partials_4N)
        partials_T4N = gather_partials(partials_4N, shard.group)
        merge = {"partials": partials_T4N, "RANKS": len(partials_T4N), "ROWS": FINISH_ROWS, "num_warps": 4}
        num_blocks = triton.cdiv(num_rows, FINISH_ROWS)
        _launch(kernels.finish_rows, num_blocks, logits_NV, inputs, saved, **losses, **merge)
        if grad_NV is not None:
            gradient(logits_NV, inputs, saved, inputs.gradient_scale, grad_NV)
    return row_loss_N.sum(), token_loss_N, saved


def gradient(
    logits_NV: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], scale: float | Tensor | None, grad_NV: Tensor
) -> None:
    """Writes the gradient for the incoming gradient ``scale`` into grad_NV, which may be the logits."""
    _launch(kernels.gradient_rows, logits_NV.shape[0], logits_NV, inputs, saved, scale, grad_NV)


def _launch(
    kernel: Any,
    num_programs: int,
    logits_NV: Tensor,
    inputs: Inputs,
    saved: tuple[Tensor, ...] = (),
    scale: float | Tensor | None = None,
    grad_NV: Tensor | None = None,
    **others: Any,
) -> None:
    """Launches a kernel with the arguments that its signature names."""
    if not num_programs:
        return
    options, shard = inputs.options, inputs.shard
    launch = launch_for(logits_NV.shape[1], logits_NV.element_size(), softcap=bool(options.softcap))
    edges = edges_of(logits_NV, grad_NV)
    maxima, norms = saved or (None, None)
    known = {
        "logits": logits_NV,
        "gradients": grad_NV,
        "labels": inputs.labels_N,
        "domains": inputs.domain_N,
        "mask": inputs.mask_N,
        "weights": inputs.loss_weights_K,
        "references": inputs.reference_loss_N,
        "sums": inputs.sums.buffer if inputs.adds_to_sums else None,
        "maxima": maxima,
        "norms": norms,
        **_number_or_pointer("scale", scale),
        **_number_or_pointer("divisor", inputs.divisor),
        "num_rows": logits_NV.shape[0],
        "num_columns": logits_NV.shape[1],
        "valid_columns": shard.valid_columns,
        "first_column": shard.first_column,
        "row_stride": logits_NV.stride(0),
        "gradient_stride": 0 if grad_NV is None else grad_NV.stride(0),
        "ignore_index": options.ignore_index,
        "vocab_size": inputs.vocab_size,
        "num_domains": inputs.num_domains,
        "z_loss": options.z_loss,
        "softcap": options.softcap,
        "smoothing": options.label_smoothing,
        "Z_LOSS": bool(options.z_loss),
        "SOFTCAP": bool(options.softcap),
        "SMOOTHING": bool(options.label_smoothing),
        "GRADIENT": grad_NV is not None,
        "EDGES": edges,
        "AHEAD": launch.ahead,
        "CHUNKS": launch.chunks,
        "CHUNK": launch.chunk,
        "REST": launch.rest(logits_NV.shape[1], shard.valid_columns, edges),
        "num_warps": launch.num_warps,
        **others,
    }
    arguments = {name: known[name] for name in (*kernel.arg_names, "num_warps")}
    with _device_of(logits_NV):
        kernel[(num_programs,)](**arguments, **COMPILE_OPTIONS)


def _number_or_pointer(name: str, value: float | Tensor | None) -> dict[str, Any]:
    """Kernel arguments of a value that the host or only the device knows; the other one is neutral."""
    on_device = isinstance(value, Tensor)
    number = 1.0 if on_device or value is None else float(value)
    return {f"{name}_pointer": value if on_device else None, name: number}


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; under its interpreter the tensors are on the host."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
