"""Layers as wide as those of the 1 B models take real steps on a CPU, under both engines: minutes, and about 3 GB."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from records import lines
from tolerance import rounding

from megamix.core.files import shipped_folder

Run = Callable[..., subprocess.CompletedProcess[str]]
STEPS = 4
# What the shipped run is on this data and this machine: two of its layers, in short samples.
SMALL = [
    "data.token_counts=null", "data.seq_length=64", "mixture=uniform", "model.num_layers=2", "model.vocab_size=4096",
    f"train.steps={STEPS}", "train.global_batch=4", "train.micro_batch=2", "train.lr=1e-4", "train.warmup=0", "mixer.warmup_steps=1",
    "evaluate={every: 0, batches: 1}", "checkpoint.every=0", "log.every=1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["neox-1b", "llama-1b"])
def test_wide_layers_take_real_steps(megamix: Run, data_dir: Path, tmp_path: Path, preset: str) -> None:
    """Two pipeline stages of the 1 B run's width: the validation loss falls, and all losses are those of the other
    engine."""
    engines = ["deepspeed", *(["megatron"] if importlib.util.find_spec("megatron") else [])]
    losses = {}
    for engine in engines:
        run = tmp_path / engine
        layout = f"engine={{name: {engine}, pipeline: 2, data: 1, precision: fp32}}"
        changes = [f"run_dir={run}", f"data.manifest={data_dir}", f"model.preset={preset}", layout]
        megamix("train", shipped_folder("configs") / "pile_1b_odm.yaml", *changes, *SMALL)
        metrics = lines(run / "metrics.jsonl")
        shutil.rmtree(run)  # it has a checkpoint of more than a gigabyte
        losses[engine] = [line["loss"] for line in metrics if line["event"] == "train"]
        before, after = (line["macro_loss"] for line in metrics if line["event"] == "evaluate")
        assert after < before - 0.2
        losses[engine] += [before, after]
        assert len(losses[engine]) == STEPS + 2
    for one, other in zip(losses["deepspeed"], losses[engines[-1]], strict=True):
        # The widest sum has 8192 terms; two layers between embedding and head; 256 tokens a step.
        assert one == pytest.approx(other, rel=rounding(terms=8192, layers=4, steps=STEPS, mean_of=256))
