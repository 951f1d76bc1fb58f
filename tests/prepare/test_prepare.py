"""From text to token files, on the standard library's own text: every document once whatever the worker count or
interruption, and what was written is checked when it is read."""

from __future__ import annotations

import collections
import gzip
import json
import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import zstandard
from json_lines import jsonl
from prepared import contents, tree, write_corpus

from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest, Split
from megamix.data.tokens.tokenizer import LoadedTokenizer, TokenizerSpec
from megamix.data.tokens.verify import verify_all
from megamix.prepare.documents import find_inputs
from megamix.prepare.encoders import HeldOut
from megamix.prepare.merge import unigram_nats
from megamix.prepare.pieces import iter_documents
from megamix.prepare.pipeline import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare([str(corpus)], out, tokenizer="train:600", validation_fraction=0.1, workers=1, progress=False)
    return out


def plain(path: Path) -> bytes:
    """The contents, decompressed."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True) as stream:
            return stream.readall()
    return path.read_bytes()


def held_out(name: str, paths: list[Path], fraction: float) -> list[bool]:
    """Of every document that is not empty, in order, by the byte of its file at which its line begins."""
    chooser = HeldOut(name, 1234, fraction)
    found: list[bool] = []
    for file, path in enumerate(paths):
        place = 0
        for line in [plain(path)] if path.suffix == ".txt" else plain(path).splitlines(keepends=True):
            if line.strip() and (path.suffix == ".txt" or json.loads(line)["text"].strip()):
                hashes = chooser.hashes(file, np.array([place]))
                found.append(bool(chooser.take(hashes, first=False)[0]))
            place += len(line)
    return found


def test_every_document_once_in_order(corpus: Path, prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    assert manifest.domain_names == ["books", "code", "mail"]
    tokenizer = manifest.load_tokenizer()
    for name, paths in find_inputs([str(corpus)]).items():
        wanted = [text for path in paths for text in iter_documents(path) if text.strip()]
        chosen = held_out(name, paths, fraction=0.1)
        seen: dict[Split, list[str]] = {"train": [], "validation": []}
        for split, texts in seen.items():
            tokens = manifest.open_domain(name, split)
            flat = tokens.read(0, tokens.num_tokens)
            ends = np.flatnonzero(flat == tokenizer.eod_id) + 1
            assert len(ends) == tokens.num_documents == getattr(manifest.domain(name), split).documents
            assert flat.max() == getattr(manifest.domain(name), split).max_token
            starts = tokens.files[0].document_starts
            assert starts.tolist() == [0, *ends[:-1]]
            texts += [tokenizer.decode(flat[start : end - 1]) for start, end in zip(starts, ends, strict=True)]
        assert seen["train"] == [text for text, out in zip(wanted, chosen, strict=True) if not out]
        assert seen["validation"] == [text for text, out in zip(wanted, chosen, strict=True) if out]
        assert seen["validation"]


def test_manifest_contents(prepared: Path) -> None:
    manifest = Manifest.load(prepared / "manifest.json")
    data = json.loads((prepared / "manifest.json").read_text())
    assert data["format"] == "megamix-manifest"
    assert data["tokenizer"]["vocab_size"] == 600
    assert data["domains"][0]["train"]["prefixes"] == ["books/train"]
    tokens = np.array([domain["train"]["tokens"] for domain in data["domains"]])
    np.testing.assert_allclose(manifest.natural_weights(), tokens / tokens.sum())
    assert manifest.natural_weights().dtype == np.float64
    verify_all(manifest)
    path = prepared / "code" / "train.bin"
    assert path.stat().st_size == 2 * manifest.domain("code").train.tokens


def test_unigram_nats_against_plain_counting(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    for name in manifest.domain_names:
        train = manifest.open_domain(name, "train")
        validation = manifest.open_domain(name, "validation")
        counts = collections.Counter(train.read(0, train.num_tokens).tolist())
        total = train.num_tokens + manifest.tokenizer.vocab_size
        losses = [-math.log((counts[t] + 1) / total) for t in validation.read(0, validation.num_tokens).tolist()]
        assert manifest.domain(name).validation.unigram_nats == pytest.approx(
            math.fsum(losses) / len(losses), rel=1e-12
        )
    assert unigram_nats(np.array([0, 0]), np.array([3, 1])) == pytest.approx(math.log(2))


def test_several_workers_write_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    # Small blocks, so that many are under way at once.
    options = {"tokenizer": "train:600", "validation_fraction": 0.1, "progress": False}
    prepare([str(corpus)], tmp_path / "out", workers=3, block_bytes=5000, **options)
    assert contents(tmp_path / "out") == contents(prepared)


def test_second_call_keeps_what_is_done(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(corpus, inputs)
    shutil.copytree(prepared, out)
    options = {
        "tokenizer": str(prepared / "tokenizer.json"),
        "validation_fraction": 0.1,
        "workers": 1,
        "progress": False,
    }

    def call(**changed) -> set[str]:
        """Which domains were written again."""
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
        prepare([str(inputs)], out, **{**options, **changed})
        return {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}

    assert call() == {"books", "code", "mail"}  # the inputs are other files now
    first = tree(out)
    assert call() == set()
    assert tree(out) == first
    (out / "code" / "train.idx").unlink()
    with pytest.raises(InputError, match=r"domain 'code': .*train\.idx is missing"):
        Manifest.load(out)
    assert call() == {"code"}
    assert tree(out) == first
    data = (out / "mail" / "train.bin").read_bytes()
    (out / "mail" / "train.bin").write_bytes(data[:-2])
    assert call() == {"mail"}
    assert tree(out) == first
    (inputs / "books" / "zzz.txt").write_text("one more")
    assert call() == {"books"}
    assert call(seed=5) == {"books", "code", "mail"}
    assert call(seed=5, validation_fraction=0.2) == {"books", "code", "mail"}
    (out / "code" / "prepare.json").write_text("{damaged")
    assert call(seed=5, validation_fraction=0.2) == {"code"}
    assert call(seed=5, validation_fraction=0.2, tokenizer="train:300") == {"books", "code", "mail"}
    assert Manifest.load(out).tokenizer.vocab_size == 300


@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.02, 0.5])
def test_both_splits_have_a_document(tmp_path: Path, fraction: float) -> None:
    for num in range(2, 12):
        (tmp_path / f"d{num}.jsonl").write_bytes(jsonl([f"text number {i}" for i in range(num)]))
    out = tmp_path / "out"
    manifest = prepare(
        [str(tmp_path)], out, tokenizer="train:300", validation_fraction=fraction, workers=1, progress=False
    )
    for domain in manifest.domains:
        assert domain.train.documents + domain.validation.documents == int(domain.name[1:])
        assert min(domain.train.documents, domain.validation.documents) >= 1
        assert fraction > 1e-9 or domain.validation.documents == 1


def test_held_out_share_and_independence() -> None:
    places = np.arange(0, 10**8, 1000)

    def mask(name: str = "web", seed: int = 1, file: int = 0, places: np.ndarray = places) -> np.ndarray:
        chooser = HeldOut(name, seed, 0.02)
        return chooser.take(chooser.hashes(file, places), first=False)

    assert abs(mask().mean() - 0.02) < 0.002
    np.testing.assert_array_equal(mask(places=places[7777:]), mask()[7777:])
    for other in (mask(seed=2), mask(name="code"), mask(file=1)):
        # Of those chosen, the share that another choice chooses too is that of any: 0.02 of 2000.
        assert (other & mask()).sum() < 80


def test_tokenizer_treats_text_as_text(prepared: Path, tmp_path: Path) -> None:
    tokenizer = LoadedTokenizer(prepared / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (600, 0)
    texts = ["a<|endoftext|>b", "", "Grüße 你好\x00\n"]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(one) for one in ids] == texts
    assert all(0 not in one for one in ids)
    data = json.loads((prepared / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert LoadedTokenizer(tmp_path / "tokenizer.json").encode_batch(texts) == ids
    assert TokenizerSpec.parse(str(tmp_path)).path == str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        LoadedTokenizer(tmp_path / "tokenizer.json")


def test_hub_out_of_reach(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    class AutoTokenizer:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise OSError(f"cannot reach the hub for {name}\nmore lines")

    # In place of the real library, which takes seconds to import.
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoTokenizer=AutoTokenizer))
    with pytest.raises(InputError, match=r"hf:some/name.*cannot reach the hub.*local tokenizer\.json instead"):
        prepare([str(corpus)], tmp_path / "out", tokenizer="hf:some/name", workers=1)


def test_bad_manifests(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    good = json.loads(path.read_text())

    def expect(message: str, **changed) -> None:
        path.write_text(json.dumps({**good, **changed}))
        with pytest.raises(InputError, match=message):
            Manifest.load(path)

    domains = good["domains"]
    expect("no megamix manifest: its format is 'other'", format="other")
    expect("version 3, this megamix reads 1 and 2", version=3)
    expect("unknown key 'dtypes'", dtypes=1)
    expect("does not fit the contents", fingerprint="0" * 64)
    expect("does not fit the contents", tokenizer={**good["tokenizer"], "sha256": "0" * 64})
    expect("names the domain 'books' twice", domains=[domains[0], domains[0]])
    expect("the token id 599, but the vocabulary has 300", tokenizer={**good["tokenizer"], "vocab_size": 300})
    wrong = json.loads(json.dumps(domains))
    wrong[1]["train"]["tokens"] += 1
    path.write_text(json.dumps({**good, "domains": wrong}))
    with pytest.raises(InputError, match=r"domain 'code': .* but the manifest says"):
        Manifest.load(path).open_domain("code", "train")
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Manifest.load(path)
    path.write_text(json.dumps(good))
    manifest = Manifest.load(path)
    with pytest.raises(InputError, match=r"no domain 'cod'. Did you mean 'code'"):
        manifest.open_domain("cod")
    with pytest.raises(InputError, match="unknown split 'valid'"):
        manifest.open_domain("code", "valid")  # pyright: ignore[reportArgumentType]
    data = bytearray((tmp_path / "out/code/train.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "out/code/train.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"domain 'code': .*train.bin: bytes 0 to \d+ have changed"):
        verify_all(manifest)
    (tmp_path / "out/tokenizer.json").write_text((prepared / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError, match="but the tokens were made with"):
        manifest.load_tokenizer()
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read the manifest .*manifest.json"):
        Manifest.load(tmp_path / "out")


def test_output_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write to .*out"):
        prepare([str(corpus)], tmp_path / "out", workers=1)
