"""Writing checkpoints from all ranks at once, and setting an engine from one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamix.checkpoint import FORMAT, PARTIAL, VERSION, complete_steps, describe, verify, write_json
from megamix.engines.base import Engine, ParameterState
from megamix.errors import MegamixError
from megamix.files import sync_folder


def save(folder: Path, step: int, engine: Engine, state: Mapping[str, Any], keep: int, group: Any) -> Path:
    """Writes the checkpoint of ``step`` (steps taken) and drops all but the newest ``keep``; every rank calls it.

    Args:
        folder: the run's ``checkpoints`` directory.
        state: JSON-serialisable; rank 0's is written.
        group: a process group of all ranks with a CPU backend.

    Raises:
        MegamixError: a rank could not write; every rank raises, and no checkpoint of this step exists.
    """
    final = folder / f"step_{step}"
    partial = folder / f"step_{step}{PARTIAL}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "layers").mkdir(parents=True)
    dist.barrier(group)
    written: dict[str, dict[str, Any]] = {}
    error: str | None = None
    # Every data-parallel rank takes part in gathering a layer, and the first one writes it.
    for layer in engine.layers():
        tensors = _flat(engine, layer)
        if engine.place.data_rank == 0 and error is None:
            path = partial / "layers" / f"{layer:05d}.safetensors"
            try:
                save_file(tensors, path)
                written[str(path.relative_to(partial))] = describe(path)
            except (OSError, SafetensorError) as problem:
                error = f"cannot write {path}: {problem}"
    if dist.get_rank() == 0 and error is None:
        try:
            written["state.json"] = write_json(partial / "state.json", {**state, "step": step})
        except OSError as problem:
            error = f"cannot write {partial / 'state.json'}: {problem}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (written, error), group=group)
    errors = [problem for _, problem in outcomes if problem]
    if errors:
        raise MegamixError(
            f"the checkpoint of step {step} was not written: {errors[0]}. Free space or choose another run_dir."
        )
    if dist.get_rank() == 0:
        files = {name: entry for files, _ in outcomes for name, entry in files.items()}
        write_json(partial / "checkpoint.json", {"format": FORMAT, "version": VERSION, "step": step, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(folder)
        for old in sorted(complete_steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    dist.barrier(group)
    return final


def load_engine(path: Path, engine: Engine, step: int) -> None:
    """Sets the engine's weights and optimizer state; each rank reads the layers it holds.

    Raises:
        ResumeRefused: a file is damaged.
    """
    engine.optimizer_steps = step
    for layer in engine.layers():
        name = f"layers/{layer:05d}.safetensors"
        verify(path, name)
        engine.load_layer_state(layer, _unflatten(load_file(path / name)))


def _flat(engine: Engine, layer: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, state in engine.layer_state(layer):
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            tensors[f"{part}/{name}"] = getattr(state, part).detach().float().cpu().contiguous()
    return tensors


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[str, ParameterState]:
    names = [key.partition("/")[2] for key in tensors if key.startswith("weight/")]
    return {
        name: ParameterState(*(tensors[f"{part}/{name}"] for part in ("weight", "exp_avg", "exp_avg_sq")))
        for name in names
    }
