"""Documents of the input files, in blocks.

    pieces_of(file)           units that are read separately: a file, or a row group of a parquet file
    read_piece(piece)         undecoded blocks of about a megabyte of text: cheap, so one process feeds many
    Block.documents(text_key) the texts of a block and their places: decodes UTF-8 and JSON, in any process

A ``.txt`` file is one document, a row of a ``.parquet`` file one, and a line (a JSON object) of any other file one.
Damage is an `InputError` with file and line (or row). File and block size alone decide where blocks begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megamix.core.errors import InputError
from megamix.prepare import parquet
from megamix.prepare.kinds import (
    DAMAGED,
    MAX_DOCUMENT_BYTES,
    decompressed,
    is_compressed,
    is_one_document,
    is_parquet,
)

TEXT_KEY = "text"
BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Documents:
    """Documents of a block, in order, with the empty ones."""

    texts: list[str]
    places: np.ndarray
    """Bytes of decompressed text, or rows, before each document in its file, int64 [documents]."""


@dataclass(frozen=True)
class Block:
    """Consecutive documents of one file, not decoded yet. Small to pickle."""

    path: str
    file: int
    """Number of the file in the domain, from 0."""
    position: tuple[int, int]
    """Number of the piece among those read, and of the block in it, where skipped blocks count."""
    start: int
    """Bytes of decompressed text, or rows, before the block."""
    stop: int
    """End of the block where ``data`` is None; lines that begin before it belong to the block."""
    file_bytes: int
    """The block's share of the file's bytes on disk."""
    data: bytes | None = None
    """Whole lines, or the concatenated rows; None if `documents` reads them from the file."""
    row_bytes: np.ndarray | None = None
    """Bytes of each row in the ``data`` of a parquet block, int64 [documents]."""

    def documents(self, text_key: str = TEXT_KEY) -> Documents:
        """Decodes the block.

        Raises:
            InputError: Invalid UTF-8 or JSON, a line without a text or beyond `MAX_DOCUMENT_BYTES`, or an unreadable
                file; the message names file and line.
        """
        try:
            if self.row_bytes is not None:
                return self._rows(self.row_bytes)
            if is_one_document(self.path):
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
        """The place of the first line that begins in [start, stop), and all such lines."""
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
        """The line at ``place``, for an error: its number costs reading the file again."""
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
        text = _looked_up(record, text_key)
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


_ABSENT = object()


def _looked_up(record: object, text_key: str) -> object:
    """What a record has under a key; under ``a.b``, if there is no such key, what its object ``a`` has under ``b``."""
    if not isinstance(record, dict):
        return _ABSENT
    if text_key in record:
        return record[text_key]
    first, dot, rest = text_key.partition(".")
    return _looked_up(record.get(first), rest) if dot else _ABSENT


def _no_text(where: str, record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"{where}: holds {type(record).__name__}, expected an object with the key '{text_key}'."
    found = _looked_up(record, text_key)
    if found is _ABSENT:
        seen = ", ".join(sorted(record)[:8]) or "none"
        return f"{where}: no key '{text_key}' (keys: {seen}). Fix the line, or choose another key."
    return f"{where}: '{text_key}' is {type(found).__name__}, expected a string. Fix the line."


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where}: not valid UTF-8 (byte 0x{byte:02x}, {error.reason}). Convert the file to UTF-8."


def _too_long(where: str) -> str:
    return f"{where}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most a document may have. Split it."


def _lines_before(path: str, place: int) -> int:
    found = read = 0
    with open(path, "rb") as file:
        for data in decompressed(file, path):
            found += data.count(b"\n", 0, place - read)
            read += len(data)
            if read >= place:
                break
    return found


@dataclass(frozen=True)
class Piece:
    """Unit of reading: a file, or a row group of a parquet file."""

    path: str
    file: int
    """Number of the file in the domain, from 0."""
    num_bytes: int
    """The piece's bytes of the file."""
    group: parquet.RowGroup | None = None

    @property
    def seekable(self) -> bool:
        """Whether a block can be read without the blocks before it."""
        return self.group is None and not is_compressed(self.path) and not is_one_document(self.path)


def pieces_of(path: str | Path, file: int = 0, text_key: str = TEXT_KEY) -> list[Piece]:
    """The pieces of one file, in order.

    Raises:
        InputError: A parquet file that is damaged or has no column ``text_key`` of strings.
    """
    path = str(path)
    if is_parquet(path):
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
        index: First half of every `Block.position`.
        text_key: The column of a parquet file.
        first: Number of the first block; earlier ones are skipped.
        wanted: Whether to yield the block of a number.

    Raises:
        InputError: The file cannot be read, its compressed stream is damaged or cut short, or a row has no text.
    """
    if piece.group is not None:
        blocks = _read_rows(piece, piece.group, index, text_key, block_bytes)
    elif is_one_document(piece.path):
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
        # Bytes per row are unknown; rows give a share of the file.
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
            for data in decompressed(file, path):
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
    except DAMAGED as error:
        if "too much memory" in str(error) or "emory usage limit" in str(error):
            raise InputError(
                f"{path}: its frames need a window of more than {MAX_DOCUMENT_BYTES >> 20} MiB to decompress. Compress it"
                " anew with a smaller one (of zstd: without --long=31)."
            ) from error
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
            for data in decompressed(file, path):
                found += data.count(b"\n")
    except DAMAGED:
        pass
    return found


def iter_documents(path: str | Path, text_key: str = TEXT_KEY) -> Iterator[str]:
    """Yields the documents of one file, in order, with the empty ones.

    Raises:
        InputError: The file cannot be read or is damaged; the message names file and line.
    """
    for piece in pieces_of(path, text_key=text_key):
        for block in read_piece(piece, text_key=text_key):
            yield from block.documents(text_key).texts
