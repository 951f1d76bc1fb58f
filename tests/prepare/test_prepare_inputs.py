"""What prepare reads: the files a domain is found to have, an even sample of their texts, and every bad input or option
refused by name before anything is written."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from json_lines import jsonl

from megamix.core.errors import InputError
from megamix.prepare.documents import find_inputs
from megamix.prepare.pieces import iter_documents, pieces_of, read_piece
from megamix.prepare.pipeline import prepare
from megamix.prepare.samples import sample_texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 0.6}, "validation fraction 0.6: expected 0 to 0.5"),
        ({"validation_fraction": math.nan}, "validation fraction nan"),
        ({"workers": 0}, "workers 0: expected at least 1"),
        ({"tokenizer": "train:256"}, "256 is too small"),
        ({"tokenizer": "train:many"}, "expected train:SIZE"),
        ({"tokenizer": "hf:"}, "expected hf:NAME"),
        ({"tokenizer": "missing.json"}, "no such file"),
        ({"text_key": "body"}, r"line 1: no key 'body' \(keys: text\)"),
        ({"eod": "<nothing>"}, "no end-of-document token .looked for <nothing>"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    (tmp_path / "web.jsonl").write_bytes(jsonl(["one", "two"]))
    with pytest.raises(InputError, match=message):
        prepare([str(tmp_path)], tmp_path / "out", **{"tokenizer": "train:300", "workers": 1, **options})
    assert not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", jsonl(["x"]) + b'{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'\n\n{"body": "x"}', r"a\.jsonl, line 3: no key 'text'"),
        ("a.jsonl", jsonl(["x"]) + b'{"text": "\xff"}\n', r"a\.jsonl, line 2: not valid UTF-8 \(byte 0xff"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' is NoneType, expected a string"),
        ("a.jsonl", b'["text"]\n', "line 1: holds list, expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the escape .ud800"),
        ("a.txt", b"one\ntwo\n\xe4", r"a\.txt, line 3: not valid UTF-8 \(byte 0xe4"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x"] * 50), mtime=0)[:-12], r"a\.jsonl\.gz, line \d+: .*cut short"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz, line 1: .*damaged"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x"]), mtime=0) + b"rest", r"a\.jsonl\.gz, line 2: .*damaged"),
        ("a.jsonl.zst", zstandard.compress(jsonl(["x"] * 50))[:-5], r"a\.jsonl\.zst, line \d+: .*cut short"),
        ("a.jsonl.zst", zstandard.compress(jsonl(["x"])) + b"rest", r"a\.jsonl\.zst, line 2: .*damaged"),
        ("a.jsonl.bz2", bz2.compress(jsonl(["x"] * 50))[:-5], r"a\.jsonl\.bz2, line \d+: .*cut short"),
        ("a.jsonl.bz2", b"BZh91AY&SYplain", r"a\.jsonl\.bz2, line 1: .*damaged"),
        ("a.ndjson.xz", lzma.compress(jsonl(["x"] * 50))[:-5], r"a\.ndjson\.xz, line \d+: .*cut short"),
        ("a.ndjson.xz", lzma.compress(jsonl(["x"])) + b"rest", r"a\.ndjson\.xz, line 2: .*damaged"),
    ],
)
def test_damaged_input(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(iter_documents(tmp_path / "in" / name))
    with pytest.raises(InputError, match=message):
        prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer="train:300", workers=1, progress=False)
    assert not list((tmp_path / "out").rglob("*.bin*"))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.ndjson", bytes),
        ("A.JSONL", bytes),
        ("a.JSONL.GZ", gzip.compress),
        ("a.ndjson.zst", zstandard.compress),
        ("a.jsonl.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
    ],
)
def test_every_ending(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    """Found in a folder, under the domain's name; also of two compressed streams in one file, in blocks and sampled."""
    given = [f"text number {number} " * 20 for number in range(4000)]
    (tmp_path / name).write_bytes(pack(jsonl(given[:1500])) + pack(jsonl(given[1500:])))
    ((domain, paths),) = find_inputs([str(tmp_path)]).items()
    assert (domain, paths) == (name.partition(".")[0], [tmp_path / name])
    assert list(iter_documents(paths[0])) == given
    blocks = list(read_piece(*pieces_of(paths[0]), block_bytes=1 << 16))
    assert len(blocks) > 3
    assert [text for block in blocks for text in block.documents().texts] == given
    assert sum(block.file_bytes for block in blocks) == paths[0].stat().st_size
    assert set() < set(sample_texts(paths, num_bytes=1 << 18)) <= set(given)


