"""Token files in Megatron's ``.bin`` / ``.idx`` format: layout and reader (`writer` writes them).

    PREFIX.bin   the concatenated tokens of all documents, nothing else
    PREFIX.idx   "MMIDIDX\\0\\0" | version u64 = 1 | dtype code u8 | sequences u64 = S | bounds u64 = D + 1
                 | S lengths int32, in tokens | S pointers int64, bytes into .bin | D + 1 bounds int64, sequence numbers

All numbers are little-endian. Megatron may cut a document into several sequences; we write one sequence per document
and read both. Source of the format: ``megatron.core.datasets.indexed_dataset``, whose builder writes the same bytes for
the same documents.
"""

from __future__ import annotations

import bisect
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megamix.core.errors import InputError
from megamix.data.tokens.mapped_files import TOKEN_FILES, map_file

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

HEADER = struct.Struct("<9sQBQQ")
AT_ONCE = 1 << 20  # sequences checked together, so that memory does not grow with the index
_COPY_AGAIN = "The file was cut short or belongs to another one: copy both files again, or run `megamix prepare` again."


def bin_path(prefix: str | Path) -> Path:
    """The data file of ``prefix``, which may itself contain dots."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of ``prefix``, which may itself contain dots."""
    return Path(f"{prefix}.idx")


def pick_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's type of stored token ids: uint16 for vocabularies below 65500 entries, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class _Index(NamedTuple):
    """The columns of a mapped .idx; the last two for bisect."""

    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray
    sorted_pointers: Sequence[int]
    sorted_bounds: Sequence[int]


class IndexedTokens:
    """One ``.bin`` / ``.idx`` pair, memory-mapped when it is read (`megamix.data.tokens.mapped_files`).

    Args:
        prefix: path without ``.bin`` / ``.idx``.
        verify: compare every pointer with the lengths before it: one pass over the index, 12 bytes a sequence. File
            sizes are always checked.

    Raises:
        InputError: a file is missing or unreadable, is no index of version 1, or index and data disagree.
    """

    def __init__(self, prefix: str | Path, *, verify: bool = True) -> None:
        self.prefix = Path(prefix)
        self._owner = TOKEN_FILES.owner(self, "bin", "idx")
        self._bin, self._idx = bin_path(prefix), idx_path(prefix)
        data_bytes = _size(self._bin)
        index = map_file(self._idx)
        self.dtype, self.num_sequences, num_bounds = _read_header(self._idx, index)
        self.num_documents = num_bounds - 1
        columns = self._columns(index)
        self._check_sizes(columns, data_bytes)
        if verify:
            self._check_pointers(columns)
            self._check_bounds(columns)
        self._bin_bytes, self._idx_bytes = data_bytes, index.size
        self.num_tokens = data_bytes // self.dtype.itemsize

    def __reduce__(self) -> tuple[Any, ...]:
        # A memory map would pickle as a copy of its contents.
        return functools.partial(IndexedTokens, verify=False), (self.prefix,)

    @property
    def tokens(self) -> np.ndarray:
        """The whole stream, mapped read-only, [num_tokens] of ``dtype``."""
        return TOKEN_FILES.get((self._owner, "bin"), lambda: self._mapped(self._bin, self._bin_bytes).view(self.dtype))

    @property
    def _index(self) -> _Index:
        return TOKEN_FILES.get((self._owner, "idx"), lambda: self._columns(self._mapped(self._idx, self._idx_bytes)))

    def _mapped(self, path: Path, wanted: int) -> np.ndarray:
        mapped = map_file(path)
        if mapped.size != wanted:
            raise InputError(
                f"{path} holds {mapped.size} bytes, but held {wanted} when it was first looked at: it was changed. Put the "
                "old file back, and start again."
            )
        return mapped

    def _columns(self, index: np.ndarray) -> _Index:
        lengths_end = HEADER.size + 4 * self.num_sequences
        pointers_end = lengths_end + 8 * self.num_sequences
        pointers, bounds = index[lengths_end:pointers_end], index[pointers_end:]
        return _Index(
            index[HEADER.size : lengths_end].view("<i4"),
            pointers.view("<i8"),
            bounds.view("<i8"),
            _searchable(pointers),
            _searchable(bounds),
        )

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """First token of every document, int64 [num_documents] (8 bytes a document, built on first use)."""
        return self.starts_of(np.arange(self.num_documents))

    def starts_of(self, document_n: np.ndarray) -> np.ndarray:
        """First token of each of these documents, int64 [n]; document ``num_documents`` starts at the end."""
        index = self._index
        sequence_n = index.bounds[document_n]
        start_n = np.full(sequence_n.shape, self.num_tokens, np.int64)
        inside_n = sequence_n < self.num_sequences
        start_n[inside_n] = index.pointers[sequence_n[inside_n]] // self.dtype.itemsize
        return start_n

    def document_at(self, token: int) -> tuple[int, int]:
        """The document that holds token number ``token``, and the token's offset in it, in O(log documents) reads."""
        index = self._index
        sequence = bisect.bisect_right(index.sorted_pointers, token * self.dtype.itemsize) - 1
        document = bisect.bisect_right(index.sorted_bounds, sequence) - 1
        start = index.sorted_pointers[index.sorted_bounds[document]] // self.dtype.itemsize
        return document, token - start

    def document_from(self, sequence: int) -> int:
        """The first document that begins at or after a sequence."""
        return bisect.bisect_left(self._index.sorted_bounds, sequence, hi=self.num_documents)

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """First tokens of documents that begin in [start, stop), int64, in O(log documents) reads; an empty document
        begins where the next one does. Token ids and a document's division into sequences do not matter.
        """
        size, index = self.dtype.itemsize, self._index
        sequence = bisect.bisect_left(index.sorted_pointers, start * size)
        first = bisect.bisect_left(index.sorted_bounds, sequence)
        sequence = bisect.bisect_left(index.sorted_pointers, stop * size, sequence)
        end = bisect.bisect_left(index.sorted_bounds, sequence, first)
        return index.pointers[index.bounds[first:end]] // size

    def _check_sizes(self, index: _Index, data_bytes: int) -> None:
        wanted = 0
        if self.num_sequences:
            wanted = int(index.pointers[-1]) + int(index.lengths[-1]) * self.dtype.itemsize
        if wanted != data_bytes:
            raise InputError(
                f"{bin_path(self.prefix)} holds {data_bytes} bytes, but its index {idx_path(self.prefix).name} expects"
                f" {wanted} bytes ({self.num_sequences} sequences of {self.dtype.name}). {_COPY_AGAIN}"
            )

    def _check_pointers(self, index: _Index) -> None:
        wanted = 0
        for start in range(0, self.num_sequences, AT_ONCE):
            lengths = index.lengths[start : start + AT_ONCE].astype(np.int64) * self.dtype.itemsize
            ends = wanted + np.cumsum(lengths)
            seen = index.pointers[start : start + AT_ONCE]
            wrong = np.flatnonzero((seen != ends - lengths) | (lengths < 0))
            if wrong.size:
                at = int(wrong[0])
                raise InputError(
                    f"{idx_path(self.prefix)}: sequence {start + at}, {int(index.lengths[start + at])} tokens long, has"
                    f" the pointer {int(seen[at])}; the lengths before it put it at byte {int(ends[at] - lengths[at])}."
                    f" {_COPY_AGAIN}"
                )
            wanted = int(ends[-1])

    def _check_bounds(self, index: _Index) -> None:
        first, last = int(index.bounds[0]), int(index.bounds[-1])
        rising = all(
            bool(np.all(np.diff(index.bounds[start : start + AT_ONCE + 1]) >= 0))
            for start in range(0, self.num_documents, AT_ONCE)
        )
        if first != 0 or last != self.num_sequences or not rising:
            raise InputError(
                f"{idx_path(self.prefix)}: the document bounds run from {first} to {last}"
                f"{'' if rising else ' and fall on the way'}, expected rising numbers from 0 to {self.num_sequences}."
                f" {_COPY_AGAIN}"
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}. Check the path, or run `megamix prepare`."
        ) from error


