"""Runs the tests of the Triton path in tests/kernels/on_device: under Triton's interpreter, and on a GPU.

Each is a process of its own: whether kernels are interpreted is settled when Triton is first imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter
from commands import ROOT, SUPPORT

HERE = Path(__file__).resolve().parent


def run_in_a_process(**environment: str) -> str:
    """The output of the tests in on_device, which must all pass."""
    paths = [str(SUPPORT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    files = sorted(str(file) for file in (HERE / "on_device").glob("*.py"))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(triton_interpreter.why_not() is not None, reason=str(triton_interpreter.why_not()))
def test_under_the_interpreter():
    output = run_in_a_process(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    # Tests that were not collected would not fail either.
    assert int(output.split(" passed")[0].split()[-1]) > 90


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    assert " passed" in run_in_a_process(TRITON_INTERPRET="0")
