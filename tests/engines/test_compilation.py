"""Compiled decoder layers: the same run up to rounding, in files of the same names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import SUPPORT
from jobs import run_job
from records import largest_difference, samples
from safetensors import safe_open
from tolerance import rounding

from megamix.core.errors import InputError
from megamix.engines.compilation import check_compiler
from megamix.engines.config import DeepSpeedConfig

STEPS, SEQ, BATCH, LAYERS, VOCABULARY = 6, 32, 8, 6, 512
TOLERANCE = math.log(VOCABULARY) * rounding(terms=BATCH * SEQ, layers=LAYERS + 2, steps=STEPS, mean_of=SEQ)


def config(folder: Path, manifest: Path, name: str, **engine: Any) -> Path:
    sizes = {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "ffn_size": 64}
    settings = {
        "run_dir": str(folder / name),
        "data": {"manifest": str(manifest), "seq_length": SEQ, "attention": "document"},
        "model": {"architecture": "neox", "dropout": 0.0, **sizes},
        "mixer": {"name": "odm", "preset": "official", "warmup_steps": 3},
        "engine": {"name": "deepspeed", **engine},
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2, "lr": 3.0e-3, "warmup": 0.1, "clip": 0.5},
        "evaluate": {"every": STEPS, "batches": 2},
        "checkpoint": {"every": 0},
        "log": {"every": 1, "samples": True},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def names(run: Path) -> dict[str, list[str]]:
    """Of the tensors in each file of the last checkpoint."""
    found = {}
    for path in sorted((run / "checkpoints" / f"step_{STEPS}" / "layers").iterdir()):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
    return found


def assert_alike(run: Path, plain: Path) -> None:
    assert samples(run) == samples(plain)
    assert max(largest_difference(plain, run)) < TOLERANCE
    assert names(run) == names(plain)


def test_compiled_layers_train_the_same_run(tmp_path: Path, data_dir: Path) -> None:
    """All layers of a run share their graphs: one of training and one of evaluation or two."""
    job = [
        config(tmp_path, data_dir, "plain"),
        config(tmp_path, data_dir, "compiled", compile=True, zero=2, activation_checkpointing=True),
    ]
    run_job(1, [(path, ()) for path in job], SUPPORT / "compiled_job.py")
    plain, compiled = json.loads((tmp_path / "graphs.json").read_text(encoding="utf-8"))
    assert plain == 0
    assert 0 < compiled < LAYERS
    assert_alike(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
def test_code_of_the_real_compiler_trains_the_same_run(tmp_path: Path, data_dir: Path) -> None:
    job = [
        config(tmp_path, data_dir, "plain", pipeline=2),
        config(tmp_path, data_dir, "compiled", pipeline=2, compile=True),
        config(tmp_path, data_dir, "bf16", data=2, zero=2, precision="bf16", compile=True),
    ]
    run_job(2, [(path, ()) for path in job])
    assert_alike(tmp_path / "compiled", tmp_path / "plain")
    loss, _ = largest_difference(tmp_path / "plain", tmp_path / "bf16")
    assert loss < 0.1
    assert names(tmp_path / "bf16") == names(tmp_path / "plain")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes no C++ compiler")
def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = DeepSpeedConfig(compile=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_compiler(DeepSpeedConfig())
    with pytest.raises(InputError, match=r"no C\+\+ compiler here \(g\+\+ or clang\+\+\).* leave compile out"):
        check_compiler(compiled)
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(InputError, match=r"no C\+\+ compiler here \(icpx\)"):
        check_compiler(compiled)
    (tmp_path / "icpx").touch(mode=0o755)
    check_compiler(compiled)
