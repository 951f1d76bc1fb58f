"""The documents of the input files, a block at a time.

    pieces_of(file)           what can be read by itself: a file, or a row group of a parquet file
    read_piece(piece)         its blocks, about a megabyte of text each, not decoded: cheap, so one process feeds many
    Block.documents(text_key) the texts of a block and their places: UTF-8 and JSON are decoded here, in any process

A ``.txt`` file is one document. A ``.parquet`` file holds one document a row, all others one JSON object a line. Damage
is an `InputError` with file and line (or row). Borders of blocks depend on the file and the block size alone.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard

from megamix.core.errors import InputError
from megamix.prepare import parquet

TEXT_KEY = "text"
BLOCK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 30
"""A longer line or .txt file is refused: a document has to fit in memory several times over."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 18
_COMPRESSED = (".gz", ".zst")
_DAMAGED_STREAM = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Documents:
    """The documents of a block, in order; empty ones too."""

    texts: list[str]
    """The text of each."""
    places: np.ndarray
    """Where each begins: bytes of text, decompressed, or rows that lie before it in its file, int64 [documents]."""


@dataclass(frozen=True)
class Block:
    """Some consecutive documents of one file, not decoded yet. Small to pickle."""

    path: str
    """The file."""
    file: int
    """Its number in the domain, from 0."""
    position: tuple[int, int]
    """Number of the piece among those that are read, and of the block in it; blocks left out are counted."""
    start: int
    """Bytes of text, decompressed, or rows before the block."""
    stop: int
    """Where the block ends; lines that begin before belong to it. Of meaning only where ``data`` is None."""
    file_bytes: int
    """Bytes of the file, as it lies on the disk, that the block accounts for."""
    data: bytes | None = None
    """The text: whole lines, or the rows one after the other; None where `documents` reads it from the file."""
    row_bytes: np.ndarray | None = None
    """Of a parquet block, the bytes of each row in ``data``, int64 [documents]."""

    def documents(self, text_key: str = TEXT_KEY) -> Documents:
        """Decodes the block.

        Raises:
            InputError: Invalid UTF-8 or JSON, a line without a text or beyond `MAX_DOCUMENT_BYTES`, or an unreadable
                file; the message names file and line.
        """
        try:
            if self.row_bytes is not None:
                return self._rows(self.row_bytes)
            if self.path.endswith(".txt"):
                return self._whole()
            start, data = self._lines()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}. Check the file.") from error
        lines = data.split(b"\n")
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        starts = start + np.cumsum(sizes + 1) - sizes - 1
        if start == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        held = [number for number, line in enumerate(lines) if line and not line.isspace()]
        return Documents([self._text(lines[n], int(starts[n]), text_key) for n in held], starts[held])

    def _rows(self, row_bytes: np.ndarray) -> Documents:
        assert self.data is not None
        texts: list[str] = []
        at = 0
        for number, size in enumerate(row_bytes.tolist()):
            try:
                texts.append(self.data[at : at + size].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(_not_utf8(f"{self.path}, row {self.start + number + 1}", error)) from error
            at += size
        return Documents(texts, np.arange(self.start, self.start + len(texts)))

    def _whole(self) -> Documents:
        with open(self.path, "rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1).removeprefix(_BYTE_ORDER_MARK)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(_too_long(f"{self.path}: the file is one document"))
        try:
            return Documents([data.decode("utf-8")], np.zeros(1, np.int64))
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise InputError(_not_utf8(f"{self.path}, line {line}", error)) from error

    def _lines(self) -> tuple[int, bytes]:
        """The lines that begin in [start, stop), and where the first of them begins."""
        if self.data is not None:
            return self.start, self.data
        start, skipped = self.start, b""
        with open(self.path, "rb") as file:
            if start:
                file.seek(start - 1)
                skipped = file.readline(MAX_DOCUMENT_BYTES + 1)  # the rest of a line that began earlier
                start += len(skipped) - 1
            data = file.read(max(self.stop - start, 0))
            rest = b""
            if data and not data.endswith(b"\n"):
                rest = file.readline(MAX_DOCUMENT_BYTES + 1)
        if max(len(skipped), len(rest)) > MAX_DOCUMENT_BYTES:
            raise InputError(_too_long(self._where(start if rest else self.start)))
        return start, data + rest

    def _where(self, place: int) -> str:
        """The line at ``place``, in words. The file is read again for its number, which only errors need."""
        return f"{self.path}, line {_lines_before(self.path, place) + 1}"

    def _text(self, line: bytes, place: int, text_key: str) -> str:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(self._where(place), error)) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{self._where(place)}: not valid JSON ({error}). Expected one JSON object a line."
            ) from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(_no_text(self._where(place), record, text_key))
        if b"\\u" in line:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{self._where(place)}: the escape \\u{ord(text[error.start]):04x} is half of a character (a lone"
                    " surrogate). Fix or remove the line."
                ) from error
        return text


def _no_text(where: str, record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"{where}: holds {type(record).__name__}, expected an object with the key '{text_key}'."
    if text_key not in record:
        seen = ", ".join(sorted(record)[:8]) or "none"
        return f"{where}: no key '{text_key}' (keys: {seen}). Fix the line, or choose another key."
    return f"{where}: '{text_key}' is {type(record[text_key]).__name__}, expected a string. Fix the line."


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where}: not valid UTF-8 (byte 0x{byte:02x}, {error.reason}). Convert the file to UTF-8."


def _too_long(where: str) -> str:
    return f"{where}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most a document may have. Split it."


