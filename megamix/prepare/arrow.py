"""Text column of arrow files (streams of record batches, as Hugging Face's datasets writes, or the file format)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.prepare.columns import MAX_ROWS, RowGroup, bytes_of, check_column, column_of, in_parts, pyarrow_module
from megamix.prepare.storage import is_url, open_input

_GROUP_BYTES = 32 << 20


def row_groups(path: str, text_key: str) -> list[RowGroup]:
    """Consecutive record batches, some 32 MiB of texts together, in order.

    Raises:
        InputError: pyarrow is missing, the file is damaged, or it has no column ``text_key`` of texts.
    """
    found: list[RowGroup] = []
    row, first, rows, size = 0, 0, 0, 0
    with _batches(path, text_key) as batches:
        for number, texts in enumerate(batches, 1):
            rows += len(texts)
            size += texts.nbytes
            if size >= _GROUP_BYTES:
                found.append(RowGroup(first, row, rows, size, size))
                row, first, rows, size = row + rows, number, 0, 0
    if rows:
        found.append(RowGroup(first, row, rows, size, size))
    return found


def read_rows(
    path: str, group: RowGroup, text_key: str, block_bytes: int
) -> Iterator[tuple[int, int, np.ndarray, bytes]]:
    """Reads a group in blocks of about ``block_bytes`` of text; yields as `parquet.read_rows` does."""
    rows = max(1, min(MAX_ROWS, block_bytes * group.num_rows // max(group.text_bytes, 1)))
    done = 0
    with _batches(path, text_key) as batches:
        for number, texts in enumerate(batches):
            if number < group.number:
                continue
            while len(texts) and done < group.num_rows:
                block = texts[: min(rows - done % rows, group.num_rows - done)]
                texts = texts[len(block) :]
                for part in in_parts(path, group.first_row + done, block):
                    yield (done // rows, group.first_row + done, *bytes_of(part))
                    done += len(part)
            if done == group.num_rows:
                return
    raise InputError(f"{path} has {group.first_row + done} rows, expected {group.first_row + group.num_rows}.")


@contextlib.contextmanager
def _batches(path: str, text_key: str) -> Iterator[Iterator[Any]]:
    """The text columns of all record batches."""
    pyarrow, ipc = pyarrow_module(), pyarrow_module("pyarrow.ipc")
    try:
        # A mapped file is read page by page, and only the text column.
        with pyarrow.PythonFile(open_input(path)) if is_url(path) else pyarrow.memory_map(path) as source:
            magic = source.read(6)
            source.seek(0)
            reader = ipc.open_file(source) if magic == b"ARROW1" else ipc.open_stream(source)
            check_column(path, reader.schema, text_key)
            yield _columns(reader, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: the arrow file is damaged ({reason}). Fetch it again.") from error


def _columns(reader: Any, text_key: str) -> Iterator[Any]:
    batches = (
        map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "num_record_batches") else reader
    )
    for batch in batches:
        yield column_of(batch, text_key)
