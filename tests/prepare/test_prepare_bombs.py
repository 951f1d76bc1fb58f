"""Compressed files that stand for far more than they hold: one limit for all formats, by document and by window."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import zstandard

from megamix.core.errors import InputError
from megamix.data.tokens.tokenizer import TokenizerSpec
from megamix.prepare import blocks, kinds, pieces
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
