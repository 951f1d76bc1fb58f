"""Compiles the kernels for GPUs that need not be there, and reads from the machine code that nothing was spilled and
that rows are read and written 16 bytes at a time.

By default the extremes: no option and all of them, for the widest launch, where a thread has the fewest registers. With
``-m slow`` every combination.
"""

import importlib.util
import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]

ARCHITECTURES = [80, 90, 100]
NUMBERS = {"scale", "divisor", "z_loss", "softcap", "smoothing"}
WHOLE_NUMBERS = {"labels": "i64", "domains": "i64", "sums": "i64", "mask": "i1"}
COUNTS = {
    *("num_rows", "num_columns", "valid_columns", "first_column", "row_stride", "gradient_stride"),
    *("ignore_index", "vocab_size", "num_domains"),
}
OPTIONAL = {"mask", "weights", "references", "token_losses", "scale_pointer", "divisor_pointer"}
# Numbers that are multiples of 16 in practice, and let a row be read 16 bytes at a time.
MULTIPLES = {"num_columns", "row_stride", "gradient_stride", "valid_columns"}


class Variant(NamedTuple):
    """One way to compile a kernel; ``flags`` are Z_LOSS, SOFTCAP and SMOOTHING, ``pointers`` the optional ones. With
    ``ones`` every count is 1, which Triton makes a constant."""

    kernel: str
    dtype: str
    flags: tuple[bool, bool, bool]
    pointers: bool
    gradient: bool = False
    width: int = 128256
    ones: bool = False


OFF, ON = (False, False, False), (True, True, True)
EXTREMES = [
    *(Variant("loss_rows", "bf16", flags, flags == ON, gradient) for flags in (OFF, ON) for gradient in (False, True)),
    Variant("loss_rows", "fp32", ON, True, True),
    *(Variant("gradient_rows", "bf16", flags, flags == ON) for flags in (OFF, ON)),
    *(Variant(name, "bf16", ON, True) for name in ("partial_rows", "finish_rows")),
]


def all_variants():
    """Every combination of flags, with all pointers, at the widest and a narrow launch."""
    for flags in itertools.product((False, True), repeat=3):
        for dtype, width in itertools.product(("bf16", "fp16", "fp32"), (16032, 128256)):
            for gradient in (False, True):
                yield Variant("loss_rows", dtype, flags, True, gradient, width)
            for kernel in ("gradient_rows", "partial_rows"):
                yield Variant(kernel, dtype, flags, True, False, width)
        yield Variant("finish_rows", "fp32", flags, True)


def compile_for(architecture, variant):
    """The cubin of a variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megamix_kernels import triton_kernels, triton_loss

    kernel = getattr(triton_kernels, variant.kernel)
    z_loss, softcap, smoothing = variant.flags
    launch = triton_loss.launch_for(variant.width, 4 if variant.dtype == "fp32" else 2, softcap=softcap)
    values = {
        "Z_LOSS": z_loss,
        "SOFTCAP": softcap,
        "SMOOTHING": smoothing,
        "GRADIENT": variant.gradient,
        "CHUNKS": launch.chunks,
        "CHUNK": launch.chunk,
        "RANKS": 8,
        "ROWS": triton_loss.FINISH_ROWS,
    }
    absent = set() if variant.pointers else set(OPTIONAL)
    if variant.kernel == "loss_rows":
        absent |= {"maxima", "norms"} if variant.gradient else {"gradients"}
    signature, constants, hints = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in values or name in absent:
            signature[name], constants[index,] = "constexpr", values.get(name)
        elif name in COUNTS and variant.ones:
            signature[name], constants[index,] = "constexpr", 1
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            signature[name] = "*" + (
                variant.dtype if name in ("logits", "gradients") else WHOLE_NUMBERS.get(name, "fp32")
            )
        if (name in MULTIPLES and not variant.ones) or signature[name].startswith("*"):
            hints[index,] = [["tt.divisibility", 16]]
    num_warps = 4 if variant.kernel == "finish_rows" else launch.num_warps
    source = ASTSource(kernel, signature, constants, hints)
    options = {"num_warps": num_warps, **triton_loss.COMPILE_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


def disassembler():
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found.exists():
        pytest.skip("this triton has no cuobjdump")
    return found


def check(architecture, variant, folder):
    """Asserts that the variant keeps all in registers and moves logits 16 bytes at a time."""
    tool, file = disassembler(), folder / "kernel.cubin"
    file.write_bytes(compile_for(architecture, variant))
    dumps = (subprocess.run([tool, kind, file], capture_output=True, text=True) for kind in ("-res-usage", "-sass"))
    usage, code = (dump.stdout for dump in dumps)
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert int(registers) > 0, usage
    assert (int(stack), int(local)) == (0, 0), f"{variant} on sm_{architecture}: {usage}"
    assert not re.findall(r"\b(?:LDL|STL)\b", code)
    if variant.kernel != "finish_rows":
        assert re.search(r"LDG\.E\S*\.128", code)
    if variant.gradient or variant.kernel == "gradient_rows":
        assert re.search(r"STG\.E\S*\.128", code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", EXTREMES, ids=lambda variant: "-".join(map(str, variant)).replace(" ", ""))
def test_nothing_is_spilled(variant, architecture, tmp_path):
    check(architecture, variant, tmp_path)


@pytest.mark.parametrize("name", ["loss_rows", "gradient_rows", "partial_rows", "finish_rows"])
def test_counts_of_one_compile(name):
    assert compile_for(90, Variant(name, "fp32", ON, True, name == "loss_rows", width=1, ones=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled_in_any_combination(architecture, tmp_path):
    for variant in all_variants():
        check(architecture, variant, tmp_path)


def test_the_check_sees_a_spill(tmp_path, monkeypatch):
    from megamix_kernels import triton_loss

    # 64 numbers a thread cannot be kept in 64 registers beside all else.
    launch = triton_loss.Launch(chunks=8192, chunk=8, num_warps=32)
    monkeypatch.setattr(triton_loss, "launch_for", lambda *args, **kwargs: launch)
    with pytest.raises(AssertionError, match="STACK"):
        check(90, Variant("gradient_rows", "bf16", OFF, False), tmp_path)


def test_the_launch_depends_on_width_and_dtype_alone():
    from megamix_kernels.triton_loss import launch_for

    assert [launch_for(width, 2).num_warps for width in (1, 16032, 32000, 50304, 128256, 151936)] == [
        *(1, 4, 8, 16, 32, 32)
    ]
    for width, size in itertools.product((1, 57, 4096, 50257, 2**20), (2, 4)):
        chunks, chunk, num_warps = launch_for(width, size)
        assert chunk * size == 16
        assert num_warps * 32 <= chunks <= num_warps * 64
        assert launch_for(width, size, softcap=True)[1:] == (chunk, num_warps)
