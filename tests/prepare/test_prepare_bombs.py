"""Compressed files that stand for far more than they hold: one limit for all formats, by document and by window."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from megamix.core.errors import InputError
from megamix.data.tokens.tokenizer import TokenizerSpec
from megamix.prepare import blocks, columns, kinds, pieces
from megamix.prepare.pieces import iter_documents

MIB = 1 << 20
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": partial(gzip.compress, compresslevel=1),
    "zst": zstandard.compress,
    "bz2": bz2.compress,
    "xz": partial(lzma.compress, preset=0),
}


@pytest.mark.parametrize("suffix", PACK)
def test_one_line_of_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """What is held at once stays near the limit, though the file would be 2^6 times as much."""
    for module in (blocks, pieces):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2 * MIB)
    path = tmp_path / f"x.jsonl.{suffix}"
    data = b'{"text": "' + b"a" * (128 * MIB) + b'"}\n'
    path.write_bytes(PACK[suffix](data))
    decompressed, sizes = blocks.decompressed, []

    def watched(file, path):
        for piece in decompressed(file, path):
            sizes.append(len(piece))
            yield piece

    for module in (blocks, pieces):
        monkeypatch.setattr(module, "decompressed", watched)
    with pytest.raises(InputError, match=r"x.jsonl.\w+, line 1: longer than 2 MiB, the most a document may have"):
        list(iter_documents(path))
    assert max(sizes) < 24 * MIB
    assert sum(sizes) < 64 * MIB  # once to its refusal, and once for the number of the line


def frame(window_log: int, data: bytes) -> bytes:
    """A zstandard frame with one raw block (RFC 8878, sections 3.1.1.1 and 3.1.1.2)."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window_log - 10 << 3]) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def test_windows(tmp_path: Path) -> None:
    path, line = tmp_path / "x.jsonl.zst", b'{"text": "one"}\n'
    for window_log in (20, 27, 30):
        path.write_bytes(frame(window_log, line))
        assert list(iter_documents(path)) == ["one"]
    path.write_bytes(frame(31, line))
    with pytest.raises(InputError, match=r"its frames need a window of more than 1024 MiB to decompress"):
        list(iter_documents(path))


def test_a_window_of_xz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "one"}\n'))  # a dictionary of 8 MiB
    assert list(iter_documents(path)) == ["one"]
    monkeypatch.setattr(kinds, "MAX_DOCUMENT_BYTES", MIB)
    with pytest.raises(InputError, match=r"its frames need a window of more than"):
        list(iter_documents(path))


@pytest.mark.parametrize("size", ["99999999999999999999", "10000001", "123456789"])
def test_a_vocabulary_beyond_use(size: str) -> None:
    with pytest.raises(InputError, match="at most 10,000,000 entries"):
        TokenizerSpec.parse(f"train:{size}")
    assert TokenizerSpec.parse("train:10000000").vocab_size == 10_000_000


# Tables, in which a text that repeats is held once


TYPES = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("is_dictionary", [False, True])
def test_rows_come_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch, kind: str, is_dictionary: bool) -> None:
    monkeypatch.setattr(columns, "AT_ONCE_BYTES", 40)
    words = ["", "five5", None, "\u00e9" * 15, "x" * 100, "a", "b" * 39, None, "c"]
    values = [None if word is None else word.encode() for word in words]
    if is_dictionary:
        known = sorted({value for value in values if value is not None})
        numbers = pyarrow.array([None if value is None else known.index(value) for value in values], pyarrow.int32())
        held = pyarrow.array(known, pyarrow.binary()).cast(kind.removesuffix("_view"))
        texts = pyarrow.DictionaryArray.from_arrays(numbers, held)
    else:
        texts = pyarrow.array([value.decode() if value and "string" in kind else value for value in values], kind)
    for first in (0, 2):
        parts = [columns.bytes_of(part) for part in columns.in_parts("t", first, texts[first:])]
        assert np.concatenate([sizes for sizes, _ in parts]).tolist() == [
            -1 if value is None else len(value) for value in values[first:]
        ]
        assert b"".join(data for _, data in parts) == b"".join(value or b"" for value in values[first:])
        assert all(len(data) <= 40 or (sizes > 0).sum() == 1 for sizes, data in parts)
        assert len(parts) == 4
    monkeypatch.setattr(columns, "MAX_DOCUMENT_BYTES", 99)
    with pytest.raises(InputError, match=r"^t, row 12: longer than 1024 MiB, the most a document may have"):
        list(columns.in_parts("t", 9, texts[2:]))


@pytest.mark.parametrize(("suffix", "kept"), [("parquet", True), ("parquet", False), ("arrow", True)])
def test_a_table_of_few_bytes_that_repeats_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kept: bool
) -> None:
    """1.5 GiB of texts are read 64 MiB at a time, as pyarrow's memory shows; whether as a dictionary or as strings."""
    rows, text, path = 1500, "a" * MIB, tmp_path / f"x.{suffix}"
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
    table = pyarrow.table({"text": texts})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd", store_schema=kept)
    else:
        with pyarrow.ipc.new_file(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as file:
            file.write_table(table)
    assert path.stat().st_size < 4000
    del table, texts
    found, most = 0, 0
    for piece in pieces.pieces_of(path):
        for block in pieces.read_piece(piece):
            assert block.row_bytes is not None
            assert set(block.row_bytes.tolist()) == {MIB}
            found += len(block.row_bytes)
            most = max(most, pyarrow.total_allocated_bytes(), len(block.data or b""))
    assert found == rows
    assert most < 200 * MIB
