"""Checkpoints: a directory that is there whole or not at all, and that any layout can read.

    checkpoints/step_200/
        layers/00003.safetensors       one pipeline layer: each parameter in fp32 under its Hugging Face name, with
        Adam's moments state.json                     step, sampler, mixer, accumulators, and the fingerprints of what
        the run was made of checkpoint.json                every file's size and SHA-256; written last, before the
        directory gets its name

The files are written under ``step_200.partial`` by all ranks and renamed once every rank has finished. Nothing is
pickled. Random numbers need no
file: what is random in a step is seeded by the run's seed and the step (`megamix.train`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megamix.engines.base import Engine, ParameterState
from megamix.errors import InputError, ResumeRefused
from megamix.log import get_logger

FORMAT = "megamix-checkpoint"
VERSION = 1
_PARTIAL = ".partial"


def save(
    folder: Path, step: int, engine: Engine, state: Mapping[str, Any], keep: int, group: dist.ProcessGroup
) -> Path:
    """Writes the checkpoint of ``step`` (steps taken) and drops all but the newest ``keep``; every rank calls it.

    Args:
        folder: the run's ``checkpoints`` directory.
        state: JSON-serialisable; rank 0's is written.
        group: a process group of all ranks with a CPU backend.

    Raises:
        MegamixError: a rank could not write; every rank raises, and no checkpoint of this step exists.
    """
    final = folder / f"step_{step}"
    partial = folder / f"step_{step}{_PARTIAL}"
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
                written[str(path.relative_to(partial))] = _describe(path)
            except (OSError, SafetensorError) as problem:
                error = f"cannot write {path}: {problem}"
    if dist.get_rank() == 0 and error is None:
        try:
            written["state.json"] = _write_json(partial / "state.json", {**state, "step": step})
        except OSError as problem:
            error = f"cannot write {partial / 'state.json'}: {problem}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (written, error), group=group)
    errors = [problem for _, problem in outcomes if problem]
    if errors:
        raise InputError(
            f"the checkpoint of step {step} was not written: {errors[0]}. Free space or choose another run_dir."
        )
    if dist.get_rank() == 0:
        files = {name: entry for files, _ in outcomes for name, entry in files.items()}
        _write_json(partial / "checkpoint.json", {"format": FORMAT, "version": VERSION, "step": step, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_directory(folder)
        for old in sorted(complete_steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step_{old}", ignore_errors=True)
    dist.barrier(group)
    return final


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; says which newer ones it passed over and why."""
    if not folder.is_dir():
        return None
    log = get_logger()
    for path in sorted(folder.glob(f"step_*{_PARTIAL}")):
        log.info("passing over %s: it was not finished", path)
    for step in sorted(complete_steps(folder), reverse=True):
        path = folder / f"step_{step}"
        problem = damage(path)
        if problem is None:
            return path
        log.warning("passing over %s: %s", path, problem)
    return None


def complete_steps(folder: Path) -> list[int]:
    """The steps that have a directory under its final name."""
    return [int(path.name[5:]) for path in folder.glob("step_*") if path.name[5:].isdigit()]


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint (presence and size; hashes are checked on reading), or None."""
    try:
        listing = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        files = listing["files"]
        if listing["format"] != FORMAT or listing["version"] != VERSION:
            return f"checkpoint.json is of format {listing['format']} version {listing['version']}, expected {FORMAT} {VERSION}"
        for name, entry in files.items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size != entry["bytes"]:
                return f"{name} has {'no file' if size is None else f'{size} bytes'}, expected {entry['bytes']} bytes"
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"checkpoint.json cannot be read ({problem})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, its hash checked.

    Raises:
        ResumeRefused: the checkpoint is damaged.
    """
    problem = damage(path)
    if problem is not None:
        raise ResumeRefused(
            f"the checkpoint {path} is damaged: {problem}. Resume from another (checkpoint.resume=PATH)."
        )
    _verify(path, "state.json")
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def load_engine(path: Path, engine: Engine, step: int) -> None:
    """Sets the engine's weights and optimizer state; each rank reads the layers it holds.

    Raises:
        ResumeRefused: a file is damaged.
    """
    engine.optimizer_steps = step
    for layer in engine.layers():
        name = f"layers/{layer:05d}.safetensors"
        _verify(path, name)
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


def _verify(path: Path, name: str) -> None:
    expected = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))["files"].get(name)
    if expected is None:
        raise ResumeRefused(f"the checkpoint {path} has no {name}: it is of another model.")
    seen = _describe(path / name, sync=False)
    if seen != expected:
        raise ResumeRefused(
            f"the checkpoint {path} is damaged: {name} has SHA-256 {seen['sha256'][:12]}..., expected {expected['sha256'][:12]}.... "
            "Resume from another (checkpoint.resume=PATH)."
        )


def _describe(path: Path, sync: bool = True) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return _describe(path)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
