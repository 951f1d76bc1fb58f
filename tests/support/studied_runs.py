"""A run without and with mixers that only log, and the latter stopped half-way; trained once for all tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import yaml
from jobs import run_job

STEPS, BATCH, SEQ, LAG, HALF = 12, 8, 32, 2, 6
OWN = {"name": "odm", "preset": "official", "warmup_steps": 4}
SHADOWS = [{"name": "odm", "preset": "paper"}, {"name": "doremi", "apply": "sampling", "eta": 0.5}, OWN]
NAMES = ["odm-paper", "doremi", "odm-official"]


@functools.cache
def studied_runs(data_dir: Path) -> Path:
    """A folder with the runs ``plain``, ``shadowed``, ``halves`` (stopped, then resumed) and ``other`` (stopped, then
    resumed with other shadows)."""
    folder = data_dir.parent / "studied"
    folder.mkdir()
    plain, shadowed, halves = (
        _config(folder, data_dir, name, name != "plain") for name in ("plain", "shadowed", "halves")
    )
    run_job(1, [(plain, []), (shadowed, []), (halves, [f"train.stop_after={HALF}"])])
    shutil.copytree(folder / "halves", folder / "other")
    other = _config(folder, data_dir, "other", True, [SHADOWS[0], {"name": "doremi", "eta": 2.0}])
    run_job(1, [(halves, []), (other, [])])
    return folder


def _config(folder: Path, data_dir: Path, name: str, shadowed: bool, shadows: list[Any] = SHADOWS) -> Path:
    # A floor that binds, and a second stage before the mixer's first update.
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 4 * BATCH * SEQ, "weights": "uniform"}]
    config = {
        "run_dir": str(folder / name),
        "data": {"manifest": str(data_dir), "seq_length": SEQ, "weight_lag": LAG, "min_weight": 0.2},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 32},
        "mixture": {"stages": stages},
        "mixer": OWN,
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": 4, "lr": 5.0e-3, "warmup": 0.1},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
        "log": {"every": 5, "samples": True},
        **({"shadow": shadows} if shadowed else {}),
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
