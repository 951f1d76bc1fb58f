"""Compiles the kernels for GPUs that need not be there, and reads from the machine code that nothing was spilled and
that rows are read and written 16 bytes at a time.

By default for sm_90, and the extremes: no option and all of them, for the widest launch, where a thread has the fewest
registers. With ``-m slow`` every combination, for older and newer GPUs as well.
"""

import importlib.util
import itertools
import os
import re

import pytest
from compiled_kernels import OFF, ON, Variant, compile_for, machine_code

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


def all_variants():
    """Every combination of flags, with all pointers, at the widest and a narrow launch; and at odd widths."""
    for flags in itertools.product((False, True), repeat=3):
        for dtype, width in itertools.product(("bf16", "fp16", "fp32"), (16032, 128256, 50257, 151937)):
            edges = width % 2
            if edges and dtype == "fp16":  # like bf16
                continue
            for gradient in (False, True):
                yield Variant("loss_rows", dtype, flags, True, gradient, width, edges=edges)
            for kernel in ("gradient_rows", "partial_rows"):
                yield Variant(kernel, dtype, flags, True, False, width, edges=edges)
        yield Variant("finish_rows", "fp32", flags, True)


def check(architecture, variant):
    """Asserts that the variant keeps all in registers and moves logits 16 bytes at a time."""
    made = machine_code(architecture, variant)
    assert made.registers > 0, made.usage
    assert made.spilled == 0, f"{variant} on sm_{architecture}: {made.usage}"
    assert not re.findall(r"\b(?:LDL|STL)\b", made.code)
    if variant.kernel != "finish_rows":
        assert re.search(r"LDG\.E\S*\.128", made.code)
    if variant.gradient or variant.kernel == "gradient_rows":
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
    for variant in all_variants():
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
