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
class BadDocument:
    """A line, row or file that is no document."""

    place: int
    """As those of `Documents`."""
    reason: str
    """A few words, the same for all of a kind."""
    message: str
    """What is wrong with it."""


@dataclass(frozen=True)
class Documents:
    """Documents of a block, in order, with the empty ones."""

    texts: list[str]
    places: np.ndarray
    """Bytes of decompressed text, or rows, before each document in its file, int64 [documents]."""
    bad: tuple[BadDocument, ...] = ()
    """What was passed over."""


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
    """Bytes of each row in the ``data`` of a parquet block, int64 [documents]; -1 for null."""

    def documents(self, text_key: str = TEXT_KEY, *, skip_bad: bool = False) -> Documents:
        """Decodes the block.

        Args:
            skip_bad: Pass over lines and rows that are no documents, and .txt files that are not UTF-8.

        Raises:
            InputError: Invalid UTF-8 or JSON, a line without a text or beyond `MAX_DOCUMENT_BYTES`, or an unreadable
                file; the message names file and line.
        """
        try:
            if self.row_bytes is not None:
                places, read = self._rows(self.row_bytes, text_key)
            elif is_one_document(self.path):
                places, read = self._whole()
            else:
                places, read = self._of_lines(text_key)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}. Check the file.") from error
        texts: list[str] = []
        kept: list[int] = []
        bad: list[BadDocument] = []
        for place, text in zip(places, read, strict=True):
            if isinstance(text, str):
                texts.append(text)
                kept.append(place)
            elif skip_bad:
                bad.append(BadDocument(place, text.reason, text.message))
            else:
                raise InputError(f"{self._where(text.place)}: {text.message}")
        return Documents(texts, np.array(kept, np.int64), tuple(bad))

    def _of_lines(self, text_key: str) -> tuple[list[int], Iterator[str | BadDocument]]:
        start, data = self._lines()
        lines = data.split(b"\n")
        sizes = np.fromiter(map(len, lines), np.int64, len(lines))
        starts = (start + np.cumsum(sizes + 1) - sizes - 1).tolist()
        if start == 0:
            lines[0] = lines[0].removeprefix(_BYTE_ORDER_MARK)
        held = [number for number, line in enumerate(lines) if line and not line.isspace()]
        return [starts[n] for n in held], (_text(lines[n], starts[n], text_key) for n in held)

    def _rows(self, row_bytes: np.ndarray, text_key: str) -> tuple[list[int], list[str | BadDocument]]:
        assert self.data is not None
        read: list[str | BadDocument] = []
        at = 0
        for row, size in enumerate(row_bytes.tolist(), self.start):
            if size < 0:
                null = f"'{text_key}' is null, expected a string. Fix or remove the row."
                read.append(BadDocument(row, _NO_TEXT, null))
                continue
            read.append(_decoded(self.data[at : at + size], row))
            at += size
        return list(range(self.start, self.start + len(read))), read

    def _whole(self) -> tuple[list[int], list[str | BadDocument]]:
        with open(self.path, "rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1).removeprefix(_BYTE_ORDER_MARK)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(_too_long(f"{self.path}: the file is one document"))
        return [0], [_decoded(data, 0, has_lines=True)]

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
        """The line or row at ``place``, for an error: the number of a line costs reading the file again."""
        if self.row_bytes is not None:
            return f"{self.path}, row {place + 1}"
        return f"{self.path}, line {_lines_before(self.path, place) + 1}"


_NOT_UTF8, _NOT_JSON, _NO_TEXT, _HALF = "not UTF-8", "not JSON", "no text", "half of a character"


def _decoded(data: bytes, place: int, *, has_lines: bool = False) -> str | BadDocument:
    """The text, or what is wrong with it; of several lines, with the place of the byte that is wrong."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x}, {error.reason}"
        place += error.start if has_lines else 0
        return BadDocument(place, _NOT_UTF8, f"not valid UTF-8 ({at}). Convert the file to UTF-8.")


def _text(line: bytes, place: int, text_key: str) -> str | BadDocument:
    """The text of a line of JSON, or what is wrong with it."""
    decoded = _decoded(line, place)
    if isinstance(decoded, BadDocument):
        return decoded
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        return BadDocument(place, _NOT_JSON, f"not valid JSON ({error}). Expected one JSON object a line.")
    text = _looked_up(record, text_key)
    if not isinstance(text, str):
        return BadDocument(place, _NO_TEXT, _no_text(record, text_key))
    if b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            escape = f"the escape \\u{ord(text[error.start]):04x} is half of a character (a lone surrogate)"
            return BadDocument(place, _HALF, f"{escape}. Fix or remove the line.")
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


def _no_text(record: object, text_key: str) -> str:
    if not isinstance(record, dict):
        return f"holds {type(record).__name__}, expected an object with the key '{text_key}'."
    found = _looked_up(record, text_key)
    if found is _ABSENT:
        seen = ", ".join(sorted(record)[:8]) or "none"
        return f"no key '{text_key}' (keys: {seen}). Fix the line, or choose another key."
    return f"'{text_key}' is {type(found).__name__}, expected a string. Fix the line."


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
        InputError: The file cannot be read, or its compressed stream is damaged or cut short.
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


def iter_documents(path: str | Path, text_key: str = TEXT_KEY, *, skip_bad: bool = False) -> Iterator[str]:
    """Yields the documents of one file, in order, with the empty ones.

    Args:
        skip_bad: See `Block.documents`.

    Raises:
        InputError: The file cannot be read or is damaged; the message names file and line.
    """
    for piece in pieces_of(path, text_key=text_key):
        for block in read_piece(piece, text_key=text_key):
            yield from block.documents(text_key, skip_bad=skip_bad).texts
