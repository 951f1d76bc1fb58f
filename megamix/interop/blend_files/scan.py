"""Scan of adopted token files in one pass: hash of each file, counts of every token in each split."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megamix.core.errors import InputError
from megamix.core.progress import Progress
from megamix.data.tokens.indexed import IndexedTokens, bin_path

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class FileJob:
    """File to read.

    Attributes:
        domain: name for messages.
        parts: token ranges [start, end) to count separately, in rising order, without overlap.
    """

    domain: str
    file: IndexedTokens
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FileScan:
    """Content of a file.

    Attributes:
        sha256: hash of the .bin file, hexadecimal.
        counts_PV: number of occurrences of every token id in each part, int64 [parts, vocab_size].
    """

    sha256: str
    counts_PV: np.ndarray


def scan_files(jobs: Sequence[FileJob], vocab_size: int, workers: int, *, progress: bool = True) -> list[FileScan]:
    """Reads every file once, some at a time; memory does not grow with their size.

    Args:
        vocab_size: V; every token id must lie below.
        workers: threads, one per file.
        progress: a bar on a terminal, else a log line every half minute.

    Raises:
        InputError: a token id outside the vocabulary, or a file that ends before its index says.
    """
    total = sum(job.file.num_tokens * job.file.dtype.itemsize for job in jobs)
    with _ReadProgress(total, progress) as shown, ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(_scan, job, vocab_size, shown.add) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan(job: FileJob, vocab_size: int, count: Callable[[int], None]) -> FileScan:
    digest = hashlib.sha256()
    counts_PV = np.zeros((len(job.parts), vocab_size), np.int64)
    at, size = 0, job.file.dtype.itemsize
    with open(bin_path(job.file.prefix), "rb") as data:
        while at < job.file.num_tokens:
            wanted = min(_CHUNK_TOKENS, job.file.num_tokens - at) * size
            piece = data.read(wanted)
            if len(piece) != wanted:
                raise InputError(
                    f"domain '{job.domain}': {bin_path(job.file.prefix)} ended after {at * size + len(piece)} bytes"
                    f" while it was read; {job.file.num_tokens * size} were there before. Do not write to it meanwhile,"
                    " and adopt again."
                )
            digest.update(piece)
            tokens = np.frombuffer(piece, job.file.dtype)
            _check_ids(job, tokens, at, vocab_size)
            for part, (start, end) in enumerate(job.parts):
                inside = tokens[max(start - at, 0) : max(end - at, 0)]
                counts_PV[part] += np.bincount(inside, minlength=vocab_size)
            at += len(tokens)
            count(len(piece))
    return FileScan(digest.hexdigest(), counts_PV)


def _check_ids(job: FileJob, tokens: np.ndarray, at: int, vocab_size: int) -> None:
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return
    wrong = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise InputError(
        f"domain '{job.domain}': {bin_path(job.file.prefix)} holds the token id {tokens[wrong]} (its token {at + wrong}),"
        f" but the tokenizer's ids are 0 to {vocab_size - 1}. Give the tokenizer that the files were made with."
    )


class _ReadProgress(Progress):
    """Display of the bytes read."""

    def __init__(self, total: int, enabled: bool) -> None:
        columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        super().__init__(*columns, enabled=enabled)
        self._total, self._done = total, 0
        self._start = time.monotonic()
        self._counting = threading.Lock()
        self._bar = self.add_task("reading", total=total)

    def add(self, num_bytes: int) -> None:
        """Counts bytes that were read; called from several threads."""
        with self._counting:
            self._done += num_bytes
            self.update(self._bar, completed=self._done)
            rate = self._done / (time.monotonic() - self._start)
            self.say(
                f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB read, {rate / 1e6:.0f} MB/s, "
                f"about {(self._total - self._done) / rate:.0f} s left",
                at_intervals=True,
            )
