"""Blocks of the input files: undecoded, so that one process feeds many.

    pieces_of(file)           units that are read separately: a file, or a row group of a table
    read_piece(piece)         its blocks, of about a megabyte of text

File and block size alone decide where blocks begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from megamix.core.errors import InputError
from megamix.prepare import arrow, parquet
from megamix.prepare.archive import Member, members
from megamix.prepare.blocks import TEXT_KEY, Block, lines_before, too_long
from megamix.prepare.columns import MAX_ROWS, RowGroup
from megamix.prepare.kinds import (
    DAMAGED,
    MAX_DOCUMENT_BYTES,
    Kind,
    decompressed,
    ending,
    is_compressed,
    is_text_file,
    kind_of,
    name_of,
)
from megamix.prepare.storage import InputPath, open_input, stat_of

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Unit of reading: a file, or a row group of a parquet file."""

    path: str
    file: int
    """Number of the file in the domain, from 0."""
    num_bytes: int
    """The piece's bytes of the file."""
    kind: Kind = "lines"
    group: RowGroup | None = None
    text_files: tuple[str, ...] = ()
    """See `pieces_of`."""

    @property
    def seekable(self) -> bool:
        """Whether a block can be read without the blocks before it."""
        return self.kind == "lines" and not is_compressed(self.path)


def pieces_of(
    path: str | InputPath, file: int = 0, text_key: str = TEXT_KEY, text_files: Sequence[str] = ()
) -> list[Piece]:
    """The pieces of one file, in order.

    Args:
        text_files: Patterns of names of files, also in archives, that are one document each.

    Raises:
        InputError: A parquet or arrow file that is damaged or has no column ``text_key`` of texts.
    """
    path, kind = str(path), kind_of(path, text_files)
    if kind == "rows":
        return [Piece(path, file, group.num_bytes, kind, group) for group in _table(path).row_groups(path, text_key)]
    return [Piece(path, file, stat_of(path).num_bytes, kind, None, tuple(text_files))]


def _table(path: str) -> ModuleType:
    return arrow if ending(path, (".arrow",)) else parquet


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
    elif piece.kind == "whole":
        blocks = iter([Block(piece.path, piece.file, (index, 0), 0, 0, piece.num_bytes, piece.kind)])
    elif piece.kind == "members":
        blocks = _read_members(piece, index, block_bytes)
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


def _read_rows(piece: Piece, group: RowGroup, index: int, text_key: str, block_bytes: int) -> Iterator[Block]:
    rows_read = 0
    for number, row, row_bytes, data in _table(piece.path).read_rows(piece.path, group, text_key, block_bytes):
        # Bytes per row are unknown; rows give a share of the file.
        before = piece.num_bytes * rows_read // group.num_rows
        rows_read += len(row_bytes)
        share = piece.num_bytes * rows_read // group.num_rows - before
        stop = row + len(row_bytes)
        yield Block(piece.path, piece.file, (index, number), row, stop, share, piece.kind, data, row_bytes)


def _read_compressed(piece: Piece, index: int, block_bytes: int) -> Iterator[Block]:
    path = piece.path
    pieces: list[bytes] = []
    number = start = size = done = position = 0
    try:
        with open_input(path) as file:
            for data in decompressed(file, path):
                position = file.tell()
                pieces.append(data)
                size += len(data)
                cut = data.rfind(b"\n") + 1
                if size > MAX_DOCUMENT_BYTES and not cut:
                    raise InputError(too_long(f"{path}, line {lines_before(path, start) + 1}"))
                if size < block_bytes or not cut:
                    continue
                block = b"".join((*pieces[:-1], data[:cut]))
                yield Block(
                    path, piece.file, (index, number), start, start + len(block), position - done, piece.kind, block
                )
                number, start, done = number + 1, start + len(block), position
                pieces = [data[cut:]]
                size = len(pieces[0])
    except DAMAGED as error:
        _refuse_window(path, error)
        line = _lines_before_damage(path)
        raise InputError(
            f"{path}, line {line + 1}: the compressed file is damaged or cut short there ({error}). Fetch it again."
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the file.") from error
    if block := b"".join(pieces):
        yield Block(path, piece.file, (index, number), start, start + len(block), position - done, piece.kind, block)


def _refuse_window(path: str, error: BaseException) -> None:
    if "too much memory" in str(error) or "emory usage limit" in str(error):
        raise InputError(
            f"{path}: its frames need a window of more than {MAX_DOCUMENT_BYTES >> 20} MiB to decompress. Compress it"
            " anew with a smaller one (of zstd: without --long=31)."
        ) from error


def _read_members(piece: Piece, index: int, block_bytes: int) -> Iterator[Block]:
    path, number, first, done, size = piece.path, 0, 0, 0, 0
    held: list[Member] = []
    try:
        with open_input(path) as file:
            found = members(decompressed(file, path), path, lambda name: _is_text(name, piece.text_files))
            for member in _without_captions(found):
                held.append(member)
                size += len(member.data)
                if size >= block_bytes or len(held) == MAX_ROWS:
                    yield _member_block(piece, (index, number), first, held, file.tell() - done)
                    number, first, done, size, held = number + 1, first + len(held), file.tell(), 0, []
            if held:
                yield _member_block(piece, (index, number), first, held, file.tell() - done)
    except DAMAGED as error:
        _refuse_window(path, error)
        raise InputError(f"{path}: the compressed file is damaged or cut short ({error}). Fetch it again.") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the file.") from error


def _without_captions(found: Iterable[Member]) -> Iterator[Member]:
    """Leaves out the .json beside the .txt of a sample (files side by side with one name up to its first dot)."""
    waiting: Member | None = None
    text: str | None = None
    for member in found:
        sample = _sample_name(member.name)
        is_text = ending(member.name, (".txt",)) is not None
        if waiting is not None and not (is_text and _sample_name(waiting.name) == sample):
            yield waiting
        waiting = None
        if is_text:
            text = sample
        if ending(member.name, (".json",)) is None:
            yield member
        elif sample != text:
            waiting = member
    if waiting is not None:
        yield waiting


def _is_text(name: str, text_files: Sequence[str]) -> bool:
    if name_of(name).startswith("."):
        return False
    return is_text_file(name, text_files) or ending(name, (".txt", ".json")) is not None


def _sample_name(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _member_block(
    piece: Piece, position: tuple[int, int], first: int, held: Sequence[Member], file_bytes: int
) -> Block:
    data, sizes = b"".join(member.data for member in held), np.array([len(member.data) for member in held], np.int64)
    names = tuple(member.name for member in held)
    stop = first + len(held)
    return Block(piece.path, piece.file, position, first, stop, file_bytes, piece.kind, data, sizes, names)


def _lines_before_damage(path: str) -> int:
    found = 0
    try:
        with open_input(path) as file:
            for data in decompressed(file, path):
                found += data.count(b"\n")
    except DAMAGED:
        pass
    return found


def iter_documents(
    path: str | InputPath, text_key: str = TEXT_KEY, text_files: Sequence[str] = (), *, skip_bad: bool = False
) -> Iterator[str]:
    """Yields the documents of one file, in order, with the empty ones.

    Args:
        text_files: See `pieces_of`.
        skip_bad: See `Block.documents`.

    Raises:
        InputError: The file cannot be read or is damaged; the message names file and line.
    """
    for piece in pieces_of(path, text_key=text_key, text_files=text_files):
        for block in read_piece(piece, text_key=text_key):
            yield from block.documents(text_key, skip_bad=skip_bad).texts
