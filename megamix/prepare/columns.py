"""Text columns of tables: what parquet and arrow files have in common. pyarrow's arrays come in, bytes leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.packages import need

MAX_ROWS = 4096
"""Rows read at once, at most: where texts repeat, the sizes stated in a file are far too small."""


@dataclass(frozen=True)
class RowGroup:
    """Place and size of rows that are read together."""

    number: int
    """Number of the row group, or of the first record batch, in the file, from 0."""
    first_row: int
    """Rows of the file before it."""
    num_rows: int
    num_bytes: int
    """Bytes of its text column in the file."""
    text_bytes: int
    """Bytes of its text column, before compression."""


def pyarrow_module(name: str = "pyarrow") -> Any:
    """pyarrow, or a module of it."""
    return need(name, "reading parquet and arrow files")


def check_column(path: str, schema: Any, text_key: str) -> None:
    """Checks that a schema has a column of texts.

    Raises:
        InputError: It has none of that name, or it holds something else.
    """
    pyarrow = pyarrow_module()
    if text_key not in schema.names:
        seen = ", ".join(schema.names[:8]) or "none"
        raise InputError(f"{path}: no column '{text_key}' (columns: {seen}). Choose another with --text-key.")
    kind = schema.field(text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if kind not in [getattr(pyarrow, each)() for each in texts if hasattr(pyarrow, each)]:
        raise InputError(f"{path}: the column '{text_key}' holds {kind}, expected strings or bytes. Choose another.")


def bytes_of(texts: Any) -> tuple[np.ndarray, bytes]:
    """Bytes of each text, int64 [texts], -1 for null, and the concatenated texts."""
    kind = texts.type.value_type if hasattr(texts.type, "value_type") else texts.type
    large = texts.cast("large_binary" if "binary" in str(kind) else "large_string")
    _, offsets, data = large.buffers()
    ends = np.frombuffer(offsets, np.int64)[large.offset : large.offset + len(large) + 1]
    # What a null row points at need not be empty.
    sizes, whole = np.diff(ends), b"" if data is None else bytes(memoryview(data)[ends[0] : ends[-1]])
    if not texts.null_count:
        return sizes, whole
    null, starts = np.asarray(texts.is_null()), ends[:-1] - ends[0]
    held = [whole[start : start + size] for start, size in zip(starts[~null], sizes[~null], strict=True)]
    return np.where(null, -1, sizes), b"".join(held)