def _searchable(column: np.ndarray) -> Sequence[int]:
    """An int64 column of the index for bisect: np.searchsorted would copy the unaligned column whole, and an element of
    a memoryview costs less than half of an array's."""
    return column.data.cast("q") if column.size else ()


def _read_header(path: Path, index: np.ndarray) -> tuple[np.dtype[Any], int, int]:
    """Dtype, number of sequences and number of document bounds, checked against the size of the file."""
    size, head = index.size, index[: HEADER.size].tobytes()
    if head[: len(MAGIC)] != MAGIC:
        raise InputError(
            f"{path} is not a Megatron index: it begins with {head[: len(MAGIC)]!r} ({size} bytes in all), expected"
            f" {MAGIC!r}. Check that the prefix names a .bin/.idx pair."
        )
    if len(head) < HEADER.size:
        raise InputError(f"{path} holds {size} bytes, expected at least {HEADER.size}. {_COPY_AGAIN}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != VERSION:
        raise InputError(
            f"{path} has version {version}, expected {VERSION}. Write it again with a current Megatron or megamix."
        )
    if code not in DTYPE_OF_CODE:
        raise InputError(f"{path} has the dtype code {code}, expected one of {sorted(DTYPE_OF_CODE)}. {_COPY_AGAIN}")
    wanted = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if size != wanted or num_bounds < 1:
        raise InputError(
            f"{path} holds {size} bytes, expected {wanted} for {num_sequences} sequences and {num_bounds} document"
            f" bounds. {_COPY_AGAIN}"
        )
    return DTYPE_OF_CODE[code], num_sequences, num_bounds
