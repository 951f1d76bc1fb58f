"""Token files of ours and of megatron.core: the same bytes, read by both; above 4 GiB; several files a domain."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megamix.data.tokens.indexed import IndexedTokens
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter

torch = pytest.importorskip("torch")
indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is in the dev extra")


def write_theirs(prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    """Writes documents, each a list of sequences, with megatron.core."""
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
    for sequences in documents:
        tokens = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def flat(documents: list[list[list[int]]]) -> list[int]:
    return [token for sequences in documents for sequence in sequences for token in sequence]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("lengths", [[], [3], [1, 0, 5, 0], [0], [7] * 40])
def test_same_documents_same_bytes(tmp_path: Path, dtype: str, lengths: list[int]) -> None:
    rng = np.random.default_rng(len(lengths))
    top = 65536 if dtype == "uint16" else 2**31 - 1
    documents = [[rng.integers(0, top, length).tolist()] for length in lengths]
    write_theirs(tmp_path / "theirs", documents, dtype)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for (document,) in documents:
            writer.add_document(document)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes(), suffix
    tokens = IndexedTokens(tmp_path / "theirs")
    assert (tokens.num_documents, tokens.tokens.tolist()) == (len(lengths), flat(documents))
    if flat(documents):  # theirs cannot map an empty file
        dataset = indexed.IndexedDataset(str(tmp_path / "ours"))
        assert [sequence.tolist() for sequence in dataset[0 : len(dataset)]] == [document for (document,) in documents]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_documents_of_several_sequences(tmp_path: Path, dtype: str) -> None:
    documents = [[[1, 2], [3]], [[4]], [], [[5], [6, 7, 8], [9]]]
    write_theirs(tmp_path / "a", documents, dtype)
    tokens = IndexedTokens(tmp_path / "a")
    assert (tokens.num_documents, tokens.num_sequences, tokens.dtype.name) == (4, 6, dtype)
    assert tokens.tokens.tolist() == flat(documents)
    assert [tokens.document_at(token) for token in range(9)] == [
        *((0, 0), (0, 1), (0, 2)), (1, 0), *((3, offset) for offset in range(5))
    ]  # fmt: skip
    second = DomainTokens("web", [tmp_path / "a"], ranges=[(1, 4)])
    assert second.read(0, second.num_tokens).tolist() == [4, 5, 6, 7, 8, 9]


def test_several_files_as_one_stream(tmp_path: Path) -> None:
    files = [[[[1, 2, 3]]], [[[4], [5, 6]], [[70000]]], []]
    for number, (documents, dtype) in enumerate(zip(files, ("uint16", "int32", "uint16"), strict=True)):
        write_theirs(tmp_path / str(number), documents, dtype)
    tokens = DomainTokens("web", [tmp_path / str(number) for number in range(3)])
    assert tokens.read(0, tokens.num_tokens).tolist() == [1, 2, 3, 4, 5, 6, 70000]
    assert [tokens.document_at(token) for token in (2, 4, 6)] == [(0, 0, 2), (1, 0, 1), (1, 1, 0)]


def test_pointers_past_4_gib(tmp_path: Path) -> None:
    lengths, last = [2_000_000_000, 600_000_000, 84_354_560, 6], [11, 12, 13, 14, 15, 16]
    total = sum(lengths)
    prefix = tmp_path / "big"
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * total)  # a hole: takes no room on disk
        file.seek(2 * (total - 6))
        file.write(np.array(last, "<u2").tobytes())
    with indexed._IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write(lengths, None, [0, 1, 3, 4])  # the second document has two sequences
    files = [tmp_path / "big.bin", tmp_path / "big.idx"]
    assert files[0].stat().st_size == 2 * total > 5 * 2**30
    assert sum(file.stat().st_blocks * 512 for file in files) < 2**20
    pointer = struct.unpack_from("<q", files[1].read_bytes(), 34 + 4 * 4 + 8 * 3)[0]
    assert pointer == 2 * (total - 6) > 2**32

    domain = DomainTokens("web", [prefix], total)
    window = domain.num_windows(2048) - 1
    start = window * 2048
    expected = np.concatenate([np.zeros(total - 6 - start, np.uint16), np.array(last, np.uint16)])[:2049]
    np.testing.assert_array_equal(domain.window(window, 2048), expected)
    assert domain.read(total - 8, 8).tolist() == [0, 0, *last]
    assert domain.document_at(total - 1) == (0, 2, 5)
    assert domain.document_at(total - 7) == (0, 1, 684_354_559)
    part = DomainTokens("web", [prefix], 6, ranges=[(2, 3)])
    assert part.read(0, 6).tolist() == last
    dataset = indexed.IndexedDataset(str(prefix))  # kept: what it hands out lies in its memory map
    assert dataset[3].tolist() == last