@pytest.mark.parametrize(
    ("record", "key", "text"),
    [
        ('{"text": "x"}', "text", "x"),
        ('{"data": {"text": "x"}}', "data.text", "x"),
        ('{"a": {"b": {"c": "x"}}}', "a.b.c", "x"),
        ('{"a.b": "x", "a": {"b": "y"}}', "a.b", "x"),
        ('{"a": {"b.c": "x"}}', "a.b.c", "x"),
    ],
)
def test_a_key_of_an_object_in_an_object(tmp_path: Path, record: str, key: str, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(record + "\n")
    assert list(iter_documents(path, key)) == [text]
    with pytest.raises(InputError, match=rf"line 1: no key '{key}\.z'"):
        list(iter_documents(path, f"{key}.z"))


def test_line_of_damage_in_a_later_block(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["some text"] * 1000) + b"broken\n")
    with pytest.raises(InputError, match="line 1001: not valid JSON"):
        [block.documents() for block in read_piece(*pieces_of(tmp_path / "a.jsonl"), block_bytes=100)]
    rng = np.random.default_rng(0)
    lines = jsonl([rng.bytes(100).hex() for _ in range(5000)])
    cut = zstandard.compress(lines)[:-2000]
    (tmp_path / "a.jsonl.zst").write_bytes(cut)
    with pytest.raises(InputError, match=r"line (3|4)\d\d\d: .*cut short"):
        list(iter_documents(tmp_path / "a.jsonl.zst"))


def test_too_few_documents(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("only one")
    with pytest.raises(InputError, match="domain 'web' has 1 non-empty documents, expected at least 2"):
        prepare([str(tmp_path)], tmp_path / "out", tokenizer="train:300", workers=1, progress=False)
    assert not list((tmp_path / "out").rglob("*.bin*"))


def test_find_inputs(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/deep/1.jsonl", "b/notes.md", "a.jsonl.zst", "c.csv", ".cache/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs([str(tmp_path), f"one={tmp_path}/b/*.txt,{tmp_path}/a.jsonl.zst", f"two={tmp_path}/b"])
    assert list(found) == ["a", "b", "one", "two"]
    assert found["b"] == found["two"] == [tmp_path / "b/2.txt", tmp_path / "b/deep/1.jsonl"]
    assert found["one"] == [tmp_path / "a.jsonl.zst", tmp_path / "b/2.txt"]
    for specs, message in (
        ([], "no input found"),
        ([str(tmp_path / "nowhere")], "neither a folder nor of the form"),
        ([str(tmp_path / "b/2.txt")], "To use it as a domain: 2="),
        ([f"x={tmp_path}/nowhere/*.txt"], "domain 'x': no file matches"),
        ([f"x={tmp_path}/c.csv"], "of an unknown kind"),
        ([f" x={tmp_path}/a.jsonl.zst"], "' x' cannot be the name"),
        (["x="], "names no files"),
        ([str(tmp_path), f"a={tmp_path}/b/2.txt"], "two domains are called 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            find_inputs(specs)
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(InputError, match="two domains are called 'b'"):
        find_inputs([str(tmp_path)])
    (tmp_path / "b.txt").unlink()
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError, match=r"domain 'e': the folder .* holds no"):
        find_inputs([str(tmp_path)])
    (tmp_path / "e" / "x.txt").write_text("")
    with pytest.raises(InputError, match="domain 'e' is empty"):
        find_inputs([str(tmp_path)])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_unreadable_input(tmp_path: Path) -> None:
    (tmp_path / "web.txt").write_text("x")
    (tmp_path / "web.txt").chmod(0)
    with pytest.raises(InputError, match="domain 'web': cannot read"):
        find_inputs([str(tmp_path)])


def test_sample_is_even_bounded_and_repeatable(tmp_path: Path) -> None:
    texts = [f"{number:06} " + "word " * 100 for number in range(8000)]
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(jsonl(texts))
    packed.write_bytes(gzip.compress(jsonl(texts), 1))
    for path in (plain, packed):
        sample = list(sample_texts([path], num_bytes=1 << 18))
        assert sample == list(sample_texts([path], num_bytes=1 << 18))
        assert 1 << 17 < sum(map(len, sample)) < 1 << 19
    numbers = [int(text[:6]) for text in sample_texts([plain], num_bytes=1 << 18)]
    assert numbers == sorted(set(numbers))
    assert max(np.diff(numbers)) < 100
    assert list(sample_texts([plain], num_bytes=1 << 30)) == texts


def test_files_whose_names_are_no_utf8(tmp_path: Path) -> None:
    """They are read as others are, and kept when nothing has changed."""
    folder = tmp_path / "in" / "web"
    folder.mkdir(parents=True)
    for name in (b"\xff.jsonl", b"a\nb.jsonl"):
        (folder / os.fsdecode(name)).write_text('{"text": "one two three"}\n' * 20)
    out = tmp_path / os.fsdecode(b"out\xff")
    times = []
    for _ in range(2):
        manifest = prepare([str(tmp_path / "in")], out, tokenizer="train:300", workers=1, progress=False)
        assert manifest is not None
        assert manifest.domain("web").train.documents + manifest.domain("web").validation.documents == 40
        times.append((out / "web" / "train.bin").stat().st_mtime_ns)
    assert times[0] == times[1]
