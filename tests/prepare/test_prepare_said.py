"""What `prepare` does beside the plain work is said: files passed over, documents left out or held out, a tokenizer
made deterministic. What it is asked for it can do: another end of document, an output inside the input, any name."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from json_lines import jsonl
from tokenizers import Tokenizer, models

from megamix.core.errors import DataChanged, InputError
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.tokenizer import LoadedTokenizer
from megamix.data.tokens.verify import verify_all
from megamix.prepare.documents import find_inputs
from megamix.prepare.merge import merge
from megamix.prepare.pipeline import prepare

WORDS = ["river", "stone", "letter", "garden", "quick", "slow", "paper", "music", "light", "under", "table", "winter"]


def texts(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 40)) for _ in range(number)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(texts(60)))
    return path


def run(*inputs: object, out: Path, tokenizer: object = "train:300", **options) -> Manifest:
    manifest = prepare([str(spec) for spec in inputs], out, tokenizer=str(tokenizer), workers=1, **options)
    assert manifest is not None
    return manifest


def documents(manifest: Manifest, name: str) -> tuple[int, int]:
    entry = manifest.domain(name)
    return entry.train.documents, entry.validation.documents


def test_eod_by_name(text: Path, tmp_path: Path) -> None:
    run(f"a={text}", out=tmp_path / "first")
    other = tmp_path / "t.json"
    other.write_text((tmp_path / "first/tokenizer.json").read_text().replace("<|endoftext|>", "<|fin|>"))
    with pytest.raises(InputError, match="Name one of its tokens with --eod"):
        run(f"a={text}", out=tmp_path / "second", tokenizer=other)
    manifest = run(f"a={text}", out=tmp_path / "second", tokenizer=other, eod="<|fin|>")
    assert manifest.domains[0].train.sha256 == Manifest.load(tmp_path / "first").domains[0].train.sha256


def test_validation_0_is_said(text: Path, tmp_path: Path, logged: list[str]) -> None:
    manifest = run(f"a={text}", out=tmp_path / "out", validation_fraction=0.0)
    assert documents(manifest, "a") == (59, 1)
    assert any("--validation 0: one document of every domain is held out all the same" in line for line in logged)


def test_the_line_of_a_domain_has_the_validation_tokens(text: Path, tmp_path: Path, logged: list[str]) -> None:
    """With a share of 1/1000 chance holds out none of 60 documents."""
    manifest = run(f"a={text}", out=tmp_path / "out", validation_fraction=0.001)
    entry = manifest.domain("a")
    assert documents(manifest, "a") == (59, 1)
    assert any(f"a: {entry.train.tokens:,} + {entry.validation.tokens:,} tokens" in line for line in logged)
    assert any("chance left no document to validate with" in line for line in logged)
    assert not any("+ 0 tokens" in line for line in logged)


def test_files_passed_over_are_said(tmp_path: Path, logged: list[str]) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "part-0.jsonl").write_bytes(jsonl(texts(20)))
    (part / "part-1.json.gz").write_bytes(gzip.compress(jsonl(texts(20))))
    (part / "part-2.csv").write_bytes(jsonl(texts(20)))
    (part / ".hidden.jsonl").write_text("")
    assert find_inputs([f"x={part}"]) == {"x": [part / "part-0.jsonl"]}
    (line,) = logged
    assert line.startswith(f"{part}: 2 files passed over")
    assert "part-1.json.gz, part-2.csv" in line
    logged.clear()
    find_inputs([str(tmp_path)])
    assert [line.split(":")[0] for line in logged] == [str(part)]


@pytest.mark.parametrize("shards", [1, 3])
def test_documents_without_text(tmp_path: Path, logged: list[str], shards: int) -> None:
    given = texts(40)
    given[3:3] = ["", " \n\t", ""]
    given.append("   ")
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(given) + b"\n \n")  # blank lines are no documents

    def made(name: str, **options) -> Manifest:
        if shards == 1:
            return run(f"a={path}", out=tmp_path / name, **options)
        prepare([f"a={path}"], tmp_path / name, tokenizer="train:300", tokenizer_only=True, workers=1)
        for number in range(1, shards + 1):
            shard = {"shard": f"{number}/{shards}", "tokenizer": "train:300", "block_bytes": 2000, "workers": 1}
            prepare([f"a={path}"], tmp_path / name, **shard, **options)
        return merge(tmp_path / name)

    left_out = made("without")
    assert sum(documents(left_out, "a")) == 40
    count = [int(line.split(" document")[0].split(", ")[-1]) for line in logged if "without text left out" in line]
    assert sum(count) == 4
    logged.clear()
    kept = made("with", keep_empty=True)
    assert sum(documents(kept, "a")) == 44
    assert not any("left out" in line for line in logged)
    tokenizer = LoadedTokenizer(tmp_path / "with/tokenizer.json")
    # As Megatron-LM's preprocess_data: an empty document has no token, white space has its own and the end.
    wanted = sorted([*ids, tokenizer.eod_id] if ids else [] for ids in tokenizer.encode_batch(given))
    seen = []
    for split in ("train", "validation"):
        for file in kept.open_domain("a", split).files:
            starts = [*file.document_starts.tolist(), file.num_tokens]
            seen += [file.tokens[start:end].tolist() for start, end in itertools.pairwise(starts)]
    assert sorted(seen) == wanted


def test_a_killed_prepare_still_counts(tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megamix.prepare import parts

    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([text for pair in zip(texts(40), [""] * 40, strict=True) for text in pair]))
    add, calls = parts.PartWriter.add, [0]

    def killed(self, encoded):
        add(self, encoded)
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(parts.PartWriter, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(f"a={path}", out=tmp_path / "out", block_bytes=2000, journal_bytes=1)
    run(f"a={path}", out=tmp_path / "out", block_bytes=2000, journal_bytes=1)
    assert any("going on after" in line for line in logged)
    assert any("40 documents without text left out" in line for line in logged)


def test_only_documents_without_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["", " ", "one text"]))
    with pytest.raises(InputError, match=r"has 1 non-empty documents \(2 documents without text left out\)"):
        run(f"a={path}", out=tmp_path / "out")
    path.write_bytes(jsonl(["", "", ""]))
    text = tmp_path / "b.jsonl"
    text.write_bytes(jsonl(texts(10)))
    with pytest.raises(InputError, match="domain 'a': its 3 documents give no tokens"):
        run(f"a={path}", f"b={text}", out=tmp_path / "other", keep_empty=True)


def test_the_output_may_lie_inside_the_input(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "b").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(texts(20)))
    (folder / "b/x.jsonl").write_bytes(jsonl(texts(20, 1)))
    for out in (folder / "out", folder / "b/out"):
        for _ in range(2):
            assert run(folder, out=out).domain_names == ["a", "b"]
            verify_all(Manifest.load(out))
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        out.rmdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for spec in (str(folder), str(link), f"a={folder}", f"b={folder}/b"):
        with pytest.raises(InputError, match="is the output folder"):
            run(spec, out=folder)
        assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "b"]


def test_what_verification_advises_mends_the_data(text: Path, tmp_path: Path) -> None:
    whole = run(f"a={text}", out=tmp_path / "out")
    for name in ("train.bin", "train.idx", "validation.bin"):
        path = tmp_path / "out/a" / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataChanged, match="remove them and run `megamix prepare` again"):
            verify_all(Manifest.load(tmp_path / "out"))
        path.unlink()
        assert run(f"a={text}", out=tmp_path / "out") == whole
        verify_all(Manifest.load(tmp_path / "out"))


def test_bpe_dropout_is_switched_off(text: Path, tmp_path: Path, logged: list[str]) -> None:
    whole = run(f"a={text}", out=tmp_path / "whole")
    content = json.loads((tmp_path / "whole/tokenizer.json").read_text())
    content["model"]["dropout"] = 0.3
    (tmp_path / "t.json").write_text(json.dumps(content))
    for name in ("first", "second"):
        logged.clear()
        made = run(f"a={text}", out=tmp_path / name, tokenizer=tmp_path / "t.json")
        assert made.domain("a").train.sha256 == whole.domain("a").train.sha256
        assert sum("cuts text at random (dropout 0.3)" in line for line in logged) == 1


def test_sampling_of_other_models_is_switched_off(tmp_path: Path) -> None:
    model = models.Unigram([("<eos>", -5.0), ("a", -1.0), ("b", -1.0), ("ab", -2.5)], unk_id=0)
    if not hasattr(model, "alpha"):
        pytest.skip("this tokenizers samples no Unigram")
    Tokenizer(model).save(str(tmp_path / "t.json"))
    loaded = LoadedTokenizer(tmp_path / "t.json")
    assert loaded.random is None
    assert len({tuple(loaded.encode_batch(["ab" * 20])[0]) for _ in range(10)}) == 1


NAMES = [
    "dclm:code",
    "org/name",
    "manifest.json",
    "tokenizer.json",
    "prepare.json",
    "..",
    ".x",
    "x" * 300,
    "Köln 你好",
    "a*b?",
]


def test_any_name_and_its_folder(tmp_path: Path) -> None:
    specs = []
    for number, name in enumerate(NAMES):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(jsonl(texts(6, number)))
        specs.append(f"{name}={path}")
    out = tmp_path / "deep" / "out"
    for _ in range(2):
        manifest = run(*specs, out=out)
        assert manifest.domain_names == sorted(NAMES)
        for name in NAMES:
            for split in ("train", "validation"):
                assert manifest.open_domain(name, split).num_tokens > 0
    # Nothing beside its own files and one folder for each.
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    held = {path.name for path in out.iterdir() if path.is_dir()}
    assert len(held) == len(NAMES) == len({entry.train.prefixes[0].split("/")[0] for entry in manifest.domains})
    assert "dclm%3Acode" in held
    assert "Köln 你好" in held
    assert hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest() == manifest.tokenizer.sha256


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", gzip.compress(b"{}", mtime=0), r"begins as a .gz file does. Give its name that ending: x.jsonl.gz"),
        ("x.txt", b"\x28\xb5\x2f\xfd\x00", r"begins as a .zst file does. Give its name that ending: x.txt.zst"),
        ("x.jsonl", b"PAR1\x15", r"begins as a .parquet file does"),
        ("x.jsonl.gz", b"\xfd7zXZ\x00", r"begins as a .xz file does. Give its name that ending"),
        ("x.jsonl", b"PK\x03\x04", r"begins as a .zip file does. Unpack it"),
    ],
)
def test_a_compressed_file_under_another_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        find_inputs([f"a={tmp_path / name}"])


def test_a_pipe_and_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jsonl").write_bytes(jsonl(texts(5)))
    (tmp_path / "a/again").symlink_to(tmp_path / "a")
    for spec in (str(tmp_path), f"a={tmp_path / 'a'}"):
        with pytest.raises(InputError, match=r"again is a link to .*, which it lies in"):
            find_inputs([spec])
    (tmp_path / "a/again").unlink()
    (tmp_path / "a/one.jsonl").symlink_to(tmp_path / "a/two.jsonl")
    (tmp_path / "a/two.jsonl").symlink_to(tmp_path / "a/one.jsonl")
    with pytest.raises(InputError, match=r"domain 'a': cannot read .*one.jsonl: Too many levels"):
        find_inputs([str(tmp_path)])
    (tmp_path / "a/one.jsonl").unlink()
    (tmp_path / "a/two.jsonl").unlink()
    os.mkfifo(tmp_path / "a/pipe.jsonl")
    for spec in (str(tmp_path), f"a={tmp_path / 'a/pipe.jsonl'}"):
        with pytest.raises(InputError, match=r"domain 'a': .*pipe.jsonl is a pipe, expected a file"):
            find_inputs([spec])
