"""Scan of adopted token files in one pass: hash of each file, counts of every token in each split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megamix.core.errors import InputError
from megamix.core.progress import ReadProgress
from megamix.data.tokens.hashes import FileHasher, hash_file
from megamix.data.tokens.indexed import IndexedTokens, bin_path, idx_path
from megamix.data.tokens.manifest import PairContents

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
        contents: sizes and hashes of the .bin and the .idx file.
        sha256: hash of the .bin file, hexadecimal.
        counts_PV: number of occurrences of every token id in each part, int64 [parts, vocab_size].
    """

    contents: PairContents
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
    with ReadProgress(total, progress) as shown, ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(_scan, job, vocab_size, shown.add) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _scan(job: FileJob, vocab_size: int, count: Callable[[int], None]) -> FileScan:
    hasher = FileHasher()
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
            hasher.update(piece)
            tokens = np.frombuffer(piece, job.file.dtype)
            _check_ids(job, tokens, at, vocab_size)
            for part, (start, end) in enumerate(job.parts):
                inside = tokens[max(start - at, 0) : max(end - at, 0)]
                counts_PV[part] += np.bincount(inside, minlength=vocab_size)
            at += len(tokens)
            count(len(piece))
    data = hasher.hashes()
    return FileScan(PairContents.of(data, hash_file(idx_path(job.file.prefix))), data.sha256, counts_PV)


def _check_ids(job: FileJob, tokens: np.ndarray, at: int, vocab_size: int) -> None:
    if tokens.min() >= 0 and tokens.max() < vocab_size:
        return
    wrong = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    raise InputError(
        f"domain '{job.domain}': {bin_path(job.file.prefix)} holds the token id {tokens[wrong]} (its token {at + wrong}),"
        f" but the tokenizer's ids are 0 to {vocab_size - 1}. Give the tokenizer that the files were made with."
    )
