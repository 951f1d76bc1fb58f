"""What the ending of an input file's name says is in it, and the bytes of a compressed one, in bounded memory.

Endings are told in capital letters as well (``.JSONL``, ``.TXT.GZ``).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from megamix.prepare.storage import Url, is_url

MAX_DOCUMENT_BYTES = 1 << 30
"""A longer line or .txt file is refused: a document has to fit in memory several times over. A compressed file may ask
for no larger window."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
LINES = (".jsonl", ".ndjson")
TAR = (".tar", *(".tar" + packed for packed in COMPRESSED), ".tgz")
# A folder may hold other files, such as a report in .json.
IN_FOLDERS = (
    *(lines + packed for lines in LINES for packed in ("", *COMPRESSED)),
    *(".parquet", ".arrow", ".txt"),
    *TAR,
)
READABLE = (*IN_FOLDERS, ".json", *(".json" + packed for packed in COMPRESSED))
IN_FOLDERS_SAID = f"{' or '.join(LINES)} (also {', '.join(COMPRESSED)}), .parquet, .arrow, .tar, .txt"
"""The same for people."""
MAGIC = {
    ".gz": b"\x1f\x8b",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh91AY&SY",
    ".xz": b"\xfd7zXZ\x00",
    ".parquet": b"PAR1",
    ".arrow": b"ARROW1",
    ".zip": b"PK\x03\x04",
}
"""How files of a kind begin."""
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError)
"""What `decompressed` raises for a stream that is damaged or cut short."""
_READ_BYTES = 1 << 18
_ZSTD_BYTES = 1 << 9  # at most 22 MB of text


Kind = Literal["lines", "whole", "rows", "members"]
"""Documents of a file: its lines, itself, rows of a table, or files in an archive."""


def kind_of(path: str | Path, text_files: Sequence[str] = ()) -> Kind:
    """What the documents of a file are; a file whose name fits a pattern of ``text_files`` is one document."""
    if is_text_file(path, text_files) or ending(path, (".txt",)):
        return "whole"
    if ending(path, (".parquet", ".arrow")):
        return "rows"
    return "members" if ending(path, TAR) else "lines"


def is_text_file(path: str | Path, text_files: Sequence[str]) -> bool:
    """Whether a file's name fits one of the patterns, such as ``*.py``."""
    return any(fnmatchcase(name_of(path), pattern) for pattern in text_files)


def name_of(path: str | Path) -> str:
    """The last part of a path or an address."""
    return Url(path).name if is_url(str(path)) else Path(path).name


def ending(path: str | Path, known: Sequence[str]) -> str | None:
    """The ending of the file's name, as it is written there, if it is one of ``known``."""
    name = name_of(path)
    return next((name[-len(one) :] for one in known if name.lower().endswith(one)), None)


def is_compressed(path: str | Path) -> bool:
    return ending(path, (*COMPRESSED, ".tgz")) is not None


def decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most some MB, decompressed if its name says that it is compressed.

    Raises:
        DAMAGED: As its errors say; and `OSError` where the file cannot be read.
    """
    packed = (ending(path, (*COMPRESSED, ".tgz")) or "").lower()
    if packed in (".gz", ".tgz"):
        stream = gzip.GzipFile(fileobj=file)
        while data := stream.read1(_READ_BYTES):
            yield data
    elif packed == ".bz2":
        yield from _bz2(file)
    elif packed == ".xz":
        yield from _xz(file)
    elif packed == ".zst":
        yield from _zstd(file)
    else:
        while data := file.read(_READ_BYTES):
            yield data


def _bz2(file: BinaryIO) -> Iterator[bytes]:
    stream = bz2.BZ2File(file)
    try:
        while data := stream.read(_READ_BYTES):
            yield data
    except OSError as error:
        if error.errno is not None:
            raise
        raise EOFError(str(error)) from error  # of its data, not of the disk


def _xz(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses all streams. Unlike `lzma.LZMAFile` it does not take whatever memory a file asks for."""
    data, decompressor = file.read(_READ_BYTES), None
    while data or decompressor is not None:
        if decompressor is None:
            data = data.lstrip(b"\0")  # padding between streams
            decompressor = lzma.LZMADecompressor(memlimit=MAX_DOCUMENT_BYTES) if data else None
        if decompressor is not None:
            if text := decompressor.decompress(data, _READ_BYTES):
                yield text
            data = b""
            if decompressor.eof:
                data, decompressor = decompressor.unused_data, None
        if not data and (decompressor is None or decompressor.needs_input):
            data = file.read(_READ_BYTES)
            if not data and decompressor is not None:
                raise EOFError("the last stream has no end")


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses all frames. zstandard's own reader takes a cut frame for the end of the file.

    The input goes in by small pieces: one block of 3 bytes may stand for 128 KiB of text.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_DOCUMENT_BYTES)
    frame = None
    while data := file.read(_ZSTD_BYTES):
        while data:
            frame = decompressor.decompressobj(write_size=_READ_BYTES << 2) if frame is None or frame.eof else frame
            if text := frame.decompress(data):
                yield text
            data = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise EOFError("the last frame has no end")
