"""Verification of a data set: are its files those that the manifest describes?

    verify_sample   every size, the tokenizer, and some blocks drawn anew each time: at every start, well under a second
    verify_all      every block of every file; several processes can share the work

Both collect what they find and refuse with `DataChanged`, which names files and offsets. A manifest of version 1 has no
sizes and no hashes of blocks: its files can only be verified as a whole, and its indexes not at all.
"""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import DataChanged, InputError
from megamix.core.files import sha256_of
from megamix.core.processes import num_cores
from megamix.core.progress import ReadProgress
from megamix.core.text import gib, listed
from megamix.data.tokens.hashes import BLOCK_BYTES, DIGEST_BYTES, block_digest
from megamix.data.tokens.indexed import bin_path, idx_path
from megamix.data.tokens.manifest import FILE_NAME, DomainEntry, Manifest, SplitEntry

SAMPLE_BYTES = 128 << 20
"""Bytes that a sample reads, about."""
SAMPLE_BLOCKS = 256
"""Blocks of a sample, at most: small files cost a seek each."""
_TASK_BLOCKS = 16
_THREADS = 8
_SHOWN = 10


@dataclass(frozen=True)
class Verified:
    """What a verification has read, of how much."""

    num_bytes: int
    total_bytes: int
    warning: str | None = None
    """What could not be verified."""

    def line(self) -> str:
        """In words, for people."""
        if self.num_bytes == self.total_bytes:
            return f"all {gib(self.total_bytes)} of the token files, their sizes and the tokenizer are as written"
        return (
            f"a sample of {gib(self.num_bytes)} of {gib(self.total_bytes)}, all sizes and the tokenizer are as written"
        )


@dataclass(frozen=True)
class _File:
    """File with what the manifest says of it."""

    domain: str
    path: Path
    num_bytes: int
    blocks: str

    @property
    def num_blocks(self) -> int:
        return -(-self.num_bytes // BLOCK_BYTES)

    @functools.cached_property
    def digests(self) -> bytes:
        return base64.b64decode(self.blocks)

    def bytes_of(self, block: int) -> int:
        return min(BLOCK_BYTES, self.num_bytes - block * BLOCK_BYTES)

    def is_as_written(self, descriptor: int, block: int) -> bool:
        data = os.pread(descriptor, self.bytes_of(block), block * BLOCK_BYTES)
        return block_digest(data) == self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]


@dataclass(frozen=True, order=True)
class _Change:
    """Blocks [first, end) of a file that differ, or a text about the whole file."""

    domain: str
    path: Path
    first: int = 0
    end: int = 0
    text: str = ""

    def line(self) -> str:
        where = f"domain '{self.domain}': " if self.domain else ""
        what = self.text or f"bytes {self.first * BLOCK_BYTES} to {self.end * BLOCK_BYTES} have changed"
        return f"{where}{self.path}: {what}"


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
    found += _changed_sizes(files)
    _refuse(manifest, found)
    drawn = _draw(files, np.random.default_rng())
    with ThreadPoolExecutor(min(_THREADS, len(drawn) or 1)) as pool:
        found += [
            change for changes in pool.map(lambda pick: _compare(files[pick[0]], pick[1]), drawn) for change in changes
        ]
    _refuse(manifest, found)
    num_bytes = sum(files[number].bytes_of(block) for number, blocks in drawn for block in blocks)
    return Verified(num_bytes, sum(file.num_bytes for file in files), warning)


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
    tasks: list[tuple[int, Callable[[], list[_Change]]]] = []
    if files is None:
        tasks += [
            (path.stat().st_size, functools.partial(_compare_whole, domain, path, sha256))
            for domain, path, sha256 in _whole_files(manifest, domains)
        ]
    else:
        sizes = _changed_sizes(files)
        cut = {change.path for change in sizes}
        found += sizes
        for file in (file for file in files if file.path not in cut):
            for first in range(0, file.num_blocks, _TASK_BLOCKS):
                blocks = range(first, min(first + _TASK_BLOCKS, file.num_blocks))
                tasks.append((sum(map(file.bytes_of, blocks)), functools.partial(_compare, file, blocks)))
    mine = tasks[share[0] :: share[1]]
    total = sum(size for size, _ in mine)
    with ReadProgress(total, progress) as shown, ThreadPoolExecutor(min(_THREADS, num_cores())) as pool:

        def work(task: tuple[int, Callable[[], list[_Change]]]) -> list[_Change]:
            changes = task[1]()
            shown.add(task[0])
            return changes

        found += [change for changes in pool.map(work, mine) for change in changes]
    _refuse(manifest, found)
    return Verified(total, total, None if files is not None else "Indexes cannot be verified: " + _version_1(manifest))


