"""Behaviour that all engines share: the same tests for DeepSpeed and Megatron-core, in layouts of up to four ranks.

Runs with equal numbers of ranks share one job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import run_job
from records import largest_difference, record, samples
from tolerance import rounding

from megamix.training.checkpoints.store import LAYERS, damage, kind

STEPS, SEQ, BATCH, VOCABULARY = 24, 32, 8, 512
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "deepspeed": {"name": "deepspeed"},
        "megatron": {"name": "megatron"},
    },
    2: {
        "deepspeed pp2": {"name": "deepspeed", "pipeline": 2},
        "deepspeed dp2": {"name": "deepspeed", "data": 2},
        "deepspeed pp2 without ZeRO": {"name": "deepspeed", "pipeline": 2, "zero": 0},
        "deepspeed ZeRO 2": {"name": "deepspeed", "data": 2, "zero": 2},
        "deepspeed ZeRO 3": {"name": "deepspeed", "data": 2, "zero": 3, "activation_checkpointing": True},
        "megatron pp2": {"name": "megatron", "pipeline": 2},
        "megatron pp2 in four chunks": {"name": "megatron", "pipeline": 2, "virtual_pipeline": 2},
        "megatron tp2": {"name": "megatron", "tensor": 2},
        "megatron dp2": {"name": "megatron", "data": 2},
    },
    4: {
        "deepspeed pp2 dp2": {"name": "deepspeed", "pipeline": 2, "data": 2},
        "megatron pp2 tp2": {"name": "megatron", "pipeline": 2, "tensor": 2},
    },
}
ENGINES = {name: engine for layouts in LAYOUTS.values() for name, engine in layouts.items()}
MIXERS = {
    "odm": {"name": "odm", "preset": "official", "warmup_steps": 3},
    "doremi": {"name": "doremi", "reference": None, "eta": 0.3},
}
REFERENCE = "deepspeed"
# Twice as many samples in steps 5 and 6; runs that move to another layout do so where that ends.
RAMP = [
    {"global_batch": BATCH, "until_tokens": 4 * BATCH * SEQ},
    {"global_batch": 2 * BATCH, "until_tokens": 8 * BATCH * SEQ},
]
# Stopped under the first layout and resumed under the second.
MOVES = [
    ("deepspeed pp2", "deepspeed pp2"),
    ("megatron pp2", "megatron pp2"),
    ("megatron tp2", "megatron tp2"),
    ("megatron pp2", "megatron tp2"),
    ("megatron tp2", "megatron dp2"),
    ("deepspeed pp2 without ZeRO", "deepspeed pp2 without ZeRO"),
    ("deepspeed pp2 without ZeRO", "deepspeed dp2"),
    ("deepspeed dp2", "deepspeed pp2 without ZeRO"),
    ("deepspeed dp2", "megatron pp2 in four chunks"),
    ("megatron pp2", "deepspeed dp2"),
    ("deepspeed ZeRO 2", "deepspeed ZeRO 2"),
    ("deepspeed ZeRO 3", "deepspeed ZeRO 3"),
]
OTHER_SIZES = [
    ("deepspeed dp2", "deepspeed"),
    ("deepspeed ZeRO 3", "deepspeed"),
    ("megatron dp2", "megatron"),
    ("megatron dp2", "megatron pp2 tp2"),
    ("deepspeed dp2", "deepspeed pp2 dp2"),
]


@dataclass(frozen=True)
class Runs:
    """Folder and configs of this module's runs."""

    folder: Path
    data: Path

    def path(self, *names: str) -> Path:
        return self.folder / "-".join(names).replace(" ", "_")

    def config(self, run: Path, engine: dict[str, Any], mixer: str, steps: int = STEPS, micro_batch: int = 2) -> Path:
        """Writes the config of a run. Llama with grouped heads for DoReMi, GPT-NeoX for ODM; clipping is at work."""
        sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "ffn_size": 64}
        llama = {"architecture": "llama", "num_key_value_heads": 2, **sizes}
        config = {
            "run_dir": str(run),
            "data": {"manifest": str(self.data), "seq_length": SEQ},
            "model": llama if mixer == "doremi" else {"architecture": "neox", **sizes},
            "mixture": "uniform" if mixer == "doremi" else "natural",
            "mixer": MIXERS[mixer],
            "engine": engine,
            "train": {
                "steps": steps, "global_batch": BATCH, "micro_batch": micro_batch,
                "lr": 3.0e-3, "warmup": 0.1, "clip": 0.5, "seed": 7,
                "batch_ramp": RAMP if mixer == "odm" else [],
            },
            "evaluate": {"every": 12, "batches": BATCH // micro_batch},  # the same windows
            "checkpoint": {"every": 0, "keep": 4},
            "log": {"every": 1, "samples": True},
        }  # fmt: skip
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path


def tolerance(steps: int) -> float:
    """Of the mean loss, in nats, of a domain that has one sample of a step or more, and of weights, which follow it."""
    return math.log(VOCABULARY) * rounding(terms=BATCH * SEQ, layers=6, steps=steps, mean_of=SEQ)


# Other splits of the same layers, where loss weights take no other path; and four ranks share two cores.
ODM_ONLY = {"deepspeed pp2 without ZeRO", "deepspeed ZeRO 2", "megatron pp2", *LAYOUTS[4]}
CASES = [(name, mixer) for name in ENGINES for mixer in MIXERS if mixer == "odm" or name not in ODM_ONLY]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Runs:
    """Every layout, trained for 24 steps with every mixer."""
    made = Runs(tmp_path_factory.mktemp("engines"), data_dir)
    for ranks, layouts in LAYOUTS.items():
        job = []
        for name, mixer in CASES:
            if name in layouts:
                # Two micro-batches on every rank, and four in some: a pipeline then uses its buffers again.
                micro_batch = 2 if name in ODM_ONLY else 4 // ENGINES[name].get("data", 1)
                job.append((made.config(made.path(name, mixer), ENGINES[name], mixer, micro_batch=micro_batch), ()))
        run_job(ranks, job)
    return made


@pytest.mark.parametrize(("name", "mixer"), [case for case in CASES if case[0] != REFERENCE])
def test_every_layout_trains_the_same_run(runs: Runs, name: str, mixer: str) -> None:
    """The same samples in the same order; the same losses, and weights of samples and losses, up to rounding."""
    run, reference = runs.path(name, mixer), runs.path(REFERENCE, mixer)
    assert sorted(samples(run)) == list(range(1, STEPS + 1))
    larger = [step for step, taken in samples(run).items() if len(taken) == 2 * BATCH]
    assert larger == ([5, 6] if mixer == "odm" else [])
    assert samples(run) == samples(reference)
    loss, weight = largest_difference(reference, run)
    assert loss < tolerance(STEPS)
    assert weight < tolerance(STEPS)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_reference_run_learns_and_mixes(runs: Runs, mixer: str) -> None:
    """Else the test above would compare runs in which nothing happens."""
    metrics, weights = record(runs.path(REFERENCE, mixer))
    assert metrics[-1]["macro_loss"] < 0.95 * metrics[0]["macro_loss"]
    assert any(line["grad_norm"] > 0.5 for line in metrics if line["event"] == "train"), "clipping was at work"
    moving = "domain_weights" if mixer == "odm" else "loss_weights"
    first, last = weights[0][moving], weights[-1][moving]
    assert max(abs(a - b) for a, b in zip(first, last, strict=True)) > 0.02


@pytest.fixture(scope="module")
def moved(runs: Runs) -> dict[tuple[str, str], Path]:
    """Runs stopped after 6 of 12 steps in one layout and resumed in another, and whole runs under (name, "")."""
    done: dict[tuple[str, str], Path] = {}
    whole = {name: runs.path("whole", name) for name in {first for first, _ in [*MOVES, *OTHER_SIZES]}}
    jobs: dict[int, list[tuple[Path, tuple[str, ...]]]] = {1: [], 2: [], 4: []}
    for name, run in whole.items():
        jobs[2].append((runs.config(run, ENGINES[name], "odm", 12), ()))
    for first, second in [*MOVES, *OTHER_SIZES]:
        run = done[first, second] = runs.path("moved", first, "to", second)
        jobs[2].append((runs.config(run, ENGINES[first], "odm", 12), ("train.stop_after=6",)))
    converted = done["converted", "converted"] = runs.path("converted")
    dist = runs.config(converted, {**ENGINES["megatron pp2"], "checkpoint_format": "dist"}, "odm", 12)
    jobs[2].append((dist, ()))
    run_job(2, jobs[2])
    jobs[2] = [(dist, ("engine.checkpoint_format=layers",))]
    for (first, second), run in done.items():
        if first == "converted":
            continue
        jobs[_ranks(second)].append((runs.config(run, ENGINES[second], "odm", 12), ()))
    for ranks, wanted in jobs.items():
        run_job(ranks, wanted)
    return {**done, **{(name, ""): run for name, run in whole.items()}}


def test_a_run_that_is_done_gives_its_checkpoint_in_the_other_format(moved: dict[tuple[str, str], Path]) -> None:
    """Through megatron.core's format and back: the same bytes as without."""
    converted, whole = moved["converted", "converted"], moved["megatron pp2", ""]
    path = converted / "checkpoints" / "step_12"
    assert kind(path) == LAYERS
    assert damage(path) is None
    names = sorted(file.name for file in (path / "layers").iterdir())
    assert len(names) == 6, "an embedding, four decoder layers, a head"
    for name in names:
        assert (path / "layers" / name).read_bytes() == (whole / "checkpoints/step_12/layers" / name).read_bytes()


def _ranks(name: str) -> int:
    return next(ranks for ranks, layouts in LAYOUTS.items() if name in layouts)


@pytest.mark.parametrize("name", [first for first, second in MOVES if first == second])
def test_stopped_and_resumed_is_the_uninterrupted_run(moved: dict[tuple[str, str], Path], name: str) -> None:
    """To the last digit."""
    assert record(moved[name, name]) == record(moved[name, ""])
    assert samples(moved[name, name]) == samples(moved[name, ""])


@pytest.mark.parametrize(("first", "second"), [move for move in [*MOVES, *OTHER_SIZES] if move[0] != move[1]])
def test_another_layout_or_engine_goes_on_with_the_same_samples(
    moved: dict[tuple[str, str], Path], first: str, second: str
) -> None:
    """Resumed with another number of data-parallel, tensor-parallel or pipeline ranks, or by the other engine."""
    run, whole = moved[first, second], moved[first, ""]
    assert samples(run) == samples(whole)
    loss, weight = largest_difference(whole, run)
    assert loss < tolerance(12)
    assert weight < tolerance(12)
