"""Checkpoints on disk: a directory that is there whole or not at all, and that any layout can read.

    checkpoints/step_200/
        layers/00003.safetensors    one pipeline layer: each parameter in fp32 under its Hugging Face name, and its
                                    moments in Adam
        state.json                  step, sampler, mixer, sums of the log interval, and fingerprints of what the run
                                    was made of
        checkpoint.json             every file's size and SHA-256; written last, before the directory gets its name

An engine that writes a format of its own has a folder of its name in the place of ``layers``, which it alone reads.

The files are written under ``step_200.partial`` by all ranks and renamed once every rank has finished
(`megamix.saving`). Nothing but an engine's own format is pickled. Random numbers need no file: what is random in a step
is seeded by the run's seed and the step (`megamix.train`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamix.errors import ResumeRefused
from megamix.log import get_logger

FORMAT = "megamix-checkpoint"
VERSION = 1
PARTIAL = ".partial"
LAYERS = "layers"


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; says which newer ones it passed over and why."""
    if not folder.is_dir():
        return None
    log = get_logger()
    for path in sorted(folder.glob(f"step_*{PARTIAL}")):
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
    verify(path, "state.json")
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def kind(path: Path) -> str:
    """What holds the weights of a checkpoint: `LAYERS`, or the name of the engine that alone can read them."""
    return json.loads((path / "checkpoint.json").read_text(encoding="utf-8")).get("holds", LAYERS)


def files_in(path: Path, folder: str) -> list[str]:
    """Every file of a folder of a checkpoint, by its name in the checkpoint, sorted."""
    return sorted(str(file.relative_to(path)) for file in (path / folder).rglob("*") if file.is_file())


def verify(path: Path, name: str) -> None:
    """Checks the hash of one file of a checkpoint.

    Raises:
        ResumeRefused: it is not what was written.
    """
    expected = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))["files"].get(name)
    if expected is None:
        raise ResumeRefused(f"the checkpoint {path} has no {name}: it is of another model.")
    seen = describe(path / name, sync=False)
    if seen != expected:
        raise ResumeRefused(
            f"the checkpoint {path} is damaged: {name} has SHA-256 {seen['sha256'][:12]}..., expected {expected['sha256'][:12]}.... "
            "Resume from another (checkpoint.resume=PATH)."
        )


def describe(path: Path, sync: bool = True) -> dict[str, Any]:
    """Size and hash of a file; with ``sync``, once it is safe on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_json(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a file of a checkpoint; returns what `describe` says of it."""
    path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return describe(path)
