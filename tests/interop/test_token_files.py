"""``megamix blend adopt`` of other projects' token files: the tokens and documents of each kind, and what is refused.

The files are written here by the layouts that their sources give. What dolma, datatrove and mosaicml-streaming write
themselves was adopted, too, and compared, when this was made.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from interop_files import EOD, blend, error_of, write_tokenizer

from megamix.data.tokens.indexed import IndexedTokens, bin_path
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.verify import verify_all
from megamix.data.tokens.writer import IndexedWriter
from megamix.interop.token_files.documents import Cutter
from megamix.mixing.weight_files import read_weights

LENGTHS = np.random.default_rng(3).integers(1, 40, 60).tolist()
DOCUMENTS = [
    [*np.random.default_rng(number).integers(1, 256, length - 1).tolist(), EOD] for number, length in enumerate(LENGTHS)
]
TOKENS = np.concatenate(DOCUMENTS)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


def raw(path: Path, dtype: str, tokens: Any = TOKENS, head: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + np.asarray(tokens).astype(dtype).tobytes())
    return path


def ds(path: Path, dtype: str, ends: Any = None, size: int | None = None) -> Path:
    raw(path, dtype)
    np.cumsum(LENGTHS if ends is None else ends).astype("<u8").tofile(f"{path}.index")
    if size is not None:
        Path(f"{path}.metadata").write_text(f"gpt2|{size}\n{len(TOKENS)}\n1 T")
    return path.parent


def numpy_file(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def mds(folder: Path, encoding: str, encode: Callable[[np.ndarray], bytes], *, packed: bool = False) -> Path:
    """Shards of 10 samples of up to 16 tokens, between a column of 8 bytes and one of text."""
    folder.mkdir(parents=True)
    samples = [TOKENS[start : start + 16] for start in range(0, len(TOKENS), 16)]
    shards = []
    for number, first in enumerate(range(0, len(samples), 10)):
        held = []
        for place, sample in enumerate(samples[first : first + 10]):
            columns = [b"12345678", encode(sample), b"x" * (place % 3)]
            held.append(np.array([len(columns[1]), len(columns[2])], "<u4").tobytes() + b"".join(columns))
        config = json.dumps({"column_names": ["id", "tokens", "url"]}).encode()
        head = 4 + 4 * (len(held) + 1) + len(config)
        offsets = head + np.cumsum([0, *map(len, held)])
        data = np.array([len(held), *offsets], "<u4").tobytes() + config + b"".join(held)
        name = f"shard.{number:05}.mds"
        raw_data = {"basename": name, "bytes": len(data), "hashes": {}}
        zip_data = {"basename": name + ".gz", "bytes": 0, "hashes": {}} if packed else None
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
        info = {"column_names": ["id", "tokens", "url"], "column_encodings": ["int", encoding, "str"],
                "column_sizes": [8, None, None], "compression": "gz:5" if packed else None, "format": "mds",
                "raw_data": raw_data, "samples": len(held), "version": 2, "zip_data": zip_data}  # fmt: skip
        shards.append(info)
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return folder


def with_shape(sample: np.ndarray) -> bytes:
    """One dimension, whose size takes a byte."""
    return bytes([1 << 2, len(sample)]) + sample.astype("<u2").tobytes()


def table(path: Path, rows: Any, kind: Any = None) -> Path:
    """Rows of token ids, in parquet, or in arrow's stream format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int32())), "n": list(range(len(rows)))})
    if path.suffix == ".parquet":
        pq.write_table(rows, path, row_group_size=9)
        return path
    with pa.ipc.new_stream(path, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=7):
            writer.write_batch(batch)
    return path


def saved(folder: Path) -> Path:
    """A dataset that ``save_to_disk`` wrote, beside which ``map`` has left a file."""
    table(folder / "data-00000-of-00001.arrow", [TOKENS[at : at + 16].tolist() for at in range(0, len(TOKENS), 16)])
    table(folder / "cache-1.arrow", [[1, 2, EOD]])
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    return folder.parent


