"""Token files in Megatron's ``.bin`` / ``.idx`` format: reading and writing.

    PREFIX.bin   the tokens of all documents, one after the other, nothing else
    PREFIX.idx   "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 = S | bounds u64 = D + 1
                 | S lengths int32, in tokens | S pointers int64, bytes into .bin | D + 1 bounds int64, sequence numbers

All numbers are little-endian. Megatron may cut a document into several sequences; this module writes one sequence per
document and reads both. Source of the format: ``megatron.core.datasets.indexed_dataset``, whose builder writes the
same bytes for the same documents.
"""

from __future__ import annotations

import bisect
import errno
import functools
import hashlib
import mmap
import os
import resource
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megamix.errors import InputError
from megamix.files import sync_folder

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

_HEADER = struct.Struct("<9sQBQQ")
_CHECK_AT_ONCE = (
    1 << 20
)  # sequences looked at together, so that checking an index takes the same memory whatever its size
_COPY_AGAIN = "The file was cut short or belongs to another one: copy both files again, or run `megamix prepare` again."


def bin_path(prefix: str | Path) -> Path:
    """The data file of ``prefix``, which may itself contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of ``prefix``, which may itself contain dots."""
    return Path(f"{prefix}.idx")


def pick_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores token ids of this vocabulary in: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedTokens:
    """One ``.bin`` / ``.idx`` pair, memory-mapped.

    Args:
        prefix: Path without ``.bin`` / ``.idx``.
        verify: Compare every pointer with the lengths before it: one pass over the index, 12 bytes a sequence. File
            sizes are checked in any case.

    Attributes:
        dtype: Type of a token in the file.
        num_tokens: Tokens in the file.
        num_documents: Documents in the file.
        tokens: The whole stream, mapped read-only, [num_tokens] of ``dtype``.

    Raises:
        InputError: A file is missing or unreadable, is no index of version 1, or index and data disagree.
    """

    def __init__(self, prefix: str | Path, *, verify: bool = True) -> None:
        self.prefix = Path(prefix)
        self._verify = verify
        data, index = _map(bin_path(prefix)), _map(idx_path(prefix))
        self.dtype, self.num_sequences, num_bounds = _read_header(idx_path(prefix), index)
        self.num_documents = num_bounds - 1
        lengths_end = _HEADER.size + 4 * self.num_sequences
        pointers_end = lengths_end + 8 * self.num_sequences
        self._lengths = index[_HEADER.size : lengths_end].view("<i4")
        self._pointers = index[lengths_end:pointers_end].view("<i8")
        self._bounds = index[pointers_end:].view("<i8")
        self._sorted_pointers = _searchable(index[lengths_end:pointers_end])
        self._sorted_bounds = _searchable(index[pointers_end:])
        self._check_sizes(data.size)
        if verify:
            self._check_pointers()
            self._check_bounds()
        self.num_tokens = data.size // self.dtype.itemsize
        self.tokens: np.ndarray = data.view(self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map pickles as a copy of its contents; a loader process opens the files itself instead.
        return functools.partial(IndexedTokens, verify=False), (self.prefix,)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """First token of every document, int64 [num_documents] (8 bytes a document, built on first use)."""
        return self.starts_of(np.arange(self.num_documents))

    def starts_of(self, document_n: np.ndarray) -> np.ndarray:
        """First token of each of these documents, int64 [n]; document ``num_documents`` starts at the end."""
        sequence_n = self._bounds[document_n]
        start_n = np.full(sequence_n.shape, self.num_tokens, np.int64)
        inside_n = sequence_n < self.num_sequences
        start_n[inside_n] = self._pointers[sequence_n[inside_n]] // self.dtype.itemsize
        return start_n

    def document_at(self, token: int) -> tuple[int, int]:
        """The document that holds token number ``token``, and the token's offset in it, in O(log documents) reads."""
        sequence = bisect.bisect_right(self._sorted_pointers, token * self.dtype.itemsize) - 1
        document = bisect.bisect_right(self._sorted_bounds, sequence) - 1
        start = self._sorted_pointers[self._sorted_bounds[document]] // self.dtype.itemsize
        return document, token - start

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """Where in [start, stop) documents begin, int64, one token a document, in O(log documents) reads; an empty
        document begins where the next one does.

        Documents are taken from the index: neither token ids nor the cuts between a document's sequences matter.
        """
        size = self.dtype.itemsize
        sequence = bisect.bisect_left(self._sorted_pointers, start * size)
        first = bisect.bisect_left(self._sorted_bounds, sequence)
        sequence = bisect.bisect_left(self._sorted_pointers, stop * size, sequence)
        end = bisect.bisect_left(self._sorted_bounds, sequence, first)
        return self._pointers[self._bounds[first:end]] // size

    def _check_sizes(self, data_bytes: int) -> None:
        wanted = 0
        if self.num_sequences:
            wanted = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if wanted != data_bytes:
            raise InputError(
                f"{bin_path(self.prefix)} holds {data_bytes} bytes, but its index {idx_path(self.prefix).name} expects"
                f" {wanted} bytes ({self.num_sequences} sequences of {self.dtype.name}). {_COPY_AGAIN}"
            )

    def _check_pointers(self) -> None:
        wanted = 0
        for start in range(0, self.num_sequences, _CHECK_AT_ONCE):
            lengths = self._lengths[start : start + _CHECK_AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = wanted + np.cumsum(lengths)
            seen = self._pointers[start : start + _CHECK_AT_ONCE]
            wrong = np.flatnonzero((seen != ends - lengths) | (lengths < 0))
            if wrong.size:
                at = int(wrong[0])
                raise InputError(
                    f"{idx_path(self.prefix)}: sequence {start + at}, {int(self._lengths[start + at])} tokens long, has"
                    f" the pointer {int(seen[at])}; the lengths before it put it at byte {int(ends[at] - lengths[at])}."
                    f" {_COPY_AGAIN}"
                )
            wanted = int(ends[-1])

    def _check_bounds(self) -> None:
        first, last = int(self._bounds[0]), int(self._bounds[-1])
        rising = all(
            bool(np.all(np.diff(self._bounds[start : start + _CHECK_AT_ONCE + 1]) >= 0))
            for start in range(0, self.num_documents, _CHECK_AT_ONCE)
        )
        if first != 0 or last != self.num_sequences or not rising:
            raise InputError(
                f"{idx_path(self.prefix)}: the document bounds run from {first} to {last}"
                f"{'' if rising else ' and fall on the way'}, expected rising numbers from 0 to {self.num_sequences}."
                f" {_COPY_AGAIN}"
            )


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [size], read as they are needed.

    Not an `np.memmap`, of which every slice costs several times what it does of an array, and opening twice as much.
    """
    _allow_more_files()
    try:
        with open(path, "rb") as file:
            # An empty file cannot be mapped.
            if os.fstat(file.fileno()).st_size == 0:
                return np.empty(0, np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        advice = "Check the path, or run `megamix prepare`."
        if error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            advice = f"Both files of every prefix stay open, and this process may open {limit}: raise `ulimit -n`."
        raise InputError(f"cannot read {path}: {error.strerror or error}. {advice}") from error


def _searchable(column: np.ndarray) -> Sequence[int]:
    """The int64 numbers of a column of the index, for bisect.

    Not for np.searchsorted: the header's length leaves the columns unaligned, and numpy would copy them whole. An
    element of a memoryview costs less than half of what it does of an array.
    """
    return column.data.cast("q") if column.size else ()


def _allow_more_files() -> None:
    """Raises the process's soft limit of open files to the hard one.

    Python keeps a file open for as long as it is mapped. Corpora have more files than the usual soft limit of 1024, and
    whatever else the process opens would be the first to fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _read_header(path: Path, index: np.ndarray) -> tuple[np.dtype[Any], int, int]:
    """Returns dtype, number of sequences and number of document bounds; checks them against the size of the file."""
    size, head = index.size, index[: _HEADER.size].tobytes()
    if head[: len(MAGIC)] != MAGIC:
        raise InputError(
            f"{path} is not a Megatron index: it begins with {head[: len(MAGIC)]!r} ({size} bytes in all), expected"
            f" {MAGIC!r}. Check that the prefix names a .bin/.idx pair."
        )
    if len(head) < _HEADER.size:
        raise InputError(f"{path} holds {size} bytes, expected at least {_HEADER.size}. {_COPY_AGAIN}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != VERSION:
        raise InputError(
            f"{path} has version {version}, expected {VERSION}. Write it again with a current Megatron or megamix."
        )
    if code not in DTYPE_OF_CODE:
        raise InputError(f"{path} has the dtype code {code}, expected one of {sorted(DTYPE_OF_CODE)}. {_COPY_AGAIN}")
    wanted = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size != wanted or num_bounds < 1:
        raise InputError(
            f"{path} holds {size} bytes, expected {wanted} for {num_sequences} sequences and {num_bounds} document"
            f" bounds. {_COPY_AGAIN}"
        )
    return DTYPE_OF_CODE[code], num_sequences, num_bounds


@dataclass(frozen=True)
class WrittenTokens:
    """What an `IndexedWriter` has written."""

    tokens: int
    """Tokens in the file."""
    documents: int
    """Documents in the file."""
    max_token: int
    """Largest token id; -1 in an empty file."""
    sha256: str
    """Of the ``.bin`` file, hexadecimal."""


class IndexedWriter:
    """Writes documents to ``prefix.bin`` / ``prefix.idx``; the final names appear on `close`, complete, or never.

    As a context manager it closes on success and aborts on an exception. An existing pair is replaced. Its memory does
    not grow with what is written.

    A writer can take up what an earlier one left when its process died: whatever that one had flushed with `sync` is
    kept, the rest cut off.

    Args:
        prefix: Path without suffix; its folder must exist.
        dtype: Type of a token, one of the eight of the format.
        kept: Tokens and documents of an earlier writer to go on after.
        seen: Is given all kept tokens in order, in pieces.

    Raises:
        FileNotFoundError: The earlier writer's files are gone or hold less than ``kept``.
    """

    def __init__(
        self,
        prefix: str | Path,
        dtype: Any,
        *,
        kept: tuple[int, int] = (0, 0),
        seen: Callable[[np.ndarray], None] = lambda tokens: None,
    ) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            known = ", ".join(known.name for known in CODE_OF_DTYPE)
            raise InputError(f"tokens cannot be stored as {self.dtype.name}. Use one of: {known}.")
        self._hash = hashlib.sha256()
        self._max_token = -1
        self._num_tokens, self._num_documents = kept
        self._written: WrittenTokens | None = None
        self._temporary = {suffix: Path(f"{prefix}.{suffix}.tmp") for suffix in ("bin", "idx")}
        again = any(kept)
        if again:
            self._check_kept()
        # The index begins with the lengths, after a header that is written last.
        self._data = open(self._temporary["bin"], "r+b" if again else "wb")  # noqa: SIM115 - lives as long as the writer
        self._index = open(self._temporary["idx"], "r+b" if again else "wb")  # noqa: SIM115
        if again:
            self._read_kept(seen)
        self._index.truncate(_HEADER.size + 4 * self._num_documents)
        self._index.seek(0, os.SEEK_END)

    def _check_kept(self) -> None:
        sizes = {"bin": self._num_tokens * self.dtype.itemsize, "idx": _HEADER.size + 4 * self._num_documents}
        for suffix, size in sizes.items():
            final = Path(f"{self.prefix}.{suffix}")
            if not self._temporary[suffix].exists():
                os.replace(final, self._temporary[suffix])  # it died between the renames of `close`
            if self._temporary[suffix].stat().st_size < size:
                raise FileNotFoundError(errno.ENOENT, "holds less than was kept", str(self._temporary[suffix]))

    def _read_kept(self, seen: Callable[[np.ndarray], None]) -> None:
        left = self._num_tokens
        while left:
            tokens = np.fromfile(self._data, self.dtype, min(left, _CHECK_AT_ONCE))
            self._hash.update(tokens)
            self._max_token = max(self._max_token, int(tokens.max()))
            seen(tokens)
            left -= len(tokens)
        self._data.seek(self._num_tokens * self.dtype.itemsize)
        self._data.truncate()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add_document(self, tokens: Any) -> None:
        """Appends one document, any integer sequence or array [length]."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: Any, lengths: Any) -> None:
        """Appends several documents at once.

        Args:
            tokens: Their tokens one after the other, integers [sum(lengths)].
            lengths: Tokens of each document, integers [documents].

        Raises:
            InputError: A token does not fit the dtype.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        if lengths.sum() != len(tokens):
            raise ValueError(f"lengths add up to {lengths.sum()}, but {len(tokens)} tokens were given")
        if len(tokens):
            low, high = tokens.min(), tokens.max()
            if self.dtype.kind in "iu" and not np.iinfo(self.dtype).min <= low <= high <= np.iinfo(self.dtype).max:
                raise InputError(
                    f"{self.prefix}: tokens from {low} to {high} do not fit {self.dtype.name}"
                    f" (0 to {np.iinfo(self.dtype).max}). Use int32, or a smaller vocabulary."
                )
            self._max_token = max(self._max_token, int(high))
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        self._data.write(data.data)
        self._hash.update(data)
        self._index.write(lengths.astype("<i4").tobytes())
        self._num_tokens += len(tokens)
        self._num_documents += len(lengths)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return self._num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens added so far."""
        return self._num_tokens

    def sync(self) -> None:
        """Flushes everything added so far to disk, for a later writer to keep."""
        for file in (self._data, self._index):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> WrittenTokens:
        """Writes the index, flushes both files to disk and gives them their names. Closing again only answers again."""
        if self._written is not None:
            return self._written
        with self._data, self._index:
            self._index.flush()
            self._finish_index()
            self.sync()
        # An index under its final name always has its own data beside it: the old goes first, the new comes last.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary["bin"], bin_path(self.prefix))
        os.replace(self._temporary["idx"], idx_path(self.prefix))
        sync_folder(self.prefix.parent)
        self._written = WrittenTokens(self._num_tokens, self.num_documents, self._max_token, self._hash.hexdigest())
        return self._written

    def abort(self) -> None:
        """Removes the temporary files; whatever stood under the final names stays."""
        self.leave()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Closes the temporary files and leaves them as they are, for a later writer to keep."""
        self._data.close()
        self._index.close()

    def _finish_index(self) -> None:
        """Adds pointers and bounds to the lengths, and then the header."""
        pointer = 0
        with open(self._temporary["idx"], "rb") as file:
            file.seek(_HEADER.size)
            for start in range(0, self._num_documents, _CHECK_AT_ONCE):
                lengths = np.fromfile(file, "<i4", min(_CHECK_AT_ONCE, self._num_documents - start))
                sizes = lengths.astype(np.int64) * self.dtype.itemsize
                ends = pointer + np.cumsum(sizes)
                self._index.write((ends - sizes).astype("<i8").tobytes())
                pointer = int(ends[-1])
        for start in range(0, self._num_documents + 1, _CHECK_AT_ONCE):
            stop = min(start + _CHECK_AT_ONCE, self._num_documents + 1)
            self._index.write(np.arange(start, stop, dtype="<i8").tobytes())
        self._index.seek(0)
        counts = (self._num_documents, self._num_documents + 1)
        self._index.write(_HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype], *counts))
