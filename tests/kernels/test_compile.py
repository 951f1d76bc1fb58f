"""Compiles the kernels for GPUs that need not be there, and reads from the machine code that nothing was spilled and
that rows are read and written 16 bytes at a time.

By default for sm_90, and the extremes: no option and all of them, for the widest launch, where a thread has the fewest
registers. With ``-m slow`` their combinations, for older and newer GPUs as well.
"""

import importlib.util
import itertools
import os
import re

import pytest
from compiled_kernels import OFF, ON, Variant, compile_for, machine_code
from machine_code import loops

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted"),
]

ARCHITECTURES = [80, 90, 100]
EXTREMES = [
    *(Variant("loss_rows", "bf16", flags, flags == ON, gradient) for flags in (OFF, ON) for gradient in (False, True)),
    Variant("loss_rows", "fp32", ON, True, True),
    *(Variant("gradient_rows", "bf16", flags, flags == ON) for flags in (OFF, ON)),
    *(Variant(name, "bf16", ON, True) for name in ("partial_rows", "finish_rows")),
    Variant("loss_rows", "bf16", ON, True, True, 50257, edges=1),
]


def all_variants(architecture):
    """Combinations of flags with all pointers, at the widest and a narrow launch, and at odd widths.

    The z-loss acts once a row, so that it is off with all else only. fp16 is like bf16. Other architectures than sm_90
    have the extremes of the flags.
    """
    every = [OFF, *((True, *others) for others in itertools.product((False, True), repeat=2))]
    flags = every if architecture == 90 else [OFF, ON]
    for own, dtype, width in itertools.product(flags, ("bf16", "fp32"), (16032, 128256, 50257, 151937)):
        yield from _rows(dtype, own, width)
    if architecture == 90:
        for own, width in itertools.product((OFF, ON), (16032, 128256)):
            yield from _rows("fp16", own, width)
    for own in flags:
        yield Variant("finish_rows", "fp32", own, True)


def _rows(dtype, flags, width):
    for gradient in (False, True):
        yield Variant("loss_rows", dtype, flags, True, gradient, width, edges=width % 2)
    for kernel in ("gradient_rows", "partial_rows"):
        yield Variant(kernel, dtype, flags, True, False, width, edges=width % 2)


def check(architecture, variant):
    """Asserts that the variant keeps all in registers and moves logits 16 bytes at a time.

    A kernel that only reads may get 32 registers, with which two of the widest rows share a multiprocessor, for a few
    bytes that are put away before a loop and taken back after it.
    """
    made = machine_code(architecture, variant)
    assert made.registers > 0, made.usage
    writes = variant.gradient or variant.kernel == "gradient_rows"
    most = 16 if made.registers <= 32 and not writes and variant.kernel != "finish_rows" else 0
    assert made.spilled <= most, f"{variant} on sm_{architecture}: {made.usage}"
    assert most or not re.findall(r"\b(?:LDL|STL)\b", made.code)
    assert not any(loop.counts["LDL"] or loop.counts["STL"] for loop in loops(made.code))
    if variant.kernel != "finish_rows":
        assert re.search(r"LDG\.E\S*\.128", made.code)
    if writes:
        assert re.search(r"STG\.E\S*\.128", made.code)


@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("variant", EXTREMES, ids=lambda variant: "-".join(map(str, variant)).replace(" ", ""))
def test_nothing_is_spilled(variant, architecture):
    check(architecture, variant)


@pytest.mark.parametrize("name", ["loss_rows", "gradient_rows", "partial_rows", "finish_rows"])
def test_counts_of_one_compile(name):
    assert compile_for(90, Variant(name, "fp32", ON, True, name == "loss_rows", width=1, ones=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled_in_any_combination(architecture):
    for variant in all_variants(architecture):
        check(architecture, variant)


def test_the_check_sees_a_spill(tmp_path, monkeypatch):
    from megamix_kernels import triton_loss

    # 64 numbers a thread cannot be kept in 64 registers beside all else.
    launch = triton_loss.Launch(chunks=8192, chunk=8, num_warps=32)
    monkeypatch.setattr(triton_loss, "launch_for", lambda *args, **kwargs: launch)
    with pytest.raises(AssertionError, match="STACK"):
        check(90, Variant("gradient_rows", "bf16", OFF, False))


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
