"""``loss.implementation`` in whole runs: the Triton kernel, interpreted, trains what plain torch trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_job
from records import largest_difference
from tolerance import rounding

Write = Callable[..., Path]
Run = Callable[..., Any]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernel itself")
def test_triton_without_a_gpu_is_refused_before_any_step(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    refused = megamix("train", tiny_config(loss={"implementation": "triton"}), code=2).stderr
    assert "loss.implementation: implementation 'triton' cannot be used: logits_NV is on cpu, wanted cuda" in refused
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_kernel_trains_what_torch_trains(tiny_config: Write, tmp_path: Path) -> None:
    """Two stages and two micro-batches, so that the promised gradient is not 1."""
    pytest.importorskip("triton")
    for name in ("triton", "torch"):
        config = tiny_config(
            run_dir=str(tmp_path / name),
            data={"seq_length": 8},
            engine={"pipeline": 2},
            mixer={"name": "odm", "preset": "official", "warmup_steps": 0},
            train={"steps": 2, "global_batch": 2, "micro_batch": 1},
            evaluate={"every": 0, "batches": 1},
            loss={"implementation": name},
        )
        run_job(2, [(config, ())], TRITON_INTERPRET="1" if name == "triton" else "0")
    loss, weight = largest_difference(tmp_path / "triton", tmp_path / "torch")
    limit = math.log(512) * rounding(terms=2 * 8, layers=4, steps=2)
    assert 0 < loss < limit  # not the same arithmetic
    assert weight < limit