LLM_C = np.array([20240520, 1, len(TOKENS), *[0] * 253], "<i4").tobytes()
KINDS: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "olmo": (lambda at: raw(at / "part-0-00000.npy", "<u2"), True),
    "olmo uint32": (lambda at: raw(at / "a.npy", "<u4"), True),
    "numpy": (lambda at: numpy_file(at / "a.npy", TOKENS.astype(">i8")), False),
    "datatrove": (lambda at: ds(at / "b" / "a.ds", "<u2"), True),
    "datatrove, 4 bytes": (lambda at: ds(at / "b" / "a.ds", "<u4", size=4), True),
    "nanogpt": (lambda at: raw(at / "train.bin", "<u2"), True),
    "llm.c": (lambda at: raw(at / "train.bin", "<u2", head=LLM_C), False),
    "mds": (lambda at: mds(at / "mds", "ndarray:uint16", with_shape), False),
    "mds, types by sample": (lambda at: mds(at / "mds", "ndarray", lambda row: b"\x10" + with_shape(row)), False),
    "mds of bytes": (lambda at: mds(at / "mds", "bytes", lambda row: row.astype("<i8").tobytes()), False),
    "parquet": (lambda at: table(at / "a.parquet", DOCUMENTS), False),
    "arrow": (lambda at: table(at / "a.arrow", DOCUMENTS, pa.large_list(pa.int64())), False),
    "saved dataset": (lambda at: saved(at / "b" / "c"), False),
    "mds.gz": (lambda at: mds(at / "mds", "ndarray:uint16", with_shape, packed=True), False),
}


