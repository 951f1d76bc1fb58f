"""Host side of the Triton path: launches kernels, without waiting for the device.

Mode A launches `loss_rows`; mode B launches it and `gradient_rows`. The scalar loss is a `torch.sum` of the rows'
losses: one more launch, over N floats, but a deterministic one. Float atomics inside the kernel would not be, and
integer ones would bound the range of the objective and need a cleared buffer, which is a launch too.

The launch configuration depends only on the width, dtype and alignment of the logits, never on timing, so that a row's
loss is the same to the last bit in every run.

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
FINISH_WARPS = 4
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


@functools.cache
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


@functools.cache
def rest_of(launch: Launch, num_columns: int, valid_columns: int, edges: int) -> int:
    """Returns the columns of a chunk in a row's last tile: the fewest with which one tile is enough."""
    block = launch.chunks * launch.chunk
    left = 1
    for head in range(launch.chunk if edges else 1):
        body = (num_columns - head) // launch.chunk * launch.chunk
        left = max(left, body - min(valid_columns - head, body) // block * block)
    return min(int(triton.next_power_of_2(triton.cdiv(left, launch.chunks))), launch.chunk)


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
    num_rows, options, shard = logits_NV.shape[0], inputs.options, inputs.shard
    row_loss_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    token_loss_N = torch.empty_like(row_loss_N) if options.return_token_loss else None
    state_N2 = row_loss_N.new_empty(num_rows, 2) if grad_NV is None or not shard.is_whole else None
    saved = () if state_N2 is None else (state_N2,)
    if not num_rows:
        return row_loss_N.sum(), token_loss_N, saved
    sums = inputs.sums.buffer if inputs.adds_to_sums else None
    outputs = (inputs.reference_loss_N, sums, row_loss_N, token_loss_N, state_N2)
    z_loss, softcap, smoothing = _settings(inputs)
    layout = _Layout.of(logits_NV, grad_NV if shard.is_whole else None, inputs)
    with _device_of(logits_NV):
        if shard.group is None:
            layout.launch(
                kernels.loss_rows,
                *(logits_NV, grad_NV, layout.row_stride, layout.gradient_stride, logits_NV.shape[1]),
                *_tokens(inputs),
                *outputs,
                *(inputs.gradient_scale, inputs.divisor, z_loss, softcap, smoothing),
                *layout.constants_ahead,
            )
            return row_loss_N.sum(), token_loss_N, saved
        # Each rank reads its columns, exchanges four numbers a row, and merges them the same way as all others.
        partials_4N = row_loss_N.new_empty(NUM_PARTIALS, num_rows)
        layout.launch(
            kernels.partial_rows,
            *(logits_NV, layout.row_stride, logits_NV.shape[1], shard.valid_columns, shard.first_column),
            *_tokens(inputs, weights=False),
            *(partials_4N, num_rows, softcap, smoothing),
            *layout.constants_ahead,
        )
        partials_T4N = gather_partials(partials_4N, shard.group)
        _launch(
            *(kernels.finish_rows, triton.cdiv(num_rows, FINISH_ROWS), FINISH_WARPS),
            *(partials_T4N, num_rows, logits_NV.shape[1]),
            *_tokens(inputs),
            *outputs,
            *(inputs.divisor, z_loss, smoothing, len(partials_T4N), FINISH_ROWS),
        )
    if grad_NV is not None:
        gradient(logits_NV, inputs, saved, inputs.gradient_scale, grad_NV)
    return row_loss_N.sum(), token_loss_N, saved


def gradient(
    logits_NV: Tensor, inputs: Inputs, saved: tuple[Tensor, ...], scale: float | Tensor | None, grad_NV: Tensor
) -> None:
    """Writes the gradient for the incoming gradient ``scale`` into grad_NV, which may be the logits."""
    if not logits_NV.shape[0]:
        return
    shard, layout = inputs.shard, _Layout.of(logits_NV, grad_NV, inputs)
    with _device_of(logits_NV):
        layout.launch(
            kernels.gradient_rows,
            *(logits_NV, grad_NV, layout.row_stride, layout.gradient_stride),
            *(logits_NV.shape[1], shard.valid_columns, shard.first_column),
            *_tokens(inputs),
            *(*saved, scale, inputs.divisor),
            *_settings(inputs),
            *layout.constants,
        )


class _Layout(NamedTuple):
    """Where rows lie, and the launch for them; ``constants`` are EDGES, CHUNKS and REST of the kernels."""

    num_rows: int
    row_stride: int
    gradient_stride: int | None
    constants: tuple[int, int, int]
    ahead: bool
    num_warps: int

    @classmethod
    def of(cls, logits_NV: Tensor, grad_NV: Tensor | None, inputs: Inputs) -> _Layout:
        num_rows, num_columns = logits_NV.shape
        launch = launch_for(num_columns, logits_NV.element_size(), softcap=bool(inputs.options.softcap))
        edges = edges_of(logits_NV, grad_NV)
        constants = (edges, launch.chunks, rest_of(launch, num_columns, inputs.shard.valid_columns, edges))
        gradient_stride = None if grad_NV is None else grad_NV.stride(0)
        return cls(num_rows, logits_NV.stride(0), gradient_stride, constants, launch.ahead, launch.num_warps)

    @property
    def constants_ahead(self) -> tuple[int, ...]:
        """The constants, and AHEAD."""
        return *self.constants, self.ahead

    def launch(self, kernel: Any, *arguments: Any) -> None:
        """Launches one program a row."""
        _launch(kernel, self.num_rows, self.num_warps, *arguments)


def _launch(kernel: Any, num_programs: int, num_warps: int, *arguments: Any) -> None:
    kernel[(num_programs,)](*arguments, num_warps=num_warps, **COMPILE_OPTIONS)


def _tokens(inputs: Inputs, *, weights: bool = True) -> tuple[Any, ...]:
    """Kernel arguments of what a token is, from labels to num_domains."""
    tensors = (inputs.labels_N, inputs.domain_N, inputs.mask_N, *((inputs.loss_weights_K,) if weights else ()))
    return *tensors, inputs.options.ignore_index, inputs.vocab_size, inputs.num_domains


def _settings(inputs: Inputs) -> tuple[float | None, float | None, float | None]:
    """z_loss, softcap and smoothing; None is off."""
    options = inputs.options
    return options.z_loss or None, options.softcap or None, options.label_smoothing or None


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; under its interpreter the tensors are on the host."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


_NOTHING = contextlib.nullcontext()