def _lines_before(path: str, place: int) -> int:
    found = read = 0
    with open(path, "rb") as file:
        for data in _decompressed(file, path):
            found += data.count(b"\n", 0, place - read)
            read += len(data)
            if read >= place:
                break
    return found


@dataclass(frozen=True)
class Piece:
    """What is read in one go: a file, or a row group of a parquet file."""

    path: str
    """The file."""
    file: int
    """Its number in the domain, from 0."""
    num_bytes: int
    """Bytes of the file that belong to it."""
    group: parquet.RowGroup | None = None
    """The row group, of a parquet file."""

    @property
    def seekable(self) -> bool:
        """Whether any block of it can be read without reading those before."""
        return self.group is None and not self.path.endswith((*_COMPRESSED, ".txt"))


def pieces_of(path: str | Path, file: int = 0, text_key: str = TEXT_KEY) -> list[Piece]:
    """The pieces of one file, in order.

    Raises:
        InputError: A parquet file that is damaged or has no column ``text_key`` of strings.
    """
    path = str(path)
    if path.endswith(".parquet"):
        return [Piece(path, file, group.num_bytes, group) for group in parquet.row_groups(path, text_key)]
    return [Piece(path, file, Path(path).stat().st_size)]


def read_piece(
    piece: Piece,
    index: int = 0,
    *,
    text_key: str = TEXT_KEY,
    block_bytes: int = BLOCK_BYTES,
    first: int = 0,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[Block]:
    """Reads a piece as blocks of about ``block_bytes`` of text. Memory: a few blocks, or the longest line.

    Args:
        piece: The piece.
        index: First half of every `Block.position`.
        text_key: The column of a parquet file.
        block_bytes: Text in a block.
        first: Number of the first block to give; those before are skipped.
        wanted: Whether to give the block of a number.

    Raises:
        InputError: The file cannot be read, its compressed stream is damaged or cut short, or a row has no text.
    """
    if piece.group is not None:
        blocks = _read_rows(piece, piece.group, index, text_key, block_bytes)
    elif piece.path.endswith(".txt"):
        blocks = iter([Block(piece.path, piece.file, (index, 0), 0, 0, piece.num_bytes)])
    elif piece.seekable:
        for number in range(first, -(-piece.num_bytes // block_bytes)):
            if wanted(number):
                start = number * block_bytes
                stop = min(start + block_bytes, piece.num_bytes)
                yield Block(piece.path, piece.file, (index, number), start, stop, stop - start)
        return
    else:
        blocks = _read_compressed(piece, index, block_bytes)
    yield from (block for block in blocks if block.position[1] >= first and wanted(block.position[1]))


def _read_rows(piece: Piece, group: parquet.RowGroup, index: int, text_key: str, block_bytes: int) -> Iterator[Block]:
    rows_read = 0
    for number, row, row_bytes, data in parquet.read_rows(piece.path, group, text_key, block_bytes):
        # Only the share of the file is known, from the rows.
        before = piece.num_bytes * rows_read // group.num_rows
        rows_read += len(row_bytes)
        share = piece.num_bytes * rows_read // group.num_rows - before
        yield Block(piece.path, piece.file, (index, number), row, row + len(row_bytes), share, data, row_bytes)


def _read_compressed(piece: Piece, index: int, block_bytes: int) -> Iterator[Block]:
    path = piece.path
    pieces: list[bytes] = []
    number = start = size = done = position = 0
    try:
        with open(path, "rb") as file:
            for data in _decompressed(file, path):
                position = file.tell()
                pieces.append(data)
                size += len(data)
                cut = data.rfind(b"\n") + 1
                if size > MAX_DOCUMENT_BYTES and not cut:
                    raise InputError(_too_long(f"{path}, line {_lines_before(path, start) + 1}"))
                if size < block_bytes or not cut:
                    continue
                block = b"".join((*pieces[:-1], data[:cut]))
                yield Block(path, piece.file, (index, number), start, start + len(block), position - done, block)
                number, start, done = number + 1, start + len(block), position
                pieces = [data[cut:]]
                size = len(pieces[0])
    except _DAMAGED_STREAM as error:
        line = _lines_before_damage(path)
        raise InputError(
            f"{path}, line {line + 1}: the compressed file is damaged or cut short there ({error}). Fetch it again."
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the file.") from error
    if block := b"".join(pieces):
        yield Block(path, piece.file, (index, number), start, start + len(block), position - done, block)


def _lines_before_damage(path: str) -> int:
    found = 0
    try:
        with open(path, "rb") as file:
            for data in _decompressed(file, path):
                found += data.count(b"\n")
    except _DAMAGED_STREAM:
        pass
    return found


def _decompressed(file: BinaryIO, path: str) -> Iterator[bytes]:
    if path.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=file)
        while data := stream.read1(_READ_BYTES):
            yield data
    elif path.endswith(".zst"):
        yield from _zstd(file)
    else:
        while data := file.read(_READ_BYTES):
            yield data


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Decompresses all frames. zstandard's own reader takes a cut frame for the end of the file."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    while data := file.read(_READ_BYTES):
        while data:
            frame = decompressor.decompressobj() if frame is None or frame.eof else frame
            if text := frame.decompress(data):
                yield text
            data = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise EOFError("the last frame has no end")


def iter_documents(path: str | Path, text_key: str = TEXT_KEY) -> Iterator[str]:
    """The documents of one file, in order; empty ones too.

    Raises:
        InputError: The file cannot be read or is damaged; the message names file and line.
    """
    for piece in pieces_of(path, text_key=text_key):
        for block in read_piece(piece, text_key=text_key):
            yield from block.documents(text_key).texts
