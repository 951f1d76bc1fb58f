"""Files with hashes of their blocks: which blocks of which files are not as they were written?"""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import DataChanged, InputError
from megamix.core.processes import num_cores
from megamix.core.progress import ReadProgress
from megamix.core.text import gib, listed
from megamix.data.tokens.hashes import BLOCK_BYTES, DIGEST_BYTES, block_digest

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

    has_tokenizer: bool = False
    """Whether the tokenizer was compared, too."""

    def line(self) -> str:
        """In words, for people."""
        is_whole = self.num_bytes == self.total_bytes
        read = f"all {gib(self.total_bytes)}" if is_whole else f"{gib(self.num_bytes)} of {gib(self.total_bytes)}"
        rest = ", all sizes and the tokenizer" if self.has_tokenizer else " and all sizes"
        return f"{read if is_whole else f'a sample of {read}'} of the files{rest} are as written"


@dataclass(frozen=True)
class BlockFile:
    """File with what is written of it elsewhere.

    Attributes:
        domain: whose data it holds.
        blocks: the digests, as of `megamix.data.tokens.hashes.FileHashes`.
    """

    domain: str
    path: Path
    num_bytes: int
    blocks: str

    @property
    def num_blocks(self) -> int:
        return -(-self.num_bytes // BLOCK_BYTES)

    @functools.cached_property
    def digests(self) -> bytes:
        return base64.b64decode(self.blocks, validate=True)

    def problem(self) -> str | None:
        """What is wrong with its hashes; None where nothing is."""
        wanted = -(-self.num_blocks * DIGEST_BYTES // 3) * 4  # characters of base64
        if len(self.blocks) != wanted:
            return f"has {len(self.blocks)} characters of block hashes, expected {wanted} for {self.num_bytes} bytes"
        try:
            _ = self.digests
        except ValueError:  # binascii.Error is one
            return "has block hashes that are no base64"
        return None

    def bytes_of(self, block: int) -> int:
        return min(BLOCK_BYTES, self.num_bytes - block * BLOCK_BYTES)

    def is_as_written(self, descriptor: int, block: int) -> bool:
        data = os.pread(descriptor, self.bytes_of(block), block * BLOCK_BYTES)
        return block_digest(data) == self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]


@dataclass(frozen=True, order=True)
class Change:
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


Task = tuple[int, Callable[[], list[Change]]]
"""Bytes to read, and what reads and compares them."""


def changed_sizes(files: Sequence[BlockFile], source: str) -> list[Change]:
    """The files of other sizes than ``source`` says, or that are gone.

    Raises:
        InputError: a file cannot be looked at.
    """
    found = []
    for file in files:
        try:
            seen = file.path.stat().st_size
        except FileNotFoundError:
            found.append(Change(file.domain, file.path, text="it is missing"))
            continue
        except OSError as error:
            raise InputError(f"cannot read {file.path}: {error.strerror or error}. Check the path.") from error
        if seen != file.num_bytes:
            text = f"it has {seen} bytes, {source} says {file.num_bytes}"
            found.append(Change(file.domain, file.path, text=text))
    return found


def compare_sample(files: Sequence[BlockFile]) -> tuple[list[Change], Verified]:
    """Compares blocks at random: of every file one, as far as the sample goes, then others.

    Raises:
        InputError: a file cannot be read.
    """
    drawn = draw(files, np.random.default_rng())
    with ThreadPoolExecutor(min(_THREADS, len(drawn) or 1)) as pool:
        changes = pool.map(lambda pick: compare(files[pick[0]], pick[1]), drawn)
        found = [change for each in changes for change in each]
    num_bytes = sum(files[number].bytes_of(block) for number, blocks in drawn for block in blocks)
    return found, Verified(num_bytes, sum(file.num_bytes for file in files))


def tasks_of(files: Sequence[BlockFile]) -> list[Task]:
    """Tasks that compare every block, some blocks each."""
    tasks: list[Task] = []
    for file in files:
        for first in range(0, file.num_blocks, _TASK_BLOCKS):
            blocks = range(first, min(first + _TASK_BLOCKS, file.num_blocks))
            tasks.append((sum(map(file.bytes_of, blocks)), functools.partial(compare, file, blocks)))
    return tasks


def run_tasks(tasks: Sequence[Task], progress: bool) -> tuple[list[Change], Verified]:
    """Runs tasks on all cores.

    Raises:
        InputError: a file cannot be read.
    """
    total = sum(size for size, _ in tasks)
    with ReadProgress(total, progress) as shown, ThreadPoolExecutor(min(_THREADS, num_cores())) as pool:

        def work(task: Task) -> list[Change]:
            changes = task[1]()
            shown.add(task[0])
            return changes

        found = [change for changes in pool.map(work, tasks) for change in changes]
    return found, Verified(total, total)


def refuse(source: Path, found: Sequence[Change], remedy: str) -> None:
    """Raises DataChanged where anything was found; the message names every place, as far as a screen goes.

    Args:
        source: the file that says what was written.
    """
    if not found:
        return
    merged: list[Change] = []
    for change in sorted(found):
        last = merged[-1] if merged else None
        if last is not None and not (last.text or change.text) and (last.path, last.end) == (change.path, change.first):
            merged[-1] = Change(last.domain, last.path, last.first, change.end)
        else:
            merged.append(change)
    lines = [change.line() for change in merged[:_SHOWN]]
    if len(merged) > _SHOWN:
        lines.append(
            f"and {len(merged) - _SHOWN} more places in {listed(sorted({c.path.name for c in merged[_SHOWN:]}))}"
        )
    raise DataChanged(f"{source} describes other files than are there:\n  " + "\n  ".join(lines) + f"\n  {remedy}")


def draw(files: Sequence[BlockFile], rng: np.random.Generator) -> list[tuple[int, list[int]]]:
    """Blocks of a sample, by number of the file; everything where there is no more than a sample."""
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


def compare(file: BlockFile, blocks: Sequence[int]) -> list[Change]:
    """The blocks of a file that differ.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(file.path, "rb") as data:
            wrong = [block for block in blocks if not file.is_as_written(data.fileno(), block)]
    except OSError as error:
        raise InputError(f"cannot read {file.path}: {error.strerror or error}. Check the disk.") from error
    return [Change(file.domain, file.path, block, block + 1) for block in wrong]
