"""Kernels compiled ahead of time for GPUs that need not be there, and their machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

SETTINGS = ("z_loss", "softcap", "smoothing")
WHOLE_NUMBERS = {"labels": "i64", "domains": "i64", "sums": "i64", "mask": "i1"}
COUNTS = {
    *("num_rows", "num_columns", "valid_columns", "first_column", "row_stride", "gradient_stride"),
    *("ignore_index", "vocab_size", "num_domains"),
}
OPTIONAL = {"mask", "weights", "references", "token_losses"}
NUMBERS = {"scale", "divisor"}
# Numbers that are multiples of 16 in practice, and let a row be read 16 bytes at a time.
MULTIPLES = {"num_columns", "row_stride", "gradient_stride", "valid_columns"}


class Variant(NamedTuple):
    """One way to compile a kernel; ``flags`` say which of z_loss, softcap and smoothing are on; with ``pointers``
    all that may be one is given, scale and divisor too. With
    ``ones`` every count is 1, which Triton makes a constant. With ``edges``, rows begin anywhere."""

    kernel: str
    dtype: str
    flags: tuple[bool, bool, bool]
    pointers: bool
    gradient: bool = False
    width: int = 128256
    ones: bool = False
    edges: int = 0


OFF, ON = (False, False, False), (True, True, True)


def launch_of(variant: Variant):
    """The launch for the variant's width."""
    from megamix_kernels import triton_loss

    return triton_loss.launch_for(variant.width, 4 if variant.dtype == "fp32" else 2, softcap=variant.flags[1])


def compile_for(architecture, variant):
    """The cubin of a variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megamix_kernels import triton_kernels, triton_loss

    kernel = getattr(triton_kernels, variant.kernel)
    launch = launch_of(variant)
    values = {
        "EDGES": variant.edges,
        "AHEAD": launch.ahead,
        "CHUNKS": launch.chunks,
        "REST": triton_loss.rest_of(launch, variant.width, variant.width, variant.edges),
        "RANKS": 8,
        "ROWS": triton_loss.FINISH_ROWS,
    }
    absent = set() if variant.pointers else set(OPTIONAL)
    absent |= {name for name, is_on in zip(SETTINGS, variant.flags, strict=True) if not is_on}
    if variant.kernel == "loss_rows":
        absent |= {"state"} if variant.gradient else {"gradients", "gradient_stride", "scale"}
    signature, constants, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in values or name in absent:
            signature[name], constants[index,] = "constexpr", values.get(name)
        elif name in COUNTS and variant.ones:
            signature[name], constants[index,] = "constexpr", 1
        elif name in SETTINGS or (name in NUMBERS and not variant.pointers):
            signature[name] = "fp32"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            is_logit = name in ("logits", "gradients")
            signature[name] = "*" + (variant.dtype if is_logit else WHOLE_NUMBERS.get(name, "fp32"))
        multiple = name in MULTIPLES and signature[name] == "i32" and not variant.edges
        if multiple or signature[name].startswith("*"):
            hints[index,] = [["tt.divisibility", 16]]
    num_warps = triton_loss.FINISH_WARPS if variant.kernel == "finish_rows" else launch.num_warps
    source = ASTSource(kernel, signature, constants, hints)
    options = {"num_warps": num_warps, **triton_loss.COMPILE_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


class MachineCode(NamedTuple):
    """What a kernel uses and its instructions, as cuobjdump prints them."""

    usage: str
    code: str

    @property
    def registers(self) -> int:
        return self._used("REG")

    @property
    def spilled(self) -> int:
        """Bytes of stack and local memory."""
        return self._used("STACK") + self._used("LOCAL")

    def _used(self, name: str) -> int:
        (number,) = re.findall(rf"\b{name}:(\d+)", self.usage)
        return int(number)


def machine_code(architecture: int, variant: Variant) -> MachineCode:
    """The variant's machine code; made once for the launch that is chosen now."""
    return _disassembled(architecture, variant, launch_of(variant))


@functools.cache
def _disassembled(architecture: int, variant: Variant, launch: tuple[int, ...]) -> MachineCode:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compile_for(architecture, variant))
        dumps = (subprocess.run([tool, kind, file], capture_output=True, text=True) for kind in ("-res-usage", "-sass"))
        return MachineCode(*(dump.stdout for dump in dumps))