def taken(manifest: Manifest) -> list[int]:
    streams = [manifest.open_domain("web", split) for split in ("train", "validation")]
    assert [stream.num_documents for stream in streams] == [54, 6]
    return [token for stream in streams for token in stream.read(0, stream.num_tokens).tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_and_document(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    write, in_place = KINDS[kind]
    (tmp_path / "raw").mkdir()
    path, out = write(tmp_path / "raw"), tmp_path / "out"
    before = {each: each.read_bytes() for each in (tmp_path / "raw").rglob("*") if each.is_file()}
    more = ["--dtype", "uint32"] if kind == "olmo uint32" else []
    shown = blend("adopt", f"web={path}", "--out", out, "--tokenizer", tokenizer, "--split", "9,1,0", *more)
    assert ("1 file of token ids used in place" in shown, "1 converted" in shown) == (in_place, not in_place)
    assert "do not end with token" not in shown
    assert (out / "web/tokens-00000.bin").is_symlink() == in_place
    assert {each: each.read_bytes() for each in (tmp_path / "raw").rglob("*") if each.is_file()} == before
    manifest = Manifest.load(out)
    verify_all(manifest)
    assert taken(manifest) == TOKENS.tolist()


def test_a_blend_of_globs_and_megatron_s_files(tmp_path: Path, tokenizer: Path) -> None:
    for number in range(3):
        raw(tmp_path / f"web/part-{number}.npy", "<u2")
    raw(tmp_path / "web/labels_mask_part_0.npy", "<u2", [257] * 9)
    raw(tmp_path / "code.bin", "<u2")
    blend("adopt", f"code={tmp_path}/code.bin", "--out", tmp_path / "one", "--tokenizer", tokenizer)
    pair = tmp_path / "one/code/tokens-00000"
    given = f"3 {tmp_path}/web 1 {pair}.bin"
    names = [f"web={tmp_path}/web", f"code={pair}.bin"]
    out = tmp_path / "two"
    blend("adopt", *names, "--data-path", given, "--out", out, "--tokenizer", tokenizer, "--split", "9,1,0")
    manifest = Manifest.load(out)
    assert read_weights(out / "mixture.json", ["web", "code"]) == {"web": 0.75, "code": 0.25}
    assert manifest.domain("web").train.documents == 3 * 54
    blend(
        "adopt", f"w={tmp_path}/web/part*.npy", "-o", tmp_path / "three", "--tokenizer", tokenizer, "--split", "9,1,0"
    )
    assert Manifest.load(tmp_path / "three").domain("w").train == manifest.domain("web").train.model_copy(
        update={"prefixes": tuple(f"w/tokens-0000{number}" for number in range(3))}
    )
    assert manifest.domain("code").train.prefixes == (str(pair),)


def test_folders_and_globs_of_megatron_s_pairs(tmp_path: Path, tokenizer: Path) -> None:
    """However they are named, the same files; a folder of one split beside another is refused."""
    folder = tmp_path / "pairs"
    for name in ("b/web.1_text_document", "a_text_document"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(folder / name, "uint16") as writer:
            writer.add_documents(TOKENS, LENGTHS)
    first, second = folder / "a_text_document", folder / "b/web.1_text_document"
    for number, given in enumerate(
        (f"{first},{second}", folder, f"{folder}/**/*.bin", f"{folder}/**/*", f"{folder}/**/*_document", f"{first}.idx,{second}.bin")
    ):  # fmt: skip
        out = tmp_path / f"out-{number}"
        blend("adopt", f"web={given}", "--out", out, "--tokenizer", tokenizer, "--split", "9,1,0")
        entry = Manifest.load(out).domain("web")
        assert (entry.train.prefixes, entry.train.documents) == ((str(first), str(second)), 2 * 54)
    for split in ("train", "validation"):
        with IndexedWriter(tmp_path / split, "uint16") as writer:
            writer.add_documents(TOKENS, LENGTHS)
    given = ("adopt", f"web={tmp_path}", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert "holds the splits train and validation. Name one" in error_of(*given)


def test_a_row_is_a_document(tmp_path: Path, tokenizer: Path) -> None:
    """Of tables and shards without the token that ends documents, where asked for; the call before names the option."""
    rows = [row[:-1] for row in DOCUMENTS if len(row) > 1]
    table(tmp_path / "raw/a.parquet", [rows[0], [], *rows[1:40]])
    table(tmp_path / "raw/b.arrow", [*rows[40:], None])
    for path, expected in ((tmp_path / "raw", rows), (mds(tmp_path / "mds", "ndarray:uint16", with_shape), None)):
        out = tmp_path / f"out-{path.name}"
        given = ("adopt", f"web={path}", "--out", out, "--tokenizer", tokenizer, "--split", "9,1,0")
        if expected is not None:
            assert re.search("does not hold token 0.* where each row is a document, --documents row", error_of(*given))
        blend(*given, "--documents", "row")
        manifest = Manifest.load(out)
        lengths, tokens = [], []
        for split in ("train", "validation"):
            for prefix in getattr(manifest.domain("web"), split).prefixes:
                file = IndexedTokens(out / prefix)
                if prefix not in [seen for seen, _ in lengths]:
                    starts = file.starts_of(np.arange(file.num_documents + 1))
                    lengths.append((prefix, np.diff(starts).tolist()))
                    tokens += np.fromfile(bin_path(out / prefix), file.dtype).tolist()
        expected = expected or [TOKENS[at : at + 16] for at in range(0, len(TOKENS), 16)]
        assert [length for _, held in sorted(lengths) for length in held] == list(map(len, expected))
        assert tokens == [token for row in expected for token in row]


def test_lists_of_training_and_validation(tmp_path: Path, tokenizer: Path) -> None:
    train = mds(tmp_path / "c4/train", "ndarray:uint16", with_shape)
    held = raw(tmp_path / "c4/val/held.npy", "<u2", np.concatenate(DOCUMENTS[:5]))
    out = tmp_path / "out"
    assert "holds the splits train and val" in error_of(
        "adopt", f"c4={tmp_path}/c4", "-o", out, "--tokenizer", tokenizer
    )
    blend("adopt", f"c4={train},{held}", "--train-data-path", train, "--valid-data-path", held, "--out", out, "--tokenizer",
          tokenizer.parent)  # fmt: skip
    manifest = Manifest.load(out)
    assert manifest.domain("c4").train.documents == len(DOCUMENTS)
    assert manifest.domain("c4").validation.prefixes == ("c4/validation-00000",)
    assert manifest.domain("c4").validation.documents == 5


def test_a_second_call_keeps_what_is_finished(tmp_path: Path, tokenizer: Path) -> None:
    paths = [numpy_file(tmp_path / f"{number}.npy", TOKENS) for number in range(2)]
    given = ("adopt", f"web={paths[0]},{paths[1]}", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    files = [tmp_path / f"out/web/tokens-0000{number}.bin" for number in range(2)]
    blend(*given)
    whole = [path.read_bytes() for path in files]
    (tmp_path / "out/manifest.json").unlink()  # as if killed
    files[1].write_bytes(whole[1][:-2])
    numpy_file(paths[0], TOKENS[::-1])
    os.utime(paths[0], ns=(1, 1))
    blend(*given)
    assert files[0].read_bytes() == TOKENS[::-1].astype("<u2").tobytes()
    assert files[1].read_bytes() == whole[1]
    (tmp_path / "out/manifest.json").unlink()
    before = [path.stat().st_mtime_ns for path in files]
    blend(*given)
    assert [path.stat().st_mtime_ns for path in files] == before


REFUSED: list[tuple[Callable[[Path], Any], list[str], str]] = [
    (lambda at: raw(at / "a.npy", "<u4"), [], r"every second token is at most 0, .* Give --dtype uint32"),
    (lambda at: raw(at / "a.npy", "<u2", [5, 300, 0]), [], "a.npy, read as uint16, holds the token id 300, .* 0 to 2"),
    (lambda at: raw(at / "a.npy", "<u2"), ["--dtype", "uint32"], "multiple of 4|holds the token id"),
    (lambda at: raw(at / "a.npy", "u1"), ["--dtype", "uint16"], "multiple of 2|holds the token id"),
    (lambda at: raw(at / "a.npy", "<u2", []), [], "holds 0 bytes of tokens"),
    (lambda at: raw(at / "a.npy", "<u2", [7] * 9), [], "does not hold token 0, .*--eod"),
    (lambda at: numpy_file(at / "a.npy", np.ones((4, 8), int)), [], r"shape \(4, 8\), expected one dimension"),
    (lambda at: numpy_file(at / "a.npy", np.ones(4)), [], "holds float64, expected integers"),
    (lambda at: numpy_file(at / "a.npy", np.array([[]], object)), [], "cannot be read as one"),
    (lambda at: numpy_file(at / "a.npy", TOKENS), ["--dtype", "uint16"], "holds int64, but --dtype says uint16"),
    (lambda at: numpy_file(at / "a.npy", np.r_[np.ones(1 << 17, int), -1]), [], "'web': .*holds the token id -1"),
    (lambda at: ds(at / "a.ds", "<u2", LENGTHS[:-1]), [], r"a.ds.index: the last document ends after [0-9,]+ tokens"),
    (lambda at: ds(at / "a.ds", "<u2", [9, -4]), [], "the ends of documents fall"),
    (lambda at: raw(at / "a.npy", "<u2", head=LLM_C[:8] + bytes(4) + LLM_C[12:]), [], "its header says 0 tokens"),
    (lambda at: (mds(at / "x", "ndarray:uint16", with_shape) / "shard.00001.mds").unlink(), [], "shard.00001.mds, .*missing"),
    (lambda at: (mds(at / "x", "ndarray:uint16", with_shape) / "shard.00001.mds").write_bytes(b"1"), [], "has 1 bytes"),
    (lambda at: mds(at / "x", "str", with_shape), [], "the column 'tokens' is of str, expected bytes or ndarray"),
    (lambda at: mds(at / "x", "ndarray:int32", with_shape), [], "sample 0: its 34 bytes are no token ids of ndarray:int32"),
    (lambda at: mds(at / "x", "bytes", lambda row: b"123"), [], "no token ids of bytes .* --dtype"),
    (lambda at: table(at / "a.arrow", ["text"], pa.string()), [], "'input_ids' holds string, expected lists of integers"),
    (lambda at: table(at / "a.parquet", [[0.5]], pa.list_(pa.float32())), [], "expected lists of integers"),
    (lambda at: table(at / "a.parquet", [[1, None]]), [], "a token id that is null"),
    (lambda at: pq.write_table(pa.table({"text": ["x"]}), at / "a.parquet"), [], "the columns text, expected one of token"),
    (lambda at: (at / "a.arrow").write_bytes(b"no table"), [], "a.arrow is damaged"),
    (lambda at: None, [], "holds no token ids. Expected a Megatron prefix, a .npy"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "more", "message"), REFUSED)
def test_refused(tmp_path: Path, tokenizer: Path, write: Any, more: list[str], message: str) -> None:
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw")
    given = ("adopt", f"web={tmp_path}/raw", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    seen = error_of(*given, *more)
    assert re.search(message, seen), seen


def test_damaged_shards(tmp_path: Path, tokenizer: Path) -> None:
    given = ("adopt", f"web={tmp_path}/x", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    folder = mds(tmp_path / "x", "ndarray:uint16", with_shape, packed=True)
    shard = folder / "shard.00001.mds.gz"
    data = gzip.decompress(shard.read_bytes())
    shard.write_bytes(gzip.compress(data + b"\0" * 100))
    assert "has another size than index.json says" in error_of(*given)
    shard.write_bytes(gzip.compress(data)[:-30])
    assert "is damaged or cut short" in error_of(*given)
    for at, message in ((1, "its offsets do not fit"), (140, "sample [0-9] has [0-9]+ bytes")):
        shard.write_bytes(gzip.compress(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]))
        assert re.search(message, seen := error_of(*given)), seen


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_documents_whatever_the_pieces(size: int) -> None:
    tokens = np.concatenate([TOKENS, [3, 4]])
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    assert np.concatenate([*Cutter(EOD, "").lengths(pieces)]).tolist() == [*LENGTHS, 2]
    held = [*Cutter(EOD, "").documents(iter(pieces))]
    assert [length for _, lengths in held for length in lengths.tolist()] == [*LENGTHS, 2]
    assert all(len(part) == lengths.sum() for part, lengths in held)
    assert np.concatenate([part for part, _ in held]).tolist() == tokens.tolist()
