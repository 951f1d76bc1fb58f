"""Text column of parquet files, read row group by row group in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.prepare.columns import (
    AT_ONCE_BYTES,
    MAX_ROWS,
    RowGroup,
    bytes_of,
    check_column,
    column_of,
    in_parts,
    longest,
    pyarrow_module,
)
from megamix.prepare.storage import is_url, open_input


def row_groups(path: str, text_key: str) -> list[RowGroup]:
    """The row groups of a file that have rows, in order.

    Raises:
        InputError: pyarrow is missing, the file is damaged, or it has no column ``text_key`` of texts.
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
    rows = max(1, min(MAX_ROWS, block_bytes * group.num_rows // max(group.text_bytes, 1)))
    done = 0
    with _opened(path, lambda: f", row {group.first_row + done + 1}") as file:
        at_once = min(rows, max(1, AT_ONCE_BYTES // max(_longest_that_repeats(path, file, group, text_key), 1)))
        # Without prefetching and with a buffer, pages are read one at a time instead of the whole column.
        for batch in file.iter_batches(batch_size=at_once, row_groups=[group.number], columns=[text_key]):
            texts = column_of(batch, text_key)
            while len(texts):
                # A row's number decides its block, wherever pyarrow ends its batches.
                block = texts[: rows - done % rows]
                texts = texts[len(block) :]
                for part in in_parts(path, group.first_row + done, block):
                    yield (done // rows, group.first_row + done, *bytes_of(part))
                    done += len(part)
        if done != group.num_rows:
            raise InputError(f"{path}: row group {group.number} has {done} rows, expected {group.num_rows}.")


def _longest_that_repeats(path: str, file: Any, group: RowGroup, text_key: str) -> int:
    """Bytes of the longest text in the row group's dictionary, each of which may stand for any number of rows."""
    if not file.metadata.row_group(group.number).column(_find_column(path, file, text_key)).has_dictionary_page:
        return 0
    with _opened(path, read_dictionary=[text_key], metadata=file.metadata) as again:
        batch = next(again.iter_batches(batch_size=1, row_groups=[group.number], columns=[text_key]))
        first = column_of(batch, text_key)
        return longest(first.dictionary)


@contextlib.contextmanager
def _opened(path: str, where: Any = lambda: "", **options: Any) -> Iterator[Any]:
    pyarrow, parquet = pyarrow_module(), pyarrow_module("pyarrow.parquet")
    try:
        source = open_input(path) if is_url(path) else path
        with parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, **options) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}{where()}: the parquet file is damaged ({reason}). Fetch it again.") from error


def _find_column(path: str, file: Any, text_key: str) -> int:
    """Number of the leaf column; checks that it holds texts."""
    check_column(path, file.schema_arrow, text_key)
    names = [file.metadata.schema.column(number).path for number in range(len(file.metadata.schema))]
    return names.index(text_key)
