"""Verification against the manifest: any changed byte of any file is found and named, by all processes together or by a
sample, and a manifest of megamix 0.1 is read."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_megamix

from megamix.core.errors import DataChanged, InputError
from megamix.data.tokens import block_files, hashes, verify
from megamix.data.tokens.hashes import FileHasher
from megamix.data.tokens.manifest import (
    DomainEntry,
    Manifest,
    SplitEntry,
    TokenizerEntry,
    ValidationEntry,
    digest,
)
from megamix.data.tokens.upgrade import with_contents
from megamix.data.tokens.verify import verify_all, verify_sample
from megamix.data.tokens.writer import IndexedWriter

BLOCK = 64
SIZES = {"web": 500, "code": 77}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hashes, block_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path)
    return tmp_path


def build(folder: Path, *, old: bool = False) -> Manifest:
    """Two domains of documents of 10 tokens; ``old``: by a manifest of version 1."""
    rng, entries = np.random.default_rng(0), []
    for name, number in SIZES.items():
        splits = []
        for split, tokens in (("train", number), ("validation", 40)):
            with IndexedWriter(folder / f"{name}-{split}", "uint16") as writer:
                for start in range(0, tokens, 10):
                    writer.add_document(rng.integers(0, 250, min(10, tokens - start)))
            splits.append(SplitEntry.of(f"{name}-{split}", writer.close()))
        if old:
            splits = [split.model_copy(update={"contents": None}) for split in splits]
        validation = ValidationEntry(**dict(splits[1]), unigram_nats=5.0)
        entries.append(DomainEntry(name=name, train=splits[0], validation=validation))
    (folder / "tokenizer.json").write_bytes(b"tokenizer")
    sha256 = hashlib.sha256(b"tokenizer").hexdigest()
    entry = TokenizerEntry(file="tokenizer.json", sha256=sha256, vocab_size=250, eod_id=0)
    manifest = Manifest.build(folder, tokenizer=entry, dtype="uint16", validation_fraction=0.1, domains=entries)
    manifest.save()
    return manifest


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
@pytest.mark.parametrize("piece", [1, 50, BLOCK, 1000])
def test_hashes_do_not_depend_on_the_pieces(size: int, piece: int) -> None:
    data, hasher = np.random.default_rng(size).bytes(size), FileHasher()
    for start in range(0, size, piece):
        hasher.update(data[start : start + piece])
    found = hasher.hashes()
    blocks = [data[start : start + BLOCK] for start in range(0, size, BLOCK)]
    wanted = b"".join(hashlib.sha256(block).digest()[:8] for block in blocks)
    assert (found.num_bytes, found.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert base64.b64decode(found.blocks) == wanted


def test_the_manifest_describes_indexes_too(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    assert data["version"] == 2
    for domain in data["domains"]:
        for split in (domain["train"], domain["validation"]):
            (held,) = split["contents"]
            index = (folder / f"{split['prefixes'][0]}.idx").read_bytes()
            assert (held["idx_bytes"], held["idx_sha256"]) == (len(index), hashlib.sha256(index).hexdigest())
            assert held["bin_bytes"] == 2 * split["tokens"]


def test_whole_data_pass(folder: Path) -> None:
    manifest = Manifest.load(folder)
    total = sum(path.stat().st_size for path in (*folder.glob("*.bin"), *folder.glob("*.idx")))
    for found in (verify_all(manifest), verify_sample(manifest)):
        assert (found.num_bytes, found.total_bytes, found.warning) == (total, total, None)


@pytest.mark.parametrize("check", [verify_all, verify_sample])
@pytest.mark.parametrize(
    ("name", "at", "where"),
    [
        ("web-train.bin", 0, "bytes 0 to 64"),
        ("web-train.bin", 999, "bytes 960 to 1024"),
        ("code-validation.bin", 64, "bytes 64 to 128"),
        ("code-train.idx", 200, "bytes 192 to 256"),
    ],
)
def test_a_changed_byte_is_named(folder: Path, check, name: str, at: int, where: str) -> None:
    flip(folder / name, at)
    with pytest.raises(DataChanged, match=rf"domain '{name[: name.index('-')]}': .*{name}: {where} have changed"):
        check(Manifest.load(folder))


@pytest.mark.parametrize("check", [verify_all, verify_sample])
def test_neighbouring_blocks_are_one_place(folder: Path, check) -> None:
    path = folder / "web-train.bin"
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    with pytest.raises(DataChanged, match=r"web-train.bin: bytes 0 to 1024 have changed") as caught:
        check(Manifest.load(folder))
    assert str(caught.value).count("web-train.bin") == 1
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("check", [verify_all, verify_sample])
@pytest.mark.parametrize("cut", [-2, 2])
def test_sizes(folder: Path, check, cut: int) -> None:
    path = folder / "code-train.bin"
    data = path.read_bytes()
    path.write_bytes(data[:cut] if cut < 0 else data + b"\0" * cut)
    with pytest.raises(DataChanged, match=rf"code-train.bin: it has {154 + cut} bytes, the manifest says 154"):
        check(Manifest.load(folder))


@pytest.mark.parametrize("check", [verify_all, verify_sample])
def test_another_tokenizer(folder: Path, check) -> None:
    (folder / "tokenizer.json").write_bytes(b"another")
    with pytest.raises(DataChanged, match=r"tokenizer.json: its hash is \w{12}, but the tokens were made with"):
        check(Manifest.load(folder))


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataChanged, match=r"tokenizer.json: the tokenizer cannot be read"):
        verify_all(Manifest.load(folder))
    assert "tokenizer.json is missing" in (verify_sample(Manifest.load(folder)).warning or "")


def test_a_missing_file(folder: Path) -> None:
    (folder / "code-train.idx").unlink()
    with pytest.raises(DataChanged, match=r"domain 'code': .*code-train.idx is missing"):
        Manifest.load(folder)


def test_only_the_domains_of_the_run(folder: Path) -> None:
    manifest = Manifest.load(folder)
    flip(folder / "web-train.bin", 5)
    for check in (verify_all, verify_sample):
        check(manifest, [manifest.domain("code")])


def test_a_sample_is_bounded_and_comes_to_every_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(folder)
    files = verify._files(manifest, None)
    assert files is not None
    everything = {(number, block) for number, file in enumerate(files) for block in range(file.num_blocks)}
    monkeypatch.setattr(block_files, "SAMPLE_BLOCKS", 12)
    seen: set[tuple[int, int]] = set()
    for seed in range(200):
        drawn = block_files.draw(files, np.random.default_rng(seed))
        picked = [(number, block) for number, blocks in drawn for block in blocks]
        assert {number for number, _ in picked} == set(range(len(files)))  # each of the 8 files
        assert len(picked) == len(set(picked)) <= 12
        seen.update(picked)
    assert seen == everything
    monkeypatch.setattr(block_files, "SAMPLE_BYTES", 3 * BLOCK)
    for seed in range(20):
        drawn = block_files.draw(files, np.random.default_rng(seed))
        assert sum(files[number].bytes_of(block) for number, blocks in drawn for block in blocks) < 4 * BLOCK
    assert verify_sample(manifest).num_bytes < 4 * BLOCK


def test_processes_share_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_files, "_TASK_BLOCKS", 1)
    manifest = Manifest.load(folder)
    shares = [verify_all(manifest, share=(number, 3)).num_bytes for number in range(3)]
    assert sum(shares) == verify_all(manifest).num_bytes
    assert min(shares) > 0
    flip(folder / "web-train.bin", 400)
    refused = 0
    for number in range(3):
        try:
            verify_all(manifest, share=(number, 3))
        except DataChanged:
            refused += 1
    assert refused == 1


def test_damaged_hashes_are_the_manifests_fault(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["domains"][0]["train"]["contents"][0]["bin_blocks"] = "AAAA"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="the manifest is damaged") as caught:
        verify_sample(Manifest.load(folder))
    assert not isinstance(caught.value, DataChanged)


def test_hashes_that_are_no_hashes(folder: Path) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    held = data["domains"][0]["train"]["contents"][0]
    held["bin_blocks"] = "=" * len(held["bin_blocks"])
    path.write_text(json.dumps(data))
    for check in (verify_all, verify_sample):
        with pytest.raises(InputError, match="block hashes that are no base64: the manifest is damaged"):
            check(Manifest.load(folder))


@pytest.mark.parametrize("check", [verify_all, verify_sample])
def test_a_tokenizer_that_never_ends(folder: Path, check) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(DataChanged, match="the tokenizer is a folder, a device or a pipe"):
        check(Manifest.load(folder))


def test_a_manifest_of_0_1(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new = build(tmp_path / "old", old=True), build(tmp_path / "new")
    assert json.loads((tmp_path / "old/manifest.json").read_text())["version"] == 1
    assert "contents" not in (tmp_path / "old/manifest.json").read_text()
    old = Manifest.load(tmp_path / "old")
    assert "can only be verified as a whole" in (verify_sample(old).warning or "")
    assert "Indexes cannot be verified" in (verify_all(old).warning or "")
    # A run of either goes on with the other.
    assert old.fingerprint == new.fingerprint
    assert list(map(digest, old.domains)) == list(map(digest, new.domains))
    assert with_contents(old).domains == new.domains
    flip(tmp_path / "old/web-train.bin", 999)
    verify_sample(old)
    with pytest.raises(DataChanged, match=r"domain 'web': .*web-train.bin: its hash is \w{12}, the manifest says"):
        verify_all(old)


def test_commands(data_dir: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    assert "all " in run_megamix("verify", folder).stdout
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for domain in data["domains"]:
        for split in (domain["train"], domain["validation"]):
            del split["contents"]
    path.write_text(json.dumps({**data, "version": 1}))
    assert "of version 1" in run_megamix("verify", folder).stderr
    run_megamix("verify", folder, "--write-hashes")
    name = data["domains"][0]["name"]
    flip(folder / name / "train.bin", 11)
    for options in ([], ["--sample"]):
        said = run_megamix("verify", folder, *options, code=3).stderr
        assert f"{name}/train.bin: bytes 0 to " in said
    config = [f"data.manifest={folder}", f"run_dir={tmp_path / 'run'}", "train.steps=1"]
    for command in ("doctor", "train"):
        assert f"{name}/train.bin: bytes 0 to " in run_megamix(command, "configs/demo.yaml", *config, code=3).stderr
    assert not (tmp_path / "run").exists()
