"""Checkpoints on disk: a directory that is there whole or not at all, and that any layout can read.

    checkpoints/step_200/
        layers/00003.safetensors    one pipeline layer: each parameter in fp32 under its Hugging Face name, and its
                                    moments in Adam
        state.json                  step, sampler, mixer, sums of the log interval, and fingerprints of what the run
                                    was made of
        checkpoint.json             every file's size and SHA-256, and a SHA-256 of this list; written last, before the
                                    directory gets its name

An engine with an own format has a folder of its name in place of ``layers``, which it alone reads.

The files are written under ``step_200.partial`` by all ranks and renamed once every rank has finished
(`megamix.training.checkpoints.saving`, `megamix.training.checkpoints.keeping`). Nothing but an engine's own format is
pickled. Random numbers need no file: what is random in a step is seeded by the run's seed and the step
(`megamix.training.trainer`).

Which checkpoint is the newest is read off its step: clocks and the times of files are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamix.core.errors import ResumeRefused
from megamix.core.files import parse_json, sha256_of
from megamix.core.log import get_logger

FORMAT = "megamix-checkpoint"
VERSION = 2  # 1 had no SHA-256 of the list itself
PARTIAL = ".partial"
BEFORE = ".before"
"""Suffix of a checkpoint while another takes its name (`megamix.training.checkpoints.keeping`)."""
LAYERS = "layers"
LISTING = "checkpoint.json"
STATE = "state.json"
PATIENCE_SECONDS = 30.0
"""How long a reader waits for a file that should be there: a shared file system may cache its absence for as long (NFS:
acdirmin, 30 s)."""
_POLL_SECONDS = 0.1

Files = dict[str, dict[str, Any]]
"""`describe` of every file, by its name in the checkpoint."""


@dataclass(frozen=True)
class Listing:
    """checkpoint.json.

    Attributes:
        step: steps taken.
        holds: `LAYERS`, or the name of the engine that alone can read the weights.
        after_skips: whether the last step before it was left out (``guard.non_finite: skip``), so that its weights may
            be what is wrong.
    """

    step: int
    holds: str
    files: Files
    after_skips: bool = False


def newest(folder: Path, *, quiet: bool = False) -> Path | None:
    """The newest undamaged checkpoint in ``folder``; None where there is none at all.

    Args:
        quiet: do not log which newer ones are passed over, and why.

    Raises:
        ResumeRefused: there are checkpoints, and all are damaged.
    """
    passed_over = []
    for path in candidates(folder):
        problem = damage(path)
        if problem is None:
            return path
        passed_over.append((path, problem))
        if not quiet:
            get_logger().warning("passing over %s: %s", path, problem)
    refuse_damaged(folder, passed_over)
    return None


def candidates(folder: Path) -> list[Path]:
    """The directories that may be checkpoints, newest first.

    These are ``step_N``; and where a run was killed while one checkpoint took the name of another, the new one if it is
    complete, else the old one.
    """
    found = steps_in(folder)
    for step, before in steps_in(folder, BEFORE).items():
        if step not in found:
            partial = folder / f"step_{step}{PARTIAL}"
            found[step] = partial if damage(partial) is None else before
    return [found[step] for step in sorted(found, reverse=True)]


def refuse_damaged(folder: Path, passed_over: Sequence[tuple[Path, str]]) -> None:
    """Refuses to start anew where all checkpoints are damaged.

    Raises:
        ResumeRefused: ``passed_over``, checkpoints and what is wrong with them, is not empty.
    """
    if passed_over:
        problems = "; ".join(f"{path.name}: {problem}" for path, problem in passed_over)
        raise ResumeRefused(
            f"every checkpoint in {folder} is damaged ({problems}). Put back a copy of one, or choose another run_dir to start anew."
        )


def complete_steps(folder: Path) -> list[int]:
    """The steps that have a directory under its final name."""
    return list(steps_in(folder))


def steps_in(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Step -> directory ``step_N`` + ``suffix``; none where there is no folder."""
    pattern = re.compile(rf"step_(0|[1-9]\d*){re.escape(suffix)}", re.ASCII)
    names = ((pattern.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {int(match[1]): path for match, path in names if match is not None and path.is_dir()}


def read_listing(path: Path, patience: float = 0.0) -> Listing:
    """checkpoint.json of a checkpoint, checked against itself.

    Args:
        patience: seconds to wait for it.

    Raises:
        ValueError: it is not there or is damaged; the message says how.
    """
    wait_for(path / LISTING, time.monotonic() + patience)
    try:
        content = parse_json((path / LISTING).read_bytes())
        seal = content.pop("sha256", None)
        if content["format"] != FORMAT or content["version"] not in (1, VERSION):
            raise ValueError(
                f"it is of format {content['format']} version {content['version']}, expected {FORMAT} {VERSION}"
            )
        if seal != (None if content["version"] == 1 else _seal(content)):
            raise ValueError("its contents have changed since it was written")
        step, holds = int(content["step"]), str(content.get("holds", LAYERS))
        files = {
            str(name): {"bytes": int(each["bytes"]), "sha256": str(each["sha256"])}
            for name, each in content["files"].items()
        }
        return Listing(step, holds, files, bool(content.get("after_skips", False)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise ValueError(f"{LISTING} cannot be used ({problem})") from problem


def listing_of(path: Path, patience: float = 0.0) -> Listing:
    """`read_listing` of a checkpoint that was named by its path.

    Raises:
        ResumeRefused: it is damaged.
    """
    try:
        return read_listing(path, patience)
    except ValueError as problem:
        raise refusal(path, str(problem)) from problem


def write_listing(path: Path, listing: Listing) -> None:
    """Writes checkpoint.json, which makes the checkpoint complete."""
    content = {"format": FORMAT, "version": VERSION, **vars(listing)}
    write_json(path / LISTING, {**content, "sha256": _seal(content)})


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(path: Path, patience: float = 0.0) -> str | None:
    """The damage of a checkpoint, found without reading its weights, or None.

    checkpoint.json and state.json are checked by their hashes, the other files by presence and size, and
    the step in its name.

    Args:
        patience: seconds to wait, in all, for files that are not there.
    """
    deadline = time.monotonic() + patience
    try:
        listing = read_listing(path, patience)
    except ValueError as problem:
        return str(problem)
    problem = misnamed(path, listing) or damage_of_files(path, listing, listing.files, deadline, hashes=False)
    return problem or damage_of_files(path, listing, [STATE], deadline)


def misnamed(path: Path, listing: Listing) -> str | None:
    """The difference between the step in a checkpoint's name, where it has one, and its own; or None."""
    named = re.fullmatch(rf"step_(\d+)({re.escape(PARTIAL)}|{re.escape(BEFORE)})?", path.absolute().name, re.ASCII)
    if named is None or int(named[1]) == listing.step:
        return None
    return f"it was taken after step {listing.step}, not {int(named[1])} (rename it to step_{listing.step})"


def damage_of_files(
    path: Path, listing: Listing, names: Iterable[str], deadline: float, *, hashes: bool = True
) -> str | None:
    """The damage of the first damaged one of some files of a checkpoint, or None.

    Args:
        deadline: by `time.monotonic`; a file that is absent then is missing.
        hashes: whether to check hashes, or only sizes.
    """
    for name in names:
        expected = listing.files.get(name)
        if expected is None:
            return f"there is no {name} in its {LISTING}"
        try:
            if not wait_for(path / name, deadline):
                return f"{name} is missing, expected {expected['bytes']} bytes"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']} bytes"
            seen = describe(path / name, sync=False) if hashes else expected
        except OSError as problem:
            return f"{name} cannot be read ({problem.strerror or problem})"
        if seen["sha256"] != expected["sha256"]:
            return f"{name} has SHA-256 {seen['sha256'][:12]}..., expected {expected['sha256'][:12]}..."
    return None


def wait_for(path: Path, deadline: float) -> bool:
    """Whether the file exists, waiting until ``deadline`` by `time.monotonic`."""
    while True:
        # A stale handle may be gone the next time.
        with suppress(OSError):
            if path.is_file():
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
        # Listing the folder asks the server; looking for one name may be answered from memory.
        with suppress(OSError):
            os.listdir(path.parent)


def read_state_json(path: Path, patience: float = 0.0) -> dict[str, Any]:
    """state.json of a checkpoint, as JSON (`megamix.training.checkpoints.state`).

    Args:
        patience: see `damage`.

    Raises:
        ResumeRefused: the checkpoint is damaged (see `damage`).
    """
    problem = damage(path, patience)
    if problem is not None:
        raise refusal(path, problem)
    try:
        return parse_json((path / STATE).read_bytes())
    except (OSError, ValueError) as problem:
        raise refusal(path, f"{STATE} cannot be used ({problem})") from problem


def refusal(path: Path, problem: str) -> ResumeRefused:
    """The error for a damaged checkpoint that was named by its path."""
    return ResumeRefused(
        f"the checkpoint {path} is damaged: {problem}. Resume from another (checkpoint.resume=PATH, or auto for the newest whole one)."
    )


def kind(path: Path) -> str:
    """The form of the weights of a checkpoint, see `Listing.holds`; raises as `listing_of`."""
    return listing_of(path).holds


def files_in(path: Path, folder: str) -> list[str]:
    """Every file of a folder of a checkpoint, by its name in the checkpoint, sorted."""
    return sorted(str(file.relative_to(path)) for file in (path / folder).rglob("*") if file.is_file())


def verify(path: Path, name: str) -> None:
    """Checks the hash of one file of a checkpoint.

    Raises:
        ResumeRefused: it is damaged.
    """
    listing = listing_of(path)
    if name not in listing.files:
        raise ResumeRefused(f"the checkpoint {path} has no {name}: it is of another model.")
    problem = damage_of_files(path, listing, [name], time.monotonic())
    if problem is not None:
        raise refusal(path, problem)


def describe(path: Path, sync: bool = True) -> dict[str, Any]:
    """Size and hash of a file; with ``sync``, once it is safe on disk."""
    if sync:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_json(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a file of a checkpoint; returns its `describe`."""
    path.write_text(json.dumps(data, allow_nan=False) + "\n", encoding="utf-8")
    return describe(path)
