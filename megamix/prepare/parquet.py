"""Text column of parquet files, read row group by row group in bounded memory.

pyarrow is imported only here, and nothing of it leaves: callers get bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.packages import need

_MAX_ROWS = 4096
"""Rows read at once, at most: where texts repeat, the sizes stated in the file are far too small."""


@dataclass(frozen=True)
class RowGroup:
    """Place and size of a row group."""

    number: int
    """Number in the file, from 0."""
    first_row: int
    """Rows of the file before it."""
    num_rows: int
    num_bytes: int
    """Compressed bytes of its text column."""
    text_bytes: int
    """Encoded bytes of its text column, before compression."""


def row_groups(path: str, text_key: str) -> list[RowGroup]:
    """The row groups of a file that have rows, in order.

    Raises:
        InputError: pyarrow is missing, the file is damaged, or it has no column ``text_key`` of strings.
    """
    with _opened(path) as file:
        column = _find_column(path, file, text_key)
        found: list[RowGroup] = []
        row = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            chunk = group.column(column)
            sizes = (chunk.total_compressed_size, chunk.total_uncompressed_size)
            if group.num_rows:
                found.append(RowGroup(number, row, group.num_rows, *sizes))
            row += group.num_rows
        return found


def read_rows(
    path: str, group: RowGroup, text_key: str, block_bytes: int
) -> Iterator[tuple[int, int, np.ndarray, bytes]]:
    """Reads a row group in blocks of about ``block_bytes`` of text.

    Yields:
        Number of the block, its first row in the file (from 0), bytes of each row, int64 [rows], -1 for null, and the
        concatenated texts, UTF-8. A block may come in several parts with the same number.

    Raises:
        InputError: The file is damaged; the message names the row, counted from 1.
    """
    rows = max(1, min(_MAX_ROWS, block_bytes * group.num_rows // max(group.text_bytes, 1)))
    done = 0
    with _opened(path, lambda: f", row {group.first_row + done + 1}") as file:
        # Without prefetching and with a buffer, pages are read one at a time instead of the whole column.
        for batch in file.iter_batches(batch_size=rows, row_groups=[group.number], columns=[text_key]):
            texts = batch.column(0)
            while len(texts):
                # A row's number decides its block, wherever pyarrow ends its batches.
                part = texts[: rows - done % rows]
                row = group.first_row + done
                yield (done // rows, row, *_bytes_of(part))
                done += len(part)
                texts = texts[len(part) :]
        if done != group.num_rows:
            raise InputError(f"{path}: row group {group.number} has {done} rows, expected {group.num_rows}.")


def _bytes_of(texts: Any) -> tuple[np.ndarray, bytes]:
    large = texts.cast("large_string")
    _, offsets, data = large.buffers()
    ends = np.frombuffer(offsets, np.int64)[large.offset : large.offset + len(large) + 1]
    # What a null row points at need not be empty.
    sizes, whole = np.diff(ends), b"" if data is None else bytes(memoryview(data)[ends[0] : ends[-1]])
    if not texts.null_count:
        return sizes, whole
    null, starts = np.asarray(texts.is_null()), ends[:-1] - ends[0]
    held = [whole[start : start + size] for start, size in zip(starts[~null], sizes[~null], strict=True)]
    return np.where(null, -1, sizes), b"".join(held)


@contextlib.contextmanager
def _opened(path: str, where: Any = lambda: "") -> Iterator[Any]:
    pyarrow, parquet = _library()
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}{where()}: the parquet file is damaged ({reason}). Fetch it again.") from error


def _library() -> tuple[Any, Any]:
    purpose = "reading parquet files"
    return need("pyarrow", purpose), need("pyarrow.parquet", purpose)


def _find_column(path: str, file: Any, text_key: str) -> int:
    """Number of the leaf column; checks that it holds strings."""
    pyarrow, _ = _library()
    schema = file.schema_arrow
    if text_key not in schema.names:
        seen = ", ".join(schema.names[:8]) or "none"
        raise InputError(f"{path}: no column '{text_key}' (columns: {seen}). Choose another with --text-key.")
    kind = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise InputError(f"{path}: the column '{text_key}' holds {kind}, expected strings. Choose another.")
    names = [file.metadata.schema.column(number).path for number in range(len(file.metadata.schema))]
    return names.index(text_key)
