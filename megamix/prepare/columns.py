"""Text columns of tables: what parquet and arrow files have in common. pyarrow's arrays come in, bytes leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.packages import need
from megamix.prepare.blocks import too_long
from megamix.prepare.kinds import MAX_DOCUMENT_BYTES

MAX_ROWS = 4096
"""Rows read at once, at most: where texts repeat, the sizes stated in a file are far too small."""

AT_ONCE_BYTES = 64 << 20
"""Bytes of texts written out at once, at most: a text that repeats is in a file once."""


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
    """Checks that a schema has a column of texts; ``row.text`` is the field ``text`` of the structs in ``row``.

    Raises:
        InputError: It has none of that name, or it holds something else.
    """
    pyarrow = pyarrow_module()
    names: list[str] = list(schema.names)
    kind: Any = None
    for name in place_in(schema, text_key):
        if name not in names:
            seen = ", ".join(names[:8]) or "none"
            raise InputError(f"{path}: no column '{text_key}' (columns: {seen}). Choose another with --text-key.")
        kind = (schema if kind is None else kind).field(name).type
        names = [kind.field(each).name for each in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if kind not in [getattr(pyarrow, each)() for each in texts if hasattr(pyarrow, each)]:
        raise InputError(f"{path}: the column '{text_key}' holds {kind}, expected strings or bytes. Choose another.")


def in_parts(path: str, first_row: int, texts: Any) -> Iterator[Any]:
    """Consecutive rows of at most `AT_ONCE_BYTES`, or one row of more.

    Args:
        first_row: Rows of the file before them.

    Raises:
        InputError: A text is longer than a document may be.
    """
    sizes = _sizes(texts)
    for row in np.flatnonzero(sizes > MAX_DOCUMENT_BYTES).tolist():
        raise InputError(too_long(f"{path}, row {first_row + row + 1}"))
    ends, start = sizes.cumsum(), 0
    while start < len(texts):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(ends.searchsorted(before + AT_ONCE_BYTES, "right")))
        yield texts[start:stop]
        start = stop


def _sizes(texts: Any) -> np.ndarray:
    """Bytes of each text, int64 [texts], without writing out those that repeat; of null any number."""
    if hasattr(texts, "dictionary"):
        rows = texts.indices.fill_null(0).to_numpy(zero_copy_only=False)
        sizes = _sizes(texts.dictionary)
        return sizes[rows] if len(sizes) else np.zeros(len(texts), np.int64)
    buffers = texts.buffers()
    if "view" in str(texts.type):  # 16 bytes each, which begin with the size
        return np.frombuffer(buffers[1], np.int32)[::4][texts.offset :][: len(texts)].astype(np.int64)
    wide = np.int64 if "large" in str(texts.type) else np.int32
    return np.diff(np.frombuffer(buffers[1], wide)[texts.offset :][: len(texts) + 1]).astype(np.int64)


def longest(texts: Any) -> int:
    """Bytes of the longest text."""
    return int(_sizes(texts).max(initial=0))


def place_in(schema: Any, text_key: str) -> list[str]:
    """The column of a key, and the fields of structs below it."""
    return [text_key] if text_key in schema.names else text_key.split(".")


def column_of(batch: Any, text_key: str) -> Any:
    """The texts of a record batch; null where a struct above one is."""
    column, *fields = place_in(batch.schema, text_key)
    texts = batch.column(column)
    return pyarrow_module("pyarrow.compute").struct_field(texts, fields) if fields else texts


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
