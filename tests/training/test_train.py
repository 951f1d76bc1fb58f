"""The main job with real DeepSpeed: stopping and resuming. Every run is a process of its own. What both
engines do alike is in test_engines.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from commands import ENVIRONMENT, ROOT, RUN_SECONDS
from records import lines, record, samples

from megamix.analysis.inspect import inspect_sample

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


def layout(pipeline: int, data: int) -> dict[str, int]:
    return {"pipeline": pipeline, "data": data}


def test_stop_and_resume_is_the_uninterrupted_run(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """Stopped after half the steps, between two log lines and two evaluations, then resumed: the same record to the
    last digit, with steps dealt further ahead, weight changes under way and a decay begun. The layouts are in
    test_engines.py."""
    weight_lag = 3
    sections = {
        "engine": {"pipeline": 2, "zero": 1},
        "data": {"weight_lag": weight_lag, "sampling": "iid"},
        "mixer": {"name": "odm", "preset": "paper", "warmup_steps": 2},
        "log": {"every": 4, "samples": True},
        "train": {"schedule": "wsd", "decay_steps": 8},
    }
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    megamix("train", tiny_config(run_dir=str(whole), **sections))
    config = tiny_config(run_dir=str(halves), **sections)
    megamix("train", config, "train.stop_after=6")
    assert sorted(path.name for path in (halves / "checkpoints").iterdir()) == ["step_4", "step_6"]
    resumed = megamix("train", config)
    assert "resuming from" in resumed.stderr
    assert record(halves) == record(whole)
    assert samples(halves) == samples(whole)
    again = megamix("train", config)
    assert "is done" in again.stderr
    assert record(halves) == record(whole)
    _, weights = record(whole)
    assert [line["effective_step"] - line["step"] for line in weights[1:]] == [weight_lag] * (len(weights) - 1)
    for step in (1, 7, 12):
        domain, sample = samples(whole)[step][5]
        shown = inspect_sample(whole, (step - 1) * 8 + 5).text()
        assert f"domain      {weights[0]['domain_names'][domain]} " in shown
        assert f"sample      {sample} of " in shown


def test_joins_ranks_that_torchrun_starts(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """The data-parallel size follows from the ranks of the job; the run is the one that megamix starts by itself."""
    own, joined = tmp_path / "own", tmp_path / "joined"
    megamix("train", tiny_config(run_dir=str(own), engine=layout(1, 2)))
    config = tiny_config(run_dir=str(joined))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megamix"]
    subprocess.run([*command, "train", str(config)], env=ENVIRONMENT, check=True, timeout=RUN_SECONDS, cwd=ROOT)
    assert record(joined) == record(own)


def test_bf16_llama_checkpointing_and_tensorboard(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """The other ways to train learn too: bf16 with ZeRO-1, Llama layers, recomputed activations, TensorBoard files.

    What DeepSpeed prints while it makes its optimizer stays out of the output."""
    run = tmp_path / "bf16"
    config = tiny_config(
        run_dir=str(run),
        model={"architecture": "llama"},
        engine={**layout(2, 1), "precision": "bf16", "activation_checkpointing": True},
        log={"every": 4, "tensorboard": True},
    )
    megamix("train", config, "train.stop_after=8")
    done = megamix("train", config)
    assert "MA " not in done.stdout + done.stderr
    metrics, _ = record(run)
    assert metrics[-1]["macro_loss"] < metrics[0]["macro_loss"] - 0.2
    assert list((run / "tensorboard").glob("events*"))


def test_static_uniform_and_given_mixtures(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """A static run samples with the mixture it is given, from the first step to the last."""
    run = tmp_path / "static"
    mixture = {"code": 5, "packages": 2, "tables": 0, "topics": 3}
    megamix("train", tiny_config(run_dir=str(run), mixture=mixture, mixer={"name": "static"}, train={"steps": 5}))
    counts = [0] * 4
    for rows in samples(run).values():
        for domain, _ in rows:
            counts[domain] += 1
    assert counts == [20, 8, 0, 12]
    weights = lines(run / "weights.jsonl")
    assert [line["step"] for line in weights] == [0]
    metrics, _ = record(run)
    assert metrics[1]["domain_loss"]["tables"] is None, "a domain that was not sampled has no loss"


def test_weights_and_biases(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """What reaches wandb, recorded by a stand-in for its package: the real one wants an account or a daemon of its own.
    Without the package the run is refused at once."""
    config = tiny_config(run_dir=str(tmp_path / "refused"), log={"wandb": "mixing"})
    assert "megamix[wandb]" in megamix("train", config, code=2).stderr
    (tmp_path / "wandb.py").write_text(
        "import json, pathlib\n"
        "class Run:\n"
        "    def __init__(self, **settings):\n"
        "        self.file = open(pathlib.Path(settings['dir']) / 'wandb.jsonl', 'a')\n"
        "        self.log({'project': settings['project'], 'id': settings['id']})\n"
        "    def define_metric(self, name, step_metric): self.log({name: step_metric})\n"
        "    def log(self, values): print(json.dumps(values), file=self.file, flush=True)\n"
        "    def finish(self): self.log({'finished': True})\n"
        "def init(**settings): return Run(**settings)\n"
    )
    run = tmp_path / "logged"
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    config = tiny_config(run_dir=str(run), log={"wandb": "mixing"}, train={"steps": 5})
    megamix("train", config, PYTHONPATH=path)
    logged = lines(run / "wandb.jsonl")
    assert logged[0] == {"project": "mixing", "id": "logged"}
    assert logged[-1] == {"finished": True}
    metrics, weights = record(run)
    assert [line["train/loss"] for line in logged if "train/loss" in line] == [
        line["loss"] for line in metrics if line["event"] == "train"
    ]
    assert [line["weight/code"] for line in logged if "weight/code" in line] == [
        line["domain_weights"][0] for line in weights
    ]
