"""Documents of a block of an input file: decodes UTF-8 and JSON. `pieces` reads the blocks.

A ``.txt`` file is one document, a row of a ``.parquet`` or ``.arrow`` file one, a member of a ``.tar`` file one, and a
line (a JSON object) of any other file one. Damage is an `InputError` with file and line (or row, or member).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megamix.core.errors import InputError
from megamix.prepare.kinds import MAX_DOCUMENT_BYTES, Kind, decompressed, ending
from megamix.prepare.storage import open_input

TEXT_KEY = "text"
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
    kind: Kind = "lines"
    data: bytes | None = None
    """Whole lines, or the concatenated rows or members; None if `documents` reads them from the file."""
    row_bytes: np.ndarray | None = None
    """Bytes of each row or member in ``data``, int64 [documents]; -1 for null."""
    names: tuple[str, ...] = ()
    """Names of the members."""

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
            elif self.kind == "whole":
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
            data = self.data[at : at + size]
            is_json = bool(self.names) and ending(self.names[row - self.start], (".json",)) is not None
            read.append(_text(data, row, text_key) if is_json else _decoded(data, row))
            at += size
        return list(range(self.start, self.start + len(read))), read

    def _whole(self) -> tuple[list[int], list[str | BadDocument]]:
        with open_input(self.path) as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1).removeprefix(_BYTE_ORDER_MARK)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(too_long(f"{self.path}: the file is one document"))
        return [0], [_decoded(data, 0, has_lines=True)]

    def _lines(self) -> tuple[int, bytes]:
        """The place of the first line that begins in [start, stop), and all such lines."""
        if self.data is not None:
            return self.start, self.data
        start, skipped = self.start, b""
        with open_input(self.path) as file:
            if start:
                file.seek(start - 1)
                skipped = file.readline(MAX_DOCUMENT_BYTES + 1)  # the rest of a line that began earlier
                start += len(skipped) - 1
            data = file.read(max(self.stop - start, 0))
            rest = b""
            if data and not data.endswith(b"\n"):
                rest = file.readline(MAX_DOCUMENT_BYTES + 1)
        if max(len(skipped), len(rest)) > MAX_DOCUMENT_BYTES:
            raise InputError(too_long(self._where(start if rest else self.start)))
        return start, data + rest

    def _where(self, place: int) -> str:
        """The line or row at ``place``, for an error: the number of a line costs reading the file again."""
        if self.names:
            return f"{self.path}, {self.names[place - self.start]}"
        if self.row_bytes is not None:
            return f"{self.path}, row {place + 1}"
        return f"{self.path}, line {lines_before(self.path, place) + 1}"


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


def too_long(where: str) -> str:
    """What is wrong with a document beyond `MAX_DOCUMENT_BYTES`."""
    return f"{where}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most a document may have. Split it."


def lines_before(path: str, place: int) -> int:
    """Lines of a file that end before a byte of its decompressed text."""
    found = read = 0
    with open_input(path) as file:
        for data in decompressed(file, path):
            found += data.count(b"\n", 0, place - read)
            read += len(data)
            if read >= place:
                break
    return found
