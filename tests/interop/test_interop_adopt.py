"""``megamix blend adopt``: the data set it makes of Megatron's files, and every input it refuses."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from interop_files import blend, error_of, write_documents, write_tokenizer

from megamix.core.errors import InputError
from megamix.data.tokens.indexed import IndexedTokens
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.verify import verify_all
from megamix.data.tokens.writer import IndexedWriter
from megamix.interop.blend_files.scan import FileJob, scan_files
from megamix.mixing.weight_files import read_weights


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[list[int]]]:
    """web (uint16, 25 documents) and code (int32, 10 documents), with their documents."""
    rng = np.random.default_rng(3)
    return {
        "web": write_documents(tmp_path / "raw/web_text_document", rng.integers(1, 60, 25).tolist()),
        "code": write_documents(tmp_path / "raw/code", rng.integers(1, 60, 10).tolist(), "int32", seed=1),
    }


def stream(manifest: Manifest, name: str, split: str) -> list[int]:
    tokens = manifest.open_domain(name, split)  # pyright: ignore[reportArgumentType]
    return tokens.read(0, tokens.num_tokens).tolist()


def test_a_blend_with_a_split(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    before = {path.name: path.read_bytes() for path in raw.iterdir()}
    string = f"0.3 {raw}/web_text_document 0.9 {raw}/code"
    shown = blend("adopt", "--out", out, "--tokenizer", tokenizer, "--data-path", string, "--split", "80,10,10")
    assert re.search(r"web +1 +20 ", shown)
    assert f"data.manifest={out} mixture.file={out}/mixture.json" in shown
    assert "do not end with token" not in shown
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "mixture.json", "tokenizer.json"]
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == before
    assert read_weights(out / "mixture.json", ["web", "code"]) == {"web": 0.25, "code": 0.75}

    manifest = Manifest.load(out)
    assert (manifest.dtype, manifest.split, manifest.validation_fraction) == ("int32", "80,10,10", 0.1)
    assert manifest.tokenizer.sha256 == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    # 25 documents: 0.8 and 0.9 of them are 20 and 22.5, and halves go to the even one; 10: 8 and 9.
    for name, train_end, validation_end in (("web", 20, 22), ("code", 8, 9)):
        assert stream(manifest, name, "train") == flat(files[name][:train_end])
        assert stream(manifest, name, "validation") == flat(files[name][train_end:validation_end])


def test_every_number_of_the_manifest(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    out = tmp_path / "out"
    blend("adopt", f"web={tmp_path}/raw/web_text_document", f"code={tmp_path}/raw/code", "-o", out, "--tokenizer",
          tokenizer, "--split", "5,2", "--workers", 2)  # fmt: skip
    manifest = Manifest.load(out)
    for entry, train_end in zip(manifest.domains, (18, 7), strict=True):
        train, validation = flat(files[entry.name][:train_end]), flat(files[entry.name][train_end:])
        assert (entry.train.tokens, entry.train.documents) == (len(train), train_end)
        assert (entry.validation.tokens, entry.validation.documents) == (
            len(validation),
            len(files[entry.name]) - train_end,
        )
        assert (entry.train.max_token, entry.validation.max_token) == (max(train), max(validation))
        prefix = tmp_path / "raw" / {"web": "web_text_document", "code": "code"}[entry.name]
        assert entry.train.prefixes == entry.validation.prefixes == (str(prefix),)
        sha256 = hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
        assert entry.train.sha256 == entry.validation.sha256 == (sha256,)
        counts, size = collections.Counter(train), manifest.tokenizer.vocab_size
        nats = [-math.log((counts[token] + 1) / (len(train) + size)) for token in validation]
        assert entry.validation.unigram_nats == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
    verify_all(manifest)
    total = sum(entry.train.tokens for entry in manifest.domains)
    natural = {entry.name: entry.train.tokens / total for entry in manifest.domains}
    assert read_weights(out / "mixture.json", ["web", "code"]) == pytest.approx(natural, rel=1e-15)


def test_per_split_files_of_several_parts(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    parts = [write_documents(out / f"web/train-0000{n}-of-00002", [5, 9], seed=n) for n in range(2)]
    held = write_documents(tmp_path / "held/web", [8, 3])
    code = [write_documents(tmp_path / name, [7, 1], seed=7 + n) for n, name in enumerate(("code", "more"))]
    code_held = write_documents(tmp_path / "code_v", [4], seed=9)
    (tmp_path / "blend.json").write_text(
        json.dumps(
            {
                "train": ["1", f"{out}/web/train-00000-of-00002", "2", f"{out}/web/train-00001-of-00002",
                          "3", f"{tmp_path}/code", "4", f"{tmp_path}/more"],
                "valid": [f"{tmp_path}/held/web", f"{tmp_path}/code_v"],
                "test": None,
            }
        )
    )  # fmt: skip
    blend("adopt", f"code={tmp_path}/code,{tmp_path}/more,{tmp_path}/code_v", "--out", out, "--tokenizer", tokenizer,
          "--per-split-data-args-path", tmp_path / "blend.json")  # fmt: skip
    manifest = Manifest.load(out)
    assert manifest.domain("web").train.prefixes == ("web/train-00000-of-00002", "web/train-00001-of-00002")
    assert manifest.domain("web").validation.prefixes == (f"{tmp_path}/held/web",)
    assert manifest.domain("code").train.ranges is None
    assert stream(manifest, "web", "train") == flat(parts[0] + parts[1])
    assert stream(manifest, "web", "validation") == flat(held)
    assert stream(manifest, "code", "train") == flat(code[0] + code[1])
    assert stream(manifest, "code", "validation") == flat(code_held)
    assert manifest.validation_fraction == pytest.approx(3 / 11)
    assert read_weights(out / "mixture.json", ["web", "code"]) == {"web": 0.3, "code": 0.7}
    assert "ranges" not in (out / "manifest.json").read_text()
    # The files under the folder move with it.
    shutil.move(out, tmp_path / "moved")
    assert stream(Manifest.load(tmp_path / "moved"), "web", "train") == flat(parts[0] + parts[1])


def test_separate_train_and_valid_strings(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    raw, held = tmp_path / "raw", write_documents(tmp_path / "v/web", [8, 3])
    given = ("--train-data-path", f"2 {raw}/web_text_document", "--valid-data-path", tmp_path / "v/web")
    blend("adopt", *given, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    manifest = Manifest.load(tmp_path / "out")
    assert stream(manifest, "web", "train") == flat(files["web"])
    assert stream(manifest, "web", "validation") == flat(held)


def test_documents_of_several_sequences_are_not_cut(tmp_path: Path, tokenizer: Path) -> None:
    torch = pytest.importorskip("torch")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is in the dev extra")
    builder = indexed.IndexedDatasetBuilder(f"{tmp_path}/web.bin", dtype=np.uint16)
    for number, sequences in enumerate((1, 3, 1, 4, 1)):  # 10 sequences of 2 tokens
        builder.add_document(torch.full((2 * sequences,), number + 1), [2] * sequences)
    builder.finalize(f"{tmp_path}/web.idx")
    blend("adopt", f"web={tmp_path}/web", "--out", tmp_path / "out", "--tokenizer", tokenizer, "--split", "2,5,3")
    manifest = Manifest.load(tmp_path / "out")
    # Megatron cuts after sequences 2 and 7, inside documents 1 and 3: these end where they end.
    assert stream(manifest, "web", "train") == [1] * 2 + [2] * 6
    assert stream(manifest, "web", "validation") == [3] * 2 + [4] * 8
    assert manifest.domain("web").train.ranges == ((0, 2),)


def test_the_fingerprint_covers_the_ranges(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    prints = set()
    for number, split in enumerate(("80,20", "60,40", "60,40")):
        out = tmp_path / str(number)
        blend("adopt", f"web={tmp_path}/raw/web_text_document", "-o", out, "--tokenizer", tokenizer, "--split", split)
        prints.add(Manifest.load(out).fingerprint)
    assert len(prints) == 2
    path = tmp_path / "0/manifest.json"
    path.write_text(path.read_text().replace("20,\n      25", "20,\n      24"))
    with pytest.raises(InputError, match="does not fit the contents"):
        Manifest.load(path)


def test_ranges_that_do_not_fit(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    out = tmp_path / "out"
    blend("adopt", f"web={tmp_path}/raw/web_text_document", "-o", out, "--tokenizer", tokenizer, "--split", "80,20")
    shorter = IndexedTokens(tmp_path / "raw/web_text_document").num_tokens
    write_documents(tmp_path / "raw/web_text_document", [shorter])
    with pytest.raises(InputError, match=r"domain 'web': documents 0 to 20 of .* but it holds documents 0 to 1"):
        Manifest.load(out).open_domain("web")
    loaded = Manifest.load(out)
    domain = loaded.domains[0]
    wrong = domain.model_copy(update={"train": domain.train.model_copy(update={"ranges": ((0, 1), (0, 1))})})
    Manifest.build(out, tokenizer=loaded.tokenizer, dtype="uint16", validation_fraction=0.1, domains=[wrong]).save()
    with pytest.raises(InputError, match="domain 'web' has 1 token files and 2 document ranges"):
        Manifest.load(out)


def test_files_wider_than_the_manifest_says(tmp_path: Path, tokenizer: Path, files: dict[str, list[list[int]]]) -> None:
    out, prefix = tmp_path / "out", tmp_path / "raw/web_text_document"
    blend("adopt", f"web={prefix}", "-o", out, "--tokenizer", tokenizer, "--split", "80,20")
    with IndexedWriter(prefix, "int32") as writer:
        for document in files["web"]:
            writer.add_document(document)
    with pytest.raises(InputError, match="domain 'web': its train files store int32, but the manifest says uint16"):
        Manifest.load(out).open_domain("web")


def test_documents_without_their_end(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    write_documents(tmp_path / "web", [4] * 10)
    shown = blend("adopt", f"web={tmp_path}/web", "-o", tmp_path / "out", "--tokenizer", tokenizer, "--split", "1,1",
                  "--eod", "a")  # fmt: skip
    assert "Domain 'web': 10 of 10 documents looked at do not end with token" in shown
    with IndexedWriter(tmp_path / "gaps", "uint16") as writer:
        for document in ([], [5], [], [7, 0], [0], []):
            writer.add_document(document)
    shown = blend("adopt", f"web={tmp_path}/gaps", "-o", tmp_path / "two", "--tokenizer", tokenizer, "--split", "2,1")
    assert "Domain 'web': 1 of 3 documents looked at do not end with token 0" in shown


def test_chunks_of_a_large_file_add_up(tmp_path: Path) -> None:
    """More tokens than are looked at together, split inside of a chunk."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, 2_500_000).astype("<u2")
    lengths = [1_300_000, 1_200_000]
    write_documents(tmp_path / "web", lengths)
    (tmp_path / "web.bin").write_bytes(tokens.tobytes())
    job = FileJob("web", IndexedTokens(tmp_path / "web"), ((0, 1_300_000), (1_300_000, 2_400_000)))
    (scan,) = scan_files([job], 64, 1, progress=False)
    assert scan.sha256 == hashlib.sha256(tokens.tobytes()).hexdigest()
    for counts_V, part in zip(scan.counts_PV, (tokens[:1_300_000], tokens[1_300_000:2_400_000]), strict=True):
        values, numbers = np.unique(part, return_counts=True)
        assert counts_V.sum() == len(part)
        np.testing.assert_array_equal(counts_V[values], numbers)


