"""Verification of a data set: are its files those that the manifest describes?

    verify_sample   every size, the tokenizer, and some blocks drawn anew each time: at every start, well under a second
    verify_all      every block of every file; several processes can share the work

Both collect what they find and refuse with `DataChanged`, which names files and offsets. A manifest of version 1 has no
sizes and no hashes of blocks: its files can only be verified as a whole, and its indexes not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.files import sha256_of
from megamix.data.tokens.block_files import (
    BlockFile,
    Change,
    Task,
    Verified,
    changed_sizes,
    compare_sample,
    refuse,
    run_tasks,
    tasks_of,
)
from megamix.data.tokens.indexed import bin_path, idx_path
from megamix.data.tokens.manifest import FILE_NAME, DomainEntry, Manifest, SplitEntry


def verify_sample(manifest: Manifest, domains: Sequence[DomainEntry] | None = None) -> Verified:
    """Verifies the sizes of all files, the tokenizer, and blocks at random: of every file one, as far as the sample
    goes, then others.

    Args:
        domains: of the manifest; None: all.

    Raises:
        DataChanged: something differs.
        InputError: a file cannot be read, or the manifest is damaged.
    """
    tokenizer = manifest.folder / manifest.tokenizer.file
    there = tokenizer.exists()  # no run reads it: one that is gone stops none
    warning = None if there else f"{tokenizer} is missing: training goes on without it, export and evaluate do not."
    found = _changed_tokenizer(manifest) if there else []
    files = _files(manifest, domains)
    if files is None:
        _refuse(manifest, found)
        return Verified(0, 0, warning or _version_1(manifest))
    found += changed_sizes(files, "the manifest")
    _refuse(manifest, found)
    changed, verified = compare_sample(files)
    _refuse(manifest, changed)
    return replace(verified, warning=warning, has_tokenizer=True)


def verify_all(
    manifest: Manifest,
    domains: Sequence[DomainEntry] | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Verified:
    """Verifies the tokenizer and every byte of every file, or this process's share of them.

    Args:
        domains: of the manifest; None: all.
        share: number of this process, from 0, and number of the processes that share the work.
        progress: a bar on a terminal, else log lines.

    Raises:
        DataChanged: something differs; the message lists every place.
        InputError: a file cannot be read, or the manifest is damaged.
    """
    found = _changed_tokenizer(manifest)
    files = _files(manifest, domains)
    tasks: list[Task] = []
    if files is None:
        tasks += [
            (path.stat().st_size, functools.partial(_compare_whole, domain, path, sha256))
            for domain, path, sha256 in _whole_files(manifest, domains)
        ]
    else:
        found += changed_sizes(files, "the manifest")
        cut = {change.path for change in found}
        tasks += tasks_of([file for file in files if file.path not in cut])
    changed, verified = run_tasks(tasks[share[0] :: share[1]], progress)
    _refuse(manifest, [*found, *changed])
    warning = None if files is not None else "Indexes cannot be verified: " + _version_1(manifest)
    return replace(verified, warning=warning, has_tokenizer=True)


def _files(manifest: Manifest, domains: Sequence[DomainEntry] | None) -> list[BlockFile] | None:
    """The files of the domains, each once; None for a manifest without their contents."""
    found: dict[Path, BlockFile] = {}  # the splits of a domain may share a file
    for name, split in _splits(manifest, domains):
        if split.contents is None:
            return None
        for prefix, held in zip(split.prefixes, split.contents, strict=True):
            data, index = bin_path(manifest.folder / prefix), idx_path(manifest.folder / prefix)
            found[data] = BlockFile(name, data, held.bin_bytes, held.bin_blocks)
            found[index] = BlockFile(name, index, held.idx_bytes, held.idx_blocks)
    for file in found.values():
        if (problem := file.problem()) is not None:
            raise InputError(
                f"{manifest.folder / FILE_NAME}: {file.path.name} of domain '{file.domain}' {problem}: the manifest is damaged."
                " Put the old one back, or run `megamix prepare` again."
            )
    return list(found.values())


def _whole_files(manifest: Manifest, domains: Sequence[DomainEntry] | None) -> Iterator[tuple[str, Path, str]]:
    seen: set[Path] = set()
    for name, split in _splits(manifest, domains):
        for prefix, sha256 in zip(split.prefixes, split.sha256, strict=True):
            path = bin_path(manifest.folder / prefix)
            if path not in seen:
                seen.add(path)
                yield name, path, sha256


def _splits(manifest: Manifest, domains: Sequence[DomainEntry] | None) -> Iterator[tuple[str, SplitEntry]]:
    for domain in manifest.domains if domains is None else domains:
        yield domain.name, domain.train
        yield domain.name, domain.validation


def _compare_whole(domain: str, path: Path, wanted: str) -> list[Change]:
    try:
        seen = sha256_of(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the disk.") from error
    text = f"its hash is {seen[:12]}, the manifest says {wanted[:12]}"
    return [] if seen == wanted else [Change(domain, path, text=text)]


def _changed_tokenizer(manifest: Manifest) -> list[Change]:
    path, wanted = manifest.folder / manifest.tokenizer.file, manifest.tokenizer.sha256
    if path.exists() and not path.is_file():
        return [Change("", path, text="the tokenizer is a folder, a device or a pipe")]
    try:
        seen = sha256_of(path)
    except OSError as error:
        return [Change("", path, text=f"the tokenizer cannot be read ({error.strerror or error})")]
    text = f"its hash is {seen[:12]}, but the tokens were made with the tokenizer {wanted[:12]}"
    return [] if seen == wanted else [Change("", path, text=text)]


def _refuse(manifest: Manifest, found: Sequence[Change]) -> None:
    remedy = (
        "Copy these files again, or remove them and run `megamix prepare` again; `megamix verify"
        f" {manifest.folder}` looks at every byte."
    )
    refuse(manifest.folder / FILE_NAME, found, remedy)


def _version_1(manifest: Manifest) -> str:
    return (
        f"{manifest.folder / FILE_NAME} is of version 1 and has no hashes of blocks: its token files can only be verified as"
        f" a whole, by `megamix verify {manifest.folder}` or data.verify=all; with --write-hashes, verify adds them."
    )
