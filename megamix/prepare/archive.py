"""Members of tar files (WebDataset's shards), read in order in bounded memory. Nothing is unpacked to disk.

Headers are parsed one by one: tarfile takes a damaged header in the middle for the end of the archive, and headers of
any size into memory.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megamix.core.errors import InputError
from megamix.prepare.kinds import MAX_DOCUMENT_BYTES

_BLOCK = tarfile.BLOCKSIZE
_MOST_HEADER_BYTES = 1 << 20  # of names and other attributes of a member
_LONG_NAME, _ATTRIBUTES, _SPARSE = b"L", b"x", b"S"
_HEADERS = (_LONG_NAME, b"K", _ATTRIBUTES, b"X", b"g")
_FILES = (b"0", b"\0", b"7")


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    data: bytes


def members(pieces: Iterable[bytes], path: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """The wanted files of an archive.

    Args:
        pieces: The archive's bytes, decompressed.
        wanted: Whether to read the file of a name; others are passed over.

    Raises:
        InputError: The archive is damaged or cut short, or a file in it is too long or sparse.
    """
    source = _Bytes(pieces, path)
    name: str | None = None
    size: int | None = None
    while True:
        header = source.take(_BLOCK)
        if header == bytes(_BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise source.damaged(str(error)) from error
        if info.type in _HEADERS:
            if info.size > _MOST_HEADER_BYTES:
                raise source.damaged(f"a header of {info.size:,} bytes")
            data = source.take(info.size, padded=True)
            if info.type == _LONG_NAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type in (_ATTRIBUTES, b"X"):
                attributes = _attributes(data, source)
                name = attributes.get("path", name)
                size = int(attributes["size"]) if attributes.get("size", "").isdecimal() else size
                if any(key.startswith("GNU.sparse") for key in attributes):
                    raise InputError(f"{path} holds a sparse file. Pack it anew, without sparse files.")
            continue
        if info.type == _SPARSE:
            raise InputError(f"{path} holds the sparse file {info.name}. Pack it anew, without sparse files.")
        here, length = name or info.name, info.size if size is None else size
        name = size = None
        if length < 0:
            raise source.damaged("a file of negative size")
        if info.type in _FILES and wanted(here):
            if length > MAX_DOCUMENT_BYTES:
                raise InputError(
                    f"{path}, {here}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most a document may have. Split it."
                )
            yield Member(here, source.take(length, padded=True))
        elif info.isreg() or info.type not in tarfile.SUPPORTED_TYPES:
            source.skip(-(-length // _BLOCK) * _BLOCK)


def _attributes(data: bytes, source: _Bytes) -> dict[str, str]:
    """The records ``length key=value`` of an extended header."""
    found: dict[str, str] = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(data):
            raise source.damaged("an extended header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return found


class _Bytes:
    """Bytes that come in pieces, taken in order."""

    def __init__(self, pieces: Iterable[bytes], path: str) -> None:
        self._pieces, self._path = iter(pieces), path
        self._held, self._at, self._done = memoryview(b""), 0, 0

    def take(self, size: int, *, padded: bool = False) -> bytes:
        """The next bytes; ``padded``: and passes over what fills the last block."""
        parts, left = [], size
        while left:
            part = self._next(left)
            parts.append(part)
            left -= len(part)
        if padded:
            self.skip(-size % _BLOCK)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Passes over bytes."""
        while size:
            size -= len(self._next(size))

    def damaged(self, what: str) -> InputError:
        """The error for what is wrong here."""
        return InputError(f"{self._path}: the archive is damaged at byte {self._done} ({what}). Fetch it again.")

    def _next(self, most: int) -> memoryview:
        while self._at == len(self._held):
            piece = next(self._pieces, None)
            if piece is None:
                raise self.damaged("it ends there")
            self._held, self._at = memoryview(piece), 0
        part = self._held[self._at : self._at + most]
        self._at += len(part)
        self._done += len(part)
        return part
