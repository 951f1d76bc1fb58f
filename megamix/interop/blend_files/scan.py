"""Scan of adopted token files in one pass: hash of each file, counts of every token in each split."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.data.tokens.indexed import IndexedTokens, bin_path

_CHUNK_TOKENS = 1 << 20
_LOG_EVERY_S = 30.0


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
    with _Shown(total, progress) as shown, ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(_scan, job, vocab_size, shown.advance) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan(job: FileJob, vocab_size: int, advance: Callable[[int], None]) -> FileScan:
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
            advance(len(piece))
    return FileScan(digest.hexdigest(), counts_PV)


def _check_ids(job: FileJob, tokens: np.ndarray, at: int, vocab_size: int) -> None:
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return
    wrong = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise InputError(
        f"domain '{job.domain}': {bin_path(job.file.prefix)} holds the token id {tokens[wrong]} (its token {at + wrong}),"
        f" but the tokenizer's ids are 0 to {vocab_size - 1}. Give the tokenizer that the files were made with."
    )


class _Shown:
    """How many bytes are read."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._total, self._done = total, 0
        self._start = self._spoke = time.monotonic()
        self._lock = threading.Lock()
        terminal = sys.stderr.isatty()
        self._log = enabled and not terminal
        columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not (enabled and terminal))
        self._task = self._bar.add_task("reading", total=total)

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are read; called from several threads."""
        with self._lock:
            self._done += num_bytes
            self._bar.update(self._task, completed=self._done)
            now = time.monotonic()
            if self._log and now - self._spoke > _LOG_EVERY_S:
                self._spoke = now
                rate = self._done / (now - self._start)
                get_logger().info(
                    "%.1f of %.1f GB read, %.0f MB/s, about %.0f s left",
                    self._done / 1e9, self._total / 1e9, rate / 1e6, (self._total - self._done) / rate,
                )  # fmt: skip
