"""Verification of a cache of reference losses: are its files those that reference.json describes?

As of token files (`megamix.data.tokens.verify`): every size and a sample of blocks at every start, and all of it where
it is asked for. A cache of before hashes were kept has none; its sizes alone can be verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamix.core.errors import InputError, MegamixError
from megamix.data.reference_losses import DTYPE, FILE_NAME, CacheInfo, finish, losses_path, read_info
from megamix.data.tokens.block_files import (
    BlockFile,
    Change,
    Verified,
    changed_sizes,
    compare_sample,
    refuse,
    run_tasks,
    tasks_of,
)
from megamix.data.tokens.hashes import hash_file


def verify_losses(
    folder: Path,
    domains: Sequence[str] | None = None,
    *,
    sample: bool = False,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Verified:
    """Verifies the files of a finished cache.

    Args:
        domains: of the cache; None: all.
        sample: sizes and some blocks alone, drawn anew each time.
        share, progress: see `megamix.data.tokens.verify.verify_all`; without effect on a sample.

    Raises:
        DataChanged: something differs.
        InputError: a file cannot be read, or there is no finished cache.
    """
    info = read_info(folder)
    files = _files(folder, info, [name for name in info.domains if domains is None or name in domains])
    changed = changed_sizes(files, FILE_NAME)
    hashed = [file for file in files if file.blocks]
    if sample:
        _refuse(folder, changed)
        found, verified = compare_sample(hashed)
    else:
        cut = {change.path for change in changed}
        tasks = tasks_of([file for file in hashed if file.path not in cut])
        found, verified = run_tasks(tasks[share[0] :: share[1]], progress)
    _refuse(folder, [*changed, *found])
    return verified if len(hashed) == len(files) else replace(verified, warning=_without_hashes(folder))


def hash_losses(folder: Path, name: str) -> str:
    """Hashes of the blocks of a domain's file, which is read whole.

    Raises:
        MegamixError: it cannot be read.
    """
    path = losses_path(folder, name)
    try:
        return hash_file(path).blocks
    except OSError as error:
        raise MegamixError(
            f"cannot read {path}: {error.strerror or error}. Mend the disk; the same command goes on."
        ) from error


def add_hashes(folder: Path) -> Path:
    """Adds the hashes that a cache of before they were kept lacks; returns the file that holds them.

    Raises:
        MegamixError: a file cannot be read, or reference.json cannot be written.
    """
    info = read_info(folder)
    try:
        finish(folder, info, {name: hash_losses(folder, name) for name in info.domains})
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}. Check the folder.") from error
    return folder / FILE_NAME


def _files(folder: Path, info: CacheInfo, names: Sequence[str]) -> list[BlockFile]:
    found = []
    for name in names:
        domain = info.domains[name]
        num_bytes = domain.windows * info.seq_length * DTYPE.itemsize
        file = BlockFile(name, losses_path(folder, name), num_bytes, domain.blocks or "")
        if domain.blocks is not None and (problem := file.problem()) is not None:
            raise InputError(
                f"{folder / FILE_NAME}: {file.path.name} of domain '{name}' {problem}: the file is damaged. Put the old one "
                "back, or run `megamix reference` again."
            )
        found.append(file)
    return found


def _refuse(folder: Path, found: Sequence[Change]) -> None:
    remedy = (
        "Copy these files again, or remove the folder and run `megamix reference` again; `megamix verify"
        f" {folder}` looks at every byte."
    )
    refuse(folder / FILE_NAME, found, remedy)


def _without_hashes(folder: Path) -> str:
    return (
        f"{folder / FILE_NAME} has no hashes of blocks, as caches had none before: only the sizes of its files can be verified."
        f" `megamix verify {folder} --write-hashes` adds them."
    )
