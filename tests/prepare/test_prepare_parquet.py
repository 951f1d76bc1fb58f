"""Parquet input: the same tokens as from .jsonl with the same texts, and every bad file refused by name and row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from json_lines import jsonl
from prepared import stdlib_texts

from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.prepare.documents import find_inputs
from megamix.prepare.pieces import iter_documents, pieces_of, read_piece
from megamix.prepare.pipeline import prepare
from megamix.prepare.samples import sample_texts


def write(path: Path, texts: list[Any], kind: Any = None, row_group_size: int = 7, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("block_bytes", [100, 30_000, 1 << 20])
def test_rows_in_order_whatever_the_blocks(tmp_path: Path, kind: Any, block_bytes: int) -> None:
    texts = ["", *stdlib_texts("email", 20), "Grüße 你好", " ", *stdlib_texts("json", 5)]
    path = write(tmp_path / "a.parquet", texts, kind)
    assert list(iter_documents(path)) == texts
    pieces = pieces_of(path)
    assert [piece.group.first_row for piece in pieces if piece.group] == [0, 7, 14, 21]
    assert sum(piece.num_bytes for piece in pieces) <= path.stat().st_size
    seen: list[str] = []
    places: list[int] = []
    for number, piece in enumerate(pieces):
        blocks = list(read_piece(piece, number, block_bytes=block_bytes))
        assert sum(block.file_bytes for block in blocks) == piece.num_bytes
        for block in blocks:
            documents = block.documents()
            seen += documents.texts
            places += documents.places.tolist()
    assert seen == texts
    assert places == list(range(len(texts)))


def test_same_tokens_as_from_json_lines(tmp_path: Path) -> None:
    texts = [*stdlib_texts("email", 25), "", *stdlib_texts("html", 5)]
    write(tmp_path / "rows" / "mail" / "a.parquet", texts[:11])
    write(tmp_path / "rows" / "mail" / "b.parquet", texts[11:], row_group_size=1000)
    (tmp_path / "lines" / "mail").mkdir(parents=True)
    (tmp_path / "lines" / "mail" / "a.jsonl").write_bytes(jsonl(texts))
    found: dict[str, list[str]] = {}
    for kind in ("rows", "lines"):
        options: dict[str, Any] = {"validation_fraction": 0.3, "progress": False}
        prepare([str(tmp_path / kind)], tmp_path / kind / ".out", tokenizer="train:400", workers=1, **options)
        manifest = Manifest.load(tmp_path / kind / ".out")
        tokenizer = manifest.load_tokenizer()
        found[kind] = []
        for split in ("train", "validation"):
            tokens = manifest.open_domain("mail", split)
            assert tokens.num_documents > 2
            found[kind] += tokenizer.decode(tokens.read(0, tokens.num_tokens)).split("<|endoftext|>")[:-1]
    assert sorted(found["rows"]) == sorted(found["lines"]) == sorted(text for text in texts if text)


def test_found_alone_in_folders_and_by_glob(tmp_path: Path) -> None:
    one = write(tmp_path / "web.parquet", ["x"])
    two = write(tmp_path / "code" / "deep" / "b.parquet", ["x"])
    assert find_inputs([str(tmp_path)]) == {"web": [one], "code": [two]}
    assert find_inputs([f"a={tmp_path}/code/*/*.parquet", f"b={one}"]) == {"a": [two], "b": [one]}


def test_sample_takes_from_all_row_groups(tmp_path: Path) -> None:
    texts = [f"{number:05} " + "word " * 100 for number in range(4000)]
    path = write(tmp_path / "a.parquet", texts, row_group_size=100)
    sample = list(sample_texts([path], num_bytes=1 << 17))
    assert sample == list(sample_texts([path], num_bytes=1 << 17))
    groups = {int(text[:5]) // 100 for text in sample}
    assert len(groups) == 40
    assert 1 << 16 < sum(map(len, sample)) < 1 << 19


@pytest.mark.parametrize(
    ("texts", "kind", "message"),
    [
        (["a", None, "b"], None, r"a\.parquet, row 2: 'text' is null, expected a string"),
        (["a"] * 20 + [None], None, r"a\.parquet, row 21: 'text' is null"),
        ([1, 2], pa.int64(), "the column 'text' holds int64, expected strings or bytes"),
        ([["a"]], pa.list_(pa.string()), "the column 'text' holds list<.*>, expected strings or bytes"),
    ],
)
def test_bad_rows_and_columns(tmp_path: Path, texts: list[Any], kind: Any, message: str) -> None:
    path = write(tmp_path / "a.parquet", texts, kind)
    with pytest.raises(InputError, match=message):
        list(iter_documents(path))
    with pytest.raises(InputError, match=message):
        prepare([f"a={path}"], tmp_path / "out", tokenizer="train:300", workers=1, progress=False)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_field_of_a_struct(tmp_path: Path, ending: str) -> None:
    """``row.body.text``; a row without the struct is one without a text. A column of that very name comes first."""
    rows = [{"n": 1, "body": {"text": text, "x": 2}} for text in ("one", "two", "three")]
    path = tmp_path / f"a{ending}"

    def save(table: pa.Table) -> None:
        if ending == ".parquet":
            pq.write_table(table, path, row_group_size=2)
            return
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    save(pa.table({"id": [1, 2, 3], "row": rows}))
    assert list(iter_documents(path, "row.body.text")) == ["one", "two", "three"]
    for key, message in (
        ("row.title", r"no column 'row.title' \(columns: n, body\)"),
        ("row.body", "the column 'row.body' holds struct<"),
        ("row.body.x", "the column 'row.body.x' holds int64"),
        ("id.text", r"no column 'id.text' \(columns: none\)"),
    ):
        with pytest.raises(InputError, match=message):
            list(iter_documents(path, key))
    save(pa.table({"row": [rows[0], {**rows[1], "body": None}]}))
    with pytest.raises(InputError, match="row 2"):
        list(iter_documents(path, "row.body.text"))
    save(pa.table({"row": rows, "row.body.text": ["a", "b", "c"]}))
    assert list(iter_documents(path, "row.body.text")) == ["a", "b", "c"]


def test_no_such_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a", "b"])
    with pytest.raises(InputError, match=r"a\.parquet: no column 'body' \(columns: id, text\)"):
        list(iter_documents(path, "body"))


def test_invalid_utf8_names_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"fine", b"br\xffken"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # as some writers do it, unchecked
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet, row 3: not valid UTF-8 \(byte 0xff"):
        list(iter_documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize("damage", ["cut", "no parquet", "pages"])
def test_damaged_file(tmp_path: Path, damage: str) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.parquet", [rng.bytes(200).hex() for _ in range(100)], use_dictionary=False)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-100]
    elif damage == "no parquet":
        data = bytearray(b"plain text that is no parquet file")
    else:
        data[: len(data) // 2] = b"PAR1" + bytes(len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet.*damaged"):
        list(iter_documents(path))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ["a", "b"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow, .*pip install 'megamix\[prepare\]'"):
        prepare([f"a={path}"], tmp_path / "out", tokenizer="train:300", workers=1, progress=False)
