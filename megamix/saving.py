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
from torch.distributed.checkpoint.api import CheckpointException

from megamix.checkpoint import (
    FORMAT,
    LAYERS,
    PARTIAL,
    VERSION,
    complete_steps,
    describe,
    files_in,
    kind,
    verify,
    write_json,
)
from megamix.engines.base import Engine, ParameterState
from megamix.engines.own_format import OwnFormat
from megamix.errors import MegamixError, ResumeRefused
from megamix.files import sync_folder
from megamix.models.pretrained import PretrainedWeights


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
    own = engine if isinstance(engine, OwnFormat) and engine.saves_own_format else None
    holds = format_of(engine)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / holds).mkdir(parents=True)
    dist.barrier(group)
    written, error = _save_layers(partial, engine) if own is None else _save_own(partial, own, group)
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
        listing = {"format": FORMAT, "version": VERSION, "step": step, "holds": holds, "files": files}
        write_json(partial / "checkpoint.json", listing)
        _replace_folder(partial, final)
        sync_folder(folder)
        for old in sorted(complete_steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    dist.barrier(group)
    return final


# What each rank reports: the files it wrote or hashed, and what went wrong.
Outcome = tuple[dict[str, dict[str, Any]], str | None]


def _save_layers(partial: Path, engine: Engine) -> Outcome:
    """Every rank takes part in gathering a layer it holds a part of, and one writes it."""
    written: dict[str, dict[str, Any]] = {}
    error: str | None = None
    for layer in engine.layers():
        tensors = _flat(engine, layer)
        if engine.place.data_rank == 0 and engine.place.is_first_copy and error is None:
            path = partial / _layer_file(layer)
            try:
                save_file(tensors, path)
                written[str(path.relative_to(partial))] = describe(path)
            except (OSError, SafetensorError) as problem:
                error = f"cannot write {path}: {problem}"
    return written, error


def _save_own(partial: Path, engine: OwnFormat, group: Any) -> Outcome:
    """The engine writes, then each file is hashed by one rank.

    A rank that cannot write raises by itself: the others may be waiting for it inside the engine.
    """
    folder = partial / engine.own_format
    try:
        engine.save_own(folder)
    except (OSError, RuntimeError, CheckpointException) as problem:
        raise MegamixError(f"cannot write {folder}: {problem}. Free space or choose another run_dir.") from problem
    dist.barrier(group)
    names = files_in(partial, engine.own_format)[dist.get_rank() :: dist.get_world_size()]
    try:
        return {name: describe(partial / name) for name in names}, None
    except OSError as problem:
        return {}, f"cannot read back {folder}: {problem}"


def load_engine(path: Path, engine: Engine, step: int) -> None:
    """Sets the engine's weights and optimizer state; each rank reads the layers it holds.

    Raises:
        ResumeRefused: a file is damaged, or only another engine can read it.
    """
    holds = kind(path)
    if holds != LAYERS:
        if not isinstance(engine, OwnFormat) or engine.own_format != holds:
            raise ResumeRefused(
                f"the checkpoint {path} was written by engine {holds} in a format of its own (engine.checkpoint_format dist), which no other "
                f"engine reads. Resume it with engine.name={holds}; there, engine.checkpoint_format=layers writes the next one for all engines."
            )
        for name in files_in(path, holds)[dist.get_rank() :: dist.get_world_size()]:
            verify(path, name)
        engine.load_own(path / holds, step)
        return
    engine.optimizer_steps = step
    for layer in engine.layers():
        name = _layer_file(layer)
        verify(path, name)
        engine.load_layer_state(layer, _unflatten(load_file(path / name)))


def format_of(engine: Engine) -> str:
    """What the engine's checkpoints will hold, as `megamix.checkpoint.kind` says it."""
    return engine.own_format if isinstance(engine, OwnFormat) and engine.saves_own_format else LAYERS


def _replace_folder(partial: Path, final: Path) -> None:
    """Gives a finished folder its name; one of that name from before is there until then."""
    before = final.with_name(f"{final.name}.before")
    if final.exists():
        os.replace(final, before)
    os.replace(partial, final)
    shutil.rmtree(before, ignore_errors=True)


def load_weights(weights: PretrainedWeights, engine: Engine) -> None:
    """Sets the engine's weights to a given model's, with a fresh optimizer; each rank reads the layers it holds."""
    engine.optimizer_steps = 0
    for layer in engine.layers():
        state = {
            name: ParameterState(weight, torch.zeros_like(weight), torch.zeros_like(weight))
            for name, weight in weights.layer(layer).items()
        }
        engine.load_layer_state(layer, state)


def _layer_file(layer: int) -> str:
    return f"{LAYERS}/{layer:05d}.safetensors"


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
