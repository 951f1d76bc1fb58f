"""Writer of token files in Megatron's format (`megamix.data.tokens.indexed`), which can continue after a kill."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.files import sync_folder
from megamix.data.tokens.hashes import FileHasher, FileHashes, hash_file
from megamix.data.tokens.indexed import AT_ONCE, CODE_OF_DTYPE, HEADER, MAGIC, VERSION, bin_path, idx_path


@dataclass(frozen=True)
class WrittenTokens:
    """Contents of a finished pair of token files."""

    tokens: int
    documents: int
    max_token: int
    """Largest token id; -1 in an empty file."""
    data: FileHashes
    """Of the ``.bin`` file."""
    index: FileHashes
    """Of the ``.idx`` file."""

    @property
    def sha256(self) -> str:
        """Hash of the whole ``.bin`` file, hexadecimal."""
        return self.data.sha256


class IndexedWriter:
    """Writes documents to ``prefix.bin`` / ``prefix.idx``, in bounded memory; whole files take these names on `close`.

    As a context manager it closes on success and aborts on an exception. An existing pair is replaced.

    A writer can continue the files of an earlier one whose process died: tokens flushed with `sync` are kept, the rest
    is truncated.

    Args:
        prefix: path without suffix; its folder must exist.
        dtype: type of a token, one of the eight of the format.
        kept: tokens and documents of an earlier writer to keep.
        seen: called with all kept tokens in order, in pieces.

    Raises:
        FileNotFoundError: the earlier writer's files are gone or hold less than ``kept``.
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
        self._hash = FileHasher()
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
        self._index.truncate(HEADER.size + 4 * self._num_documents)
        self._index.seek(0, os.SEEK_END)

    def _check_kept(self) -> None:
        sizes = {"bin": self._num_tokens * self.dtype.itemsize, "idx": HEADER.size + 4 * self._num_documents}
        for suffix, size in sizes.items():
            final = Path(f"{self.prefix}.{suffix}")
            if not self._temporary[suffix].exists():
                os.replace(final, self._temporary[suffix])  # it died between the renames of `close`
            if self._temporary[suffix].stat().st_size < size:
                raise FileNotFoundError(errno.ENOENT, "holds less than was kept", str(self._temporary[suffix]))

    def _read_kept(self, seen: Callable[[np.ndarray], None]) -> None:
        left = self._num_tokens
        while left:
            tokens = np.fromfile(self._data, self.dtype, min(left, AT_ONCE))
            self._hash.update(tokens.data)
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
            tokens: concatenated documents, integers [sum(lengths)].
            lengths: tokens of each document, integers [documents].

        Raises:
            InputError: a token does not fit the dtype.
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
        self._hash.update(data.data)
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
        """Flushes everything added so far to disk; a later writer can keep it."""
        for file in (self._data, self._index):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> WrittenTokens:
        """Writes the index, flushes both files to disk and renames them. Closing again only returns the result."""
        if self._written is not None:
            return self._written
        with self._data, self._index:
            self._index.flush()
            _finish_index(self._temporary["idx"], self._index, self.dtype, self._num_documents)
            self.sync()
        index = hash_file(self._temporary["idx"])
        # An index under its final name always has its own data beside it: the old goes first, the new comes last.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary["bin"], bin_path(self.prefix))
        os.replace(self._temporary["idx"], idx_path(self.prefix))
        sync_folder(self.prefix.parent)
        self._written = WrittenTokens(self._num_tokens, self.num_documents, self._max_token, self._hash.hashes(), index)
        return self._written

    def abort(self) -> None:
        """Removes the temporary files; files under the final names stay."""
        self.leave()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def leave(self) -> None:
        """Closes the temporary files for a later writer."""
        self._data.close()
        self._index.close()


def write_index(prefix: str | Path, dtype: Any, lengths: Iterable[np.ndarray]) -> int:
    """Writes ``prefix.idx`` for tokens that lie in ``prefix.bin`` already, in bounded memory; whole or not at all.

    Args:
        dtype: type of a token, one of the eight of the format.
        lengths: tokens of each document, integers, in pieces.

    Returns:
        The number of documents.
    """
    temporary, num_documents = Path(f"{prefix}.idx.tmp"), 0
    try:
        with open(temporary, "wb") as file:
            file.truncate(HEADER.size)
            file.seek(HEADER.size)
            for piece in lengths:
                file.write(np.asarray(piece).astype("<i4").tobytes())
                num_documents += len(piece)
            file.flush()
            _finish_index(temporary, file, np.dtype(dtype).newbyteorder("<"), num_documents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, idx_path(prefix))
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(Path(prefix).parent)
    return num_documents


def _finish_index(path: Path, index: IO[bytes], dtype: np.dtype[Any], num_documents: int) -> None:
    """Adds pointers and bounds after the lengths, then the header, to ``index``, the file of ``path``."""
    pointer = 0
    with open(path, "rb") as file:
        file.seek(HEADER.size)
        for start in range(0, num_documents, AT_ONCE):
            lengths = np.fromfile(file, "<i4", min(AT_ONCE, num_documents - start))
            sizes = lengths.astype(np.int64) * dtype.itemsize
            ends = pointer + np.cumsum(sizes)
            index.write((ends - sizes).astype("<i8").tobytes())
            pointer = int(ends[-1])
    for start in range(0, num_documents + 1, AT_ONCE):
        stop = min(start + AT_ONCE, num_documents + 1)
        index.write(np.arange(start, stop, dtype="<i8").tobytes())
    index.seek(0)
    index.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], num_documents, num_documents + 1))