Change = Callable[[Path], None]


def cut_short(folder: Path) -> None:
    os.truncate(folder / "raw/web_text_document.bin", 100)


def drop_index(folder: Path) -> None:
    (folder / "raw/web_text_document.idx").unlink()


def large_id(folder: Path) -> None:
    with open(folder / "raw/web_text_document.bin", "r+b") as file:
        file.seek(14)
        file.write(np.array([9999], "<u2").tobytes())


def negative_id(folder: Path) -> None:
    with open(folder / "raw/code.bin", "r+b") as file:
        file.write(np.array([-5], "<i4").tobytes())


def floats(folder: Path) -> None:
    with open(folder / "raw/code.idx", "r+b") as file:
        file.seek(17)
        file.write(bytes([7]))


def data_there(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/manifest.json").write_text("{}")


def file_there(folder: Path) -> None:
    (folder / "out").write_text("")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


WEB, CODE = "{raw}/web_text_document", "{raw}/code"


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ([f"web={WEB}"], cut_short, r"domain 'web': .*web_text_document.bin holds 100 bytes, but its index"),
        ([f"web={WEB}"], drop_index, r"domain 'web': cannot read .*web_text_document.idx: No such file"),
        (["web={raw}/wbe"], None, r"domain 'web': cannot read .*wbe.bin: No such file"),
        (
            [f"web={WEB}"],
            large_id,
            r"domain 'web': .*\.bin holds the token id 9999 \(its token 7\), but the tokenizer's ids are 0 to \d+",
        ),
        ([f"code={CODE}"], negative_id, r"domain 'code': .* holds the token id -5 \(its token 0\)"),
        ([f"code={CODE}"], floats, r"domain 'code': .* stores float32, expected integers"),
        (
            [f"code={CODE}", "--split", "99,1"],
            None,
            r"domain 'code' has no validation tokens: its 1 files hold 10 documents",
        ),
        ([f"code={CODE}", "--split", "1,99"], None, r"domain 'code' has no train tokens"),
        ([f"code={CODE}"], None, r"domain 'code' has no validation tokens"),
        ([f"code={CODE}", "--split", "half"], None, r"--split half: expected the shares"),
        ([f"code={CODE}"], data_there, r"out already holds a data set"),
        ([f"web={WEB}", "--split", "1,1"], file_there, r"cannot write to .*out: "),
        ([f"web={WEB}"], no_tokenizer, r"tokenizer '.*tokenizer.json': no such file"),
        ([f"web={WEB}", "--eod", "[END]"], None, r"has no end-of-document token \(looked for \[END\]\)"),
        ([], None, r"0 blends are given, expected one of --data-path"),
        (["--data-path", WEB, "--data-args-path", "x"], None, r"2 blends are given"),
        (["--train-data-path", WEB], None, "--valid-data-path gives no files; training and validation files are both"),
        (["--valid-data-path", WEB], None, "--train-data-path gives no files"),
        (["--train-data-path", WEB, "--data-path", WEB], None, "2 blends are given"),
        (["--data-path", ""], None, r"--data-path names no token files"),
        (["--data-path", f"1 {WEB} {CODE}"], None, r"3 words, of which '1' is a number"),
        (
            ["--data-path", f"1 {WEB} 2 {WEB}"],
            None,
            r"web_text_document 2 times. Name it once, with the sum of its weights",
        ),
        (["--data-path", f"{WEB} {{raw}}/sub/../web_text_document"], None, r"would both be the domain 'web'"),
        (
            ["--data-path", f"{WEB} /other/web"],
            None,
            r"raw/web_text_document and /other/web would both be the domain 'web'",
        ),
        (["--data-args-path", "{raw}/absent.txt"], None, r"cannot read .*absent.txt"),
        (["--per-split-data-args-path", "{raw}/code.idx"], None, r"code.idx is not"),
        ([f"code={CODE}", f"code={WEB}"], None, r"the domain 'code' is given twice"),
        ([f"a={CODE}", f"b={CODE}"], None, r"raw/code stands in train of 'a' and in train of 'b'"),
        (["code"], None, r"'code': expected NAME=PREFIX"),
        (["code=a,,b"], None, r"'code=a,,b': expected NAME=PREFIX"),
        (
            ["--data-path", CODE, "code={raw}/cod"],
            None,
            r"code=.*raw/cod: --data-path has no such prefix. Did you mean '.*raw/code'",
        ),
    ],
)
def test_refused(
    tmp_path: Path,
    tokenizer: Path,
    files: dict[str, list[list[int]]],
    arguments: list[str],
    change: Change | None,
    message: str,
) -> None:
    if change is not None:
        change(tmp_path)
    given = [argument.replace("{raw}", f"{tmp_path}/raw") for argument in arguments]
    seen = error_of("adopt", *given, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert re.search(message, seen), seen
    if change is not data_there:
        assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("blends", "extra", "message"),
    [
        (
            {"train": ["web"], "valid": None},
            [],
            "blend.json, valid gives no files; training and validation files are both needed",
        ),
        ({"train": None, "valid": ["web"]}, [], "blend.json, train gives no files"),
        (
            {"train": ["web", "code"], "valid": ["other"]},
            [],
            r"the domain 'web' \(web\) is in .*blend.json, train and not in .*, valid, which has other",
        ),
        (
            {"train": ["web"], "valid": ["v/web", "code"]},
            [],
            r"the domain 'code' \(code\) is in .*, valid and not in .*, train",
        ),
        ({"train": ["web"], "valid": ["./web"]}, [], r"./web stands in train of 'web' and in valid of 'web'"),
        (
            {"train": ["web"], "valid": ["v/web"]},
            ["--split", "1,1"],
            "--split 1,1 is given, but the blend has validation files",
        ),
    ],
)
def test_per_split_refused(
    tmp_path: Path, tokenizer: Path, blends: dict[str, object], extra: list[str], message: str
) -> None:
    (tmp_path / "blend.json").write_text(json.dumps({**blends, "test": None}))
    seen = error_of("adopt", "--per-split-data-args-path", tmp_path / "blend.json", *extra, "--out", tmp_path / "out",
                    "--tokenizer", tokenizer)  # fmt: skip
    assert re.search(message, seen), seen


def test_as_a_user_sees_it(
    tmp_path: Path, tokenizer: Path, megamix: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    write_documents(tmp_path / "web", [30] * 20)
    arguments = ("blend", "adopt", f"web={tmp_path}/web", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    done = megamix(*arguments, "--split", "1,2,3,4", code=2)
    assert done.stderr.startswith("megamix: --split 1,2,3,4: expected the shares of train, valid")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    megamix(*arguments, "--split", "3,1")
    shown = megamix("inspect", tmp_path / "out", "--seq-length", 10).stdout
    assert re.search(r"web +15 +450 +1.0000 +5 +150 ", shown), shown
