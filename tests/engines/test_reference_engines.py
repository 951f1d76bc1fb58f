"""Every engine, layout and form of the loss fills the same cache of reference losses, attention within documents.

As a script it is one rank: ``test_reference_engines.py CONFIG FOLDER``.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks

from megamix.core.config import load_config
from megamix.data.reference_losses import ReferenceLosses
from megamix.engines.choose import start_distributed
from megamix.interop.evaluation.model import open_model
from megamix.training.config import RunConfig
from megamix.training.plan import make_plan
from megamix.training.reference.cache import cache_key, samples_read
from megamix.training.reference.run import fill_cache, plan_job
from megamix.training.run import train_rank

SEQ, STEPS = 32, 12
ENGINES = {
    "deepspeed": {"name": "deepspeed", "pipeline": 2},
    "deepspeed-data": {"name": "deepspeed", "pipeline": 1, "data": 2},
    "megatron-tensor": {"name": "megatron", "tensor": 2},
    "megatron-pipeline": {"name": "megatron", "pipeline": 2},
    "megatron-chunks": {"name": "megatron", "pipeline": 2, "virtual_pipeline": 2},
    "deepspeed-linear": {"name": "deepspeed", "pipeline": 2},
    "megatron-linear": {"name": "megatron", "tensor": 2},
}


@pytest.fixture(scope="module")
def caches(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by DeepSpeed, and its losses of what it read, by every engine, all in one job of two ranks."""
    folder = tmp_path_factory.mktemp("engines")
    config = {
        "run_dir": str(folder / "run"),
        "data": {"manifest": str(data_dir), "seq_length": SEQ, "attention": "document"},
        "model": {"architecture": "neox", "hidden_size": 32, "num_layers": 4, "num_heads": 2, "ffn_size": 64},
        "mixture": "uniform",
        "engine": ENGINES["deepspeed"],
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "lr": 5.0e-3, "warmup": 0.1},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run_ranks(Path(__file__), 2, path, folder, cwd=folder)
    return folder


def rows(folder: Path, config: Path) -> np.ndarray:
    """float32 [n, S]: the losses of all samples that the run reads."""
    plan = make_plan(load_config(RunConfig, config), verify=False)
    cache, selection = ReferenceLosses(folder, cache_key(plan)), samples_read(plan)
    found = np.empty((selection.total, SEQ), np.float32)
    for row, domain, sample in zip(found, *selection.at(np.arange(selection.total)), strict=True):
        cache.read_window(int(domain), int(sample), row)
    return found


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "deepspeed"])
def test_every_engine_computes_the_same_losses(caches: Path, name: str) -> None:
    """To the rounding of float16; `test_doremi_run` compares DeepSpeed's with those of transformers' model."""
    expected, found = (rows(caches / which, caches / "config.yaml") for which in ("deepspeed", name))
    assert expected.shape[0] > STEPS * 16
    assert np.ptp(expected) > 1, "a model that has learnt something"
    # Row losses of different layouts differ by float32's rounding, so some fall to the neighbouring float16.
    assert (np.abs(found - expected) <= np.spacing(expected.astype(np.float16)).astype(np.float32)).all()
    assert (found == expected).mean() > 0.99


def test_losses_are_those_of_documents_by_themselves(caches: Path) -> None:
    """In the samples that hold the end of a document."""
    plan = make_plan(load_config(RunConfig, caches / "config.yaml"), verify=False)
    model, selection = open_model(caches / "run", torch.device("cpu")), samples_read(plan)
    domain, sample = selection.at(np.arange(selection.total))
    batch = plan.reader(plan.domains).batch(domain, sample, np.arange(selection.total), (1, selection.total))
    assert batch.positions is not None
    found = torch.from_numpy(rows(caches / "deepspeed", caches / "config.yaml"))
    starts = [row.nonzero()[:, 0].tolist() for row in batch.positions[0] == 0]
    divided = [row for row, start in enumerate(starts) if len(start) > 1]
    assert divided
    for row in divided[:8]:
        pieces = itertools.pairwise([*starts[row], SEQ])
        with torch.no_grad():
            parts = [
                model.logits(batch.tokens[0, row, None, a:b], batch.positions[0, row, None, a:b]) for a, b in pieces
            ]
        logits = torch.cat(parts, 1)[0, :, : plan.vocab_size]
        losses = torch.nn.functional.cross_entropy(logits, batch.labels[0, row], reduction="none")
        torch.testing.assert_close(found[row], losses, rtol=2**-10, atol=1e-4)


def _rank(config: Path, folder: Path) -> None:
    import torch.distributed as dist

    loaded = load_config(RunConfig, config)
    start_distributed(loaded.engine)
    train_rank(make_plan(loaded, 2, verify=False))
    for name, engine in ENGINES.items():
        form = "linear" if name.endswith("linear") else "torch"
        overrides = [f"engine={json.dumps(engine)}", f"loss.implementation={form}"]
        fill_cache(plan_job(folder / "run", overrides, config, 2), folder / name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), Path(sys.argv[2]))