def _files(manifest: Manifest, domains: Sequence[DomainEntry] | None) -> list[_File] | None:
    """The files of the domains, each once; None for a manifest without their contents."""
    found: dict[Path, _File] = {}  # the splits of a domain may share a file
    for name, split in _splits(manifest, domains):
        if split.contents is None:
            return None
        for prefix, held in zip(split.prefixes, split.contents, strict=True):
            data, index = bin_path(manifest.folder / prefix), idx_path(manifest.folder / prefix)
            found[data] = _File(name, data, held.bin_bytes, held.bin_blocks)
            found[index] = _File(name, index, held.idx_bytes, held.idx_blocks)
    for file in found.values():
        wanted = -(-file.num_blocks * DIGEST_BYTES // 3) * 4  # characters of base64
        if len(file.blocks) != wanted:
            raise InputError(
                f"{manifest.folder / FILE_NAME}: {file.path.name} of domain '{file.domain}' has {len(file.blocks)}"
                f" characters of block hashes, expected {wanted} for {file.num_bytes} bytes: the manifest is damaged."
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


def _draw(files: Sequence[_File], rng: np.random.Generator) -> list[tuple[int, list[int]]]:
    """Blocks to read, by number of the file; everything where there is no more than a sample."""
    if sum(file.num_bytes for file in files) <= SAMPLE_BYTES and sum(f.num_blocks for f in files) <= SAMPLE_BLOCKS:
        return [(number, list(range(file.num_blocks))) for number, file in enumerate(files)]
    drawn: dict[int, set[int]] = {}
    left_bytes, left = SAMPLE_BYTES, SAMPLE_BLOCKS
    num_blocks = np.array([file.num_blocks for file in files], np.int64)
    ends = np.cumsum(num_blocks)
    firsts = ends - num_blocks
    some = rng.permutation(np.flatnonzero(num_blocks))[:SAMPLE_BLOCKS]
    one_each = (firsts[some] + rng.integers(0, num_blocks[some])).tolist()
    for block in (*one_each, *rng.integers(0, int(ends[-1]), SAMPLE_BLOCKS).tolist()):
        number = int(np.searchsorted(ends, block, side="right"))
        place = block - int(firsts[number])
        if left_bytes <= 0 or left <= 0:
            break
        if place not in drawn.setdefault(number, set()):
            drawn[number].add(place)
            left_bytes, left = left_bytes - files[number].bytes_of(place), left - 1
    return [(number, sorted(blocks)) for number, blocks in drawn.items()]


def _compare(file: _File, blocks: Sequence[int]) -> list[_Change]:
    try:
        with open(file.path, "rb") as data:
            wrong = [block for block in blocks if not file.is_as_written(data.fileno(), block)]
    except OSError as error:
        raise InputError(f"cannot read {file.path}: {error.strerror or error}. Check the disk.") from error
    return [_Change(file.domain, file.path, block, block + 1) for block in wrong]


def _compare_whole(domain: str, path: Path, wanted: str) -> list[_Change]:
    try:
        seen = sha256_of(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the disk.") from error
    text = f"its hash is {seen[:12]}, the manifest says {wanted[:12]}"
    return [] if seen == wanted else [_Change(domain, path, text=text)]


def _changed_sizes(files: Sequence[_File]) -> list[_Change]:
    found = []
    for file in files:
        try:
            seen = file.path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot read {file.path}: {error.strerror or error}. Check the path.") from error
        if seen != file.num_bytes:
            text = f"it has {seen} bytes, the manifest says {file.num_bytes}"
            found.append(_Change(file.domain, file.path, text=text))
    return found


def _changed_tokenizer(manifest: Manifest) -> list[_Change]:
    path, wanted = manifest.folder / manifest.tokenizer.file, manifest.tokenizer.sha256
    try:
        seen = sha256_of(path)
    except OSError as error:
        return [_Change("", path, text=f"the tokenizer cannot be read ({error.strerror or error})")]
    text = f"its hash is {seen[:12]}, but the tokens were made with the tokenizer {wanted[:12]}"
    return [] if seen == wanted else [_Change("", path, text=text)]


def _refuse(manifest: Manifest, found: Sequence[_Change]) -> None:
    if not found:
        return
    merged: list[_Change] = []
    for change in sorted(found):
        last = merged[-1] if merged else None
        if last is not None and not (last.text or change.text) and (last.path, last.end) == (change.path, change.first):
            merged[-1] = _Change(last.domain, last.path, last.first, change.end)
        else:
            merged.append(change)
    lines = [change.line() for change in merged[:_SHOWN]]
    if len(merged) > _SHOWN:
        lines.append(
            f"and {len(merged) - _SHOWN} more places in {listed(sorted({c.path.name for c in merged[_SHOWN:]}))}"
        )
    raise DataChanged(
        f"{manifest.folder / FILE_NAME} describes other files than are there:\n  "
        + "\n  ".join(lines)
        + "\n  Copy these files again, or remove them and run `megamix prepare` again; `megamix verify"
        f" {manifest.folder}` looks at every byte."
    )


def _version_1(manifest: Manifest) -> str:
    return (
        f"{manifest.folder / FILE_NAME} is of version 1 and has no hashes of blocks: its token files can only be verified as"
        f" a whole, by `megamix verify {manifest.folder}` or data.verify=all; with --write-hashes, verify adds them."
    )
