"""Token files: Megatron's bytes, damaged files, windows across file borders."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ENVIRONMENT

from megamix.core.errors import InputError
from megamix.data.tokens.indexed import IndexedTokens, pick_dtype
from megamix.data.tokens.mapped_files import TOKEN_FILES, MappedFiles
from megamix.data.tokens.stream import DomainTokens
from megamix.data.tokens.writer import IndexedWriter

# Written once by megatron-core 0.16.1's IndexedDatasetBuilder.
GOLDEN_DOCUMENTS = [[1, 2, 65499], [7], [300, 0]]
GOLDEN_BIN = bytes.fromhex("01000200dbff07002c010000")
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800000100000000000000080300000000000000040000000000000003000000010000000200000000000000000000000600"
    "00000000000008000000000000000000000000000000010000000000000002000000000000000300000000000000"
)
# The documents [1, 2, 70000, 4, 5], cut into sequences of 2 and 3 tokens, and [9], as int32.
CUT_BIN = bytes.fromhex("010000000200000070110100040000000500000009000000")
CUT_IDX = bytes.fromhex(
    "4d4d4944494458000001000000000000000403000000000000000300000000000000020000000300000001000000000000000000000008"
    "000000000000001400000000000000000000000000000002000000000000000300000000000000"
)


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def test_bytes_are_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_documents_added_together_are_the_same_files(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", "uint16")
    writer.add_documents(np.array([1, 2, 65499, 7]), [3, 1])
    writer.add_documents([300, 0], [2])
    written = writer.close()
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert (written.tokens, written.documents, written.max_token) == (6, 3, 65499)
    assert writer.close() is written


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_against_megatron_core(tmp_path: Path, dtype: str) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 65000, size=size) for size in rng.integers(1, 200, size=300)]
    theirs = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    with IndexedWriter(tmp_path / "ours", dtype) as ours:
        for document in documents:
            theirs.add_document(torch.from_numpy(document), [len(document)])
            ours.add_document(document)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == len(documents)
    np.testing.assert_array_equal(dataset[17], documents[17])


def test_reads_documents_cut_into_sequences(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CUT_BIN)
    (tmp_path / "a.idx").write_bytes(CUT_IDX)
    tokens = IndexedTokens(tmp_path / "a")
    assert (tokens.num_tokens, tokens.num_documents, tokens.num_sequences) == (6, 2, 3)
    assert tokens.dtype == np.int32
    assert tokens.tokens.tolist() == [1, 2, 70000, 4, 5, 9]
    assert tokens.document_starts.tolist() == [0, 5]
    assert [tokens.document_at(token) for token in (0, 4, 5)] == [(0, 0), (0, 4), (1, 0)]


def test_dots_in_names_and_no_documents(tmp_path: Path) -> None:
    tokens = IndexedTokens(write(tmp_path / "a.b", []))
    assert (tokens.num_tokens, tokens.num_documents, len(tokens.document_starts)) == (0, 0, 0)
    assert (tmp_path / "a.b.bin").stat().st_size == 0


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (250_000, "int32")]
)
def test_dtype_rule_is_megatrons(vocab_size: int, dtype: str) -> None:
    assert pick_dtype(vocab_size).name == dtype


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"70000 do not fit uint16 \(0 to 65535\)"),
        IndexedWriter(tmp_path / "a", "uint16") as writer,
    ):
        writer.add_document([70000])
    with pytest.raises(InputError, match="float16"):
        IndexedWriter(tmp_path / "a", "float16")
    assert list(tmp_path.iterdir()) == []


def test_abort_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    with pytest.raises(InputError, match="do not fit"), IndexedWriter(tmp_path / "a", "uint16") as writer:
        writer.add_documents([5, 70000], [1, 1])
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def patched(data: bytes, offset: int, layout: str, value: int) -> bytes:
    field = struct.pack(layout, value)
    return data[:offset] + field + data[offset + len(field) :]


POINTERS = 34 + 3 * 4
BOUNDS = POINTERS + 3 * 8


@pytest.mark.parametrize(
    ("idx", "bin_", "message"),
    [
        (
            b"notanidx!" + GOLDEN_IDX[9:],
            GOLDEN_BIN,
            r"a\.idx is not a Megatron index.*b'notanidx!'.*expected b'MMIDIDX",
        ),
        (b"", GOLDEN_BIN, r"a\.idx is not a Megatron index.*0 bytes"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, r"a\.idx holds 20 bytes, expected at least 34"),
        (GOLDEN_IDX[:-1], GOLDEN_BIN, rf"a\.idx holds {len(GOLDEN_IDX) - 1} bytes, expected {len(GOLDEN_IDX)}"),
        (GOLDEN_IDX + b"x", GOLDEN_BIN, rf"a\.idx holds {len(GOLDEN_IDX) + 1} bytes, expected {len(GOLDEN_IDX)}"),
        (patched(GOLDEN_IDX, 9, "<Q", 2), GOLDEN_BIN, "version 2, expected 1"),
        (patched(GOLDEN_IDX, 17, "<B", 77), GOLDEN_BIN, "dtype code 77"),
        (GOLDEN_IDX, GOLDEN_BIN[:-2], r"a\.bin holds 10 bytes, but its index a\.idx expects 12 bytes"),
        (GOLDEN_IDX, GOLDEN_BIN + b"\0\0", r"a\.bin holds 14 bytes, but its index a\.idx expects 12 bytes"),
        (patched(GOLDEN_IDX, 34, "<i", 2), GOLDEN_BIN, r"sequence 1, 1 tokens long, has the pointer 6; .* byte 4"),
        (patched(GOLDEN_IDX, POINTERS + 8, "<q", 7), GOLDEN_BIN, "sequence 1.* pointer 7; .* byte 6"),
        (patched(GOLDEN_IDX, BOUNDS + 8, "<q", 3), GOLDEN_BIN, "bounds run from 0 to 3 and fall on the way"),
        (patched(GOLDEN_IDX, BOUNDS, "<q", 1), GOLDEN_BIN, "bounds run from 1 to 3"),
    ],
)
def test_damaged_files(tmp_path: Path, idx: bytes, bin_: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(bin_)
    (tmp_path / "a.idx").write_bytes(idx)
    with pytest.raises(InputError, match=message):
        IndexedTokens(tmp_path / "a")
    with pytest.raises(InputError, match=r"domain 'web': .*a"):
        DomainTokens("web", [tmp_path / "a"])


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.bin: No such file"):
        IndexedTokens(tmp_path / "a")
    with pytest.raises(InputError, match="domain 'web': no token files"):
        DomainTokens("web", [])


@pytest.fixture
def domain(tmp_path: Path) -> tuple[DomainTokens, list[list[list[int]]]]:
    """Three files, one of them empty, with documents of 1 to 9 tokens; and the documents."""
    rng = np.random.default_rng(1)
    files = [[rng.integers(0, 1000, size=size).tolist() for size in rng.integers(1, 10, size=n)] for n in (13, 0, 8)]
    prefixes = [write(tmp_path / f"part{number}", documents) for number, documents in enumerate(files)]
    return DomainTokens("web", prefixes, sum(len(d) for f in files for d in f)), files


def test_windows_cross_file_borders(domain: tuple[DomainTokens, list[list[list[int]]]]) -> None:
    tokens, files = domain
    flat = [token for file in files for document in file for token in document]
    assert tokens.num_tokens == len(flat)
    assert tokens.num_documents == 21
    for seq_length in (1, 3, 7, len(flat) - 1, len(flat), 10 * len(flat)):
        assert tokens.num_windows(seq_length) == (len(flat) - 1) // seq_length
        for index in range(tokens.num_windows(seq_length)):
            window = tokens.window(index, seq_length)
            assert window.tolist() == flat[index * seq_length : index * seq_length + seq_length + 1]
            assert window.dtype == np.uint16
    for start in range(len(flat) + 1):
        for length in range(len(flat) - start + 1):
            assert tokens.read(start, length).tolist() == flat[start : start + length]


def test_documents_of_tokens(domain: tuple[DomainTokens, list[list[list[int]]]]) -> None:
    tokens, files = domain
    wanted = [
        (number, index, offset)
        for number, file in enumerate(files)
        for index, document in enumerate(file)
        for offset in range(len(document))
    ]
    assert [tokens.document_at(token) for token in range(tokens.num_tokens)] == wanted


def test_outside_of_the_stream(domain: tuple[DomainTokens, list[list[list[int]]]]) -> None:
    tokens, _ = domain
    end = tokens.num_tokens
    for start, length in ((-1, 2), (end - 1, 2), (0, -1)):
        with pytest.raises(InputError, match=f"domain 'web': tokens {start} to .* it holds 0 to {end}"):
            tokens.read(start, length)
    with pytest.raises(InputError, match=r"window 1000 of 3 tokens asked for, but it has \d+ windows"):
        tokens.window(1000, 3)
    with pytest.raises(InputError, match=f"token {end} asked for"):
        tokens.document_at(end)


def test_expected_tokens_and_pickling(domain: tuple[DomainTokens, list[list[list[int]]]]) -> None:
    tokens, _ = domain
    prefixes = [file.prefix for file in tokens.files]
    with pytest.raises(InputError, match=f"domain 'web': .* hold {tokens.num_tokens} tokens, but the manifest says 5"):
        DomainTokens("web", prefixes, 5)
    pickled = pickle.dumps(tokens)
    assert len(pickled) < 2000
    np.testing.assert_array_equal(pickle.loads(pickled).read(0, tokens.num_tokens), tokens.read(0, tokens.num_tokens))


def test_files_of_two_dtypes_read_as_the_wider(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / "a", [[1, 2]]), write(tmp_path / "b", [[70000]], "int32")]
    tokens = DomainTokens("web", prefixes)
    assert tokens.read(0, 3).tolist() == [1, 2, 70000]
    assert tokens.dtype == np.int32


def test_ranges_of_documents(domain: tuple[DomainTokens, list[list[list[int]]]]) -> None:
    """Part of the first file, none of the empty one, the end of the last; counts, tokens, windows and documents are
    those of the documents in the ranges, and documents keep their number in the file."""
    whole, files = domain
    prefixes = [file.prefix for file in whole.files]
    for ranges in ([(2, 5), (0, 0), (6, 8)], [None, None, (0, 3)], [(4, 4), None, (3, 4)], [None, (0, 0), None]):
        spans = [(0, len(file)) if span is None else span for span, file in zip(ranges, files, strict=True)]
        wanted = [
            (token, (number, document, offset))
            for number, (first, end) in enumerate(spans)
            for document in range(first, end)
            for offset, token in enumerate(files[number][document])
        ]
        flat = [token for token, _ in wanted]
        tokens = DomainTokens("web", prefixes, len(flat), ranges=ranges)
        assert (tokens.num_tokens, tokens.num_documents) == (len(flat), sum(end - first for first, end in spans))
        assert tokens.read(0, len(flat)).tolist() == flat
        assert [tokens.document_at(token) for token in range(len(flat))] == [place for _, place in wanted]
        assert tokens.num_windows(3) == (len(flat) - 1) // 3
        for index in range(tokens.num_windows(3)):
            assert tokens.window(index, 3).tolist() == flat[3 * index : 3 * index + 4]
        with pytest.raises(InputError, match=f"it holds 0 to {len(flat)}"):
            tokens.read(len(flat), 1)


@pytest.mark.parametrize("span", [(0, 9), (-1, 2), (5, 4)])
def test_ranges_that_do_not_fit(domain: tuple[DomainTokens, list[list[list[int]]]], span: tuple[int, int]) -> None:
    prefixes = [file.prefix for file in domain[0].files]
    asked = rf"domain 'web': documents {span[0]} to {span[1]} of .*part2 asked for, .* 0 to 8\."
    with pytest.raises(InputError, match=asked):
        DomainTokens("web", prefixes, ranges=[None, None, span])
    with pytest.raises(InputError, match="domain 'web': 2 document ranges for 3 token files"):
        DomainTokens("web", prefixes, ranges=[None, None])


def test_ranges_of_documents_cut_into_sequences(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CUT_BIN)
    (tmp_path / "a.idx").write_bytes(CUT_IDX)
    assert DomainTokens("web", [tmp_path / "a"], ranges=[(0, 1)]).read(0, 5).tolist() == [1, 2, 70000, 4, 5]
    second = DomainTokens("web", [tmp_path / "a"], ranges=[(1, 2)])
    assert (second.num_tokens, second.read(0, 1).tolist(), second.document_at(0)) == (1, [9], (0, 1, 0))


MANY_FILES = """
import os, resource, sys
import numpy as np
from megamix.data.tokens.mapped_files import TOKEN_FILES, MappedFiles
from megamix.data.tokens.stream import DomainTokens
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
domain = DomainTokens("web", [f"{sys.argv[1]}{number}" for number in range(100)])
tokens = domain.read(0, domain.num_tokens).tolist()
assert tokens == domain.read(0, 6).tolist() * 100
print(domain.num_tokens, domain.document_starts(np.arange(100), 5)[0].size, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
held = [open("/dev/null") for _ in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd")))]
assert domain.read(0, domain.num_tokens).tolist() == tokens
print("read again with all other descriptors taken")
"""


def test_more_files_than_the_soft_limit(tmp_path: Path) -> None:
    """Half as many files are mapped as may be opened: a hard limit of 64 is enough for 200 files, even when something
    else has taken all other descriptors."""

    def run(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", MANY_FILES, str(tmp_path / "a"), str(soft), str(hard)]
        return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False)

    for number in range(100):
        write(tmp_path / f"a{number}", GOLDEN_DOCUMENTS)
    for soft, hard in ((64, 300), (64, 64)):
        done = run(soft, hard)
        seen = done.stdout.split(maxsplit=3)
        assert (seen[0], seen[2:]) == ("600", [str(hard), "read again with all other descriptors taken\n"]), done.stderr


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_file_that_changes_after_the_start_is_refused(tmp_path: Path, ending: str) -> None:
    """Files are opened when they are read, which may be hours later."""
    write(tmp_path / "a", GOLDEN_DOCUMENTS)
    tokens = IndexedTokens(tmp_path / "a")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=rf"a\.{ending} holds .* but held .* it was changed"):
        tokens.tokens.sum() if ending == "bin" else tokens.document_at(0)


def test_a_file_written_anew_under_its_name_is_another_one(tmp_path: Path) -> None:
    """What was mapped of the old one is not read for the new one, and is closed when nobody has it any more."""
    before = IndexedTokens(write(tmp_path / "a", GOLDEN_DOCUMENTS))
    assert before.tokens.tolist() == [1, 2, 65499, 7, 300, 0]
    (tmp_path / "a.bin").unlink()
    write(tmp_path / "a", [[5, 5]])
    assert IndexedTokens(tmp_path / "a").tokens.tolist() == [5, 5]
    assert before.tokens.tolist() == [1, 2, 65499, 7, 300, 0]
    kept = len(TOKEN_FILES)
    del before
    assert len(TOKEN_FILES) == kept - 1


def test_the_files_read_least_lately_are_dropped_first() -> None:
    files = MappedFiles(most=2)
    made = []
    for key in ("a", "b", "a", "c", "a", "b"):
        files.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]
    assert len(files) == 2
