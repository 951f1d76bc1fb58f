"""A model's step for the acceptance: time, memory and synchronisations with mixing on against off.

The steps are those of tests/benchmarks/bench_step.py, on text that every clone has: this repository's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Peak dense bf16 FLOP/s by a part of the GPU's name (the vendor's data sheets).
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
MODELS = {
    "cuda": {"model": "{preset: neox-1b, vocab_size: 50304}", "seq_length": 1024, "micro_batch": 8, "steps": 60},
    "cpu": {
        "model": "{architecture: neox, hidden_size: 32, num_layers: 1, num_heads: 2, ffn_size: 64}",
        "seq_length": 16,
        "micro_batch": 2,
        "steps": 4,
    },
}
Figure = Callable[..., dict[str, Any]]


def measure(request: dict[str, Any], figure: Figure) -> list[dict[str, Any]]:
    """Returns ratio of steps, tokens per second, peak memory and share of the peak FLOP/s."""
    sizes = MODELS[request["device"]]
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "bench_step.py"), *_arguments(request)]
    command += ["--steps", str(sizes["steps"]), "--block", "5" if request["device"] == "cuda" else "2"]
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    ratio = re.search(r"ratio ([\d.]+) \(quartiles ([\d.]+) to ([\d.]+)", done.stdout)
    noise = re.search(r"noise ([\d.]+) \(quartiles ([\d.]+) to ([\d.]+)", done.stdout)
    speed = re.search(r"^\W*with\W+([\d.]+)\W+([\d,]+)", done.stdout, re.MULTILINE)
    if not (ratio and noise and speed):
        return [{"metric": "failed", "note": (done.stdout + done.stderr).strip()[-160:]}]
    tokens = float(speed[2].replace(",", ""))
    rows = [
        figure("with mixing / without (wanted: at most 1.001)", float(ratio[1]), "")
        | {"low": float(ratio[2]), "high": float(ratio[3])},
        figure("without / without (the noise)", float(noise[1]), "")
        | {"low": float(noise[2]), "high": float(noise[3])},
        figure("step", float(speed[1]), "ms"),
        figure("tokens a second", tokens, ""),
    ]
    if memory := re.search(r"peak memory of rank 0: (.+)", done.stdout):
        rows.append(figure("peak memory", float(memory[1].split()[0]), memory[1].split()[-1]))
    return rows + _utilisation(request, tokens / request["data"], figure)


def trace(request: dict[str, Any], figure: Figure) -> list[dict[str, Any]]:
    """Returns the waits of three steps with mixing and without; the trace lies in OUT/trace.json."""
    from torch.profiler import ProfilerActivity, profile

    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import bench_step  # pyright: ignore[reportMissingImports]

    from megamix.core.config import load_config
    from megamix.core.processes import free_port
    from megamix.training.config import RunConfig

    port = str(free_port())
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port)
    path, *overrides = _arguments(request)
    config = load_config(RunConfig, Path(path), [*overrides, "train.steps=1000"])
    with bench_step.started(config, 1) as (plan, engine):
        waits = []
        for mixing in (False, True):
            steps = bench_step.Steps(plan, engine, mixing=mixing, reference=False)
            steps.run(5)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                for _ in range(3):
                    steps.step()
            names = Counter(event.name for event in profiler.events() or ())
            waits.append(sum(count for name, count in names.items() if re.search("Synchronize|DtoH", name)))
            if mixing:
                profiler.export_chrome_trace(str(Path(request["out"]) / "trace.json"))
            steps.run(1)
            steps.close()
    return [
        figure("waits and reads of 3 steps without mixing", float(waits[0]), ""),
        figure("with mixing", float(waits[1]), "", "wanted: as many, but for one copy a step on the mixer's thread"),
    ]


def _arguments(request: dict[str, Any]) -> list[str]:
    sizes, out = MODELS[request["device"]], Path(request["out"])
    data = out / "text"
    if not (data / "manifest.json").exists():
        prepare = [
            sys.executable,
            "-m",
            "megamix",
            "prepare",
            *_text(out),
            "--out",
            str(data),
            "--tokenizer",
            "train:512",
        ]
        subprocess.run(prepare, check=True, cwd=ROOT, capture_output=True)
    precision = "bf16" if request["device"] == "cuda" else "fp32"
    return [
        str(ROOT / "configs" / "demo.yaml"),
        f"run_dir={out / 'run'}",
        f"data={{manifest: {data}, seq_length: {sizes['seq_length']}}}",
        f"model={sizes['model']}",
        f"engine={{name: deepspeed, pipeline: 1, data: {request['data']}, zero: 0, precision: {precision}}}",
        f"train.micro_batch={sizes['micro_batch']}",
        f"train.global_batch={2 * sizes['micro_batch'] * request['data']}",
        "mixer.warmup_steps=0",
        f"loss.implementation={request['implementation']}",
    ]


def _text(out: Path) -> list[str]:
    """Two domains of this repository's own text, a document a file, as prepare takes them."""
    files = {"code": ROOT.glob("megamix/**/*.py"), "words": [ROOT / "DECISIONS.md", *ROOT.glob("megamix/**/*.md")]}
    inputs = []
    for name, paths in files.items():
        file = out / f"{name}.jsonl"
        documents = (json.dumps({"text": path.read_text(encoding="utf-8")}) + "\n" for path in sorted(paths))
        file.write_text("".join(documents), encoding="utf-8")
        inputs.append(f"{name}={file}")
    return inputs


def _utilisation(request: dict[str, Any], tokens: float, figure: Figure) -> list[dict[str, Any]]:
    """Model FLOP utilisation (PaLM, arXiv 2204.02311, appendix B): 6 FLOP a parameter and token, and attention."""
    if request["device"] != "cuda":
        return []
    import torch

    peaks = [peak for name, peak in PEAK.items() if name in torch.cuda.get_device_name()]
    if not peaks:
        return []
    hidden, layers, length = 2048, 16, MODELS["cuda"]["seq_length"]
    flops = 6 * (12 * layers * hidden**2 + hidden * 50304) + 12 * layers * hidden * length
    return [figure("model FLOP utilisation", 100 * tokens * flops / peaks[0], "%")]
