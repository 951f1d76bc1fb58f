"""From text to token files, on the standard library's own text: every document once whatever the worker count or
interruption, and what was written is checked when it is read."""

from __future__ import annotations

import collections
import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import zstandard
from json_lines import jsonl

from megamix.data.documents import find_inputs, iter_documents, read_blocks
from megamix.data.indexed import IndexedTokens
from megamix.data.manifest import Manifest, Split
from megamix.data.prepare import HeldOut, prepare, unigram_nats
from megamix.data.tokenizer import EncodeJob, Encoders, LoadedTokenizer, TokenizerSpec
from megamix.errors import InputError, RankFailed

prepare_module = sys.modules["megamix.data.prepare"]  # the module, whatever megamix.data itself calls `prepare`
ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def stdlib_texts(folder: str, num: int) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((STDLIB / folder).glob("*.py"))[:num]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of real text in four kinds of file, about 1.5 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    code = stdlib_texts("asyncio", 40)
    (folder / "code").mkdir()
    (folder / "code" / "a.jsonl").write_bytes(jsonl(code[:10]) + b"\n" + jsonl(["", " \n", *code[10:20]]))
    (folder / "code" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(code[20:])))
    tests = stdlib_texts("json", 10) + stdlib_texts("email", 30)
    middle = jsonl(tests[:5])
    frames = zstandard.compress(middle) + zstandard.compress(jsonl(tests[5:]))
    (folder / "mail.jsonl.zst").write_bytes(frames)
    (folder / "books").mkdir()
    for number, text in enumerate(stdlib_texts("http", 5) + stdlib_texts("html", 5) + ["Grüße aus Köln, 你好\n"] * 30):
        (folder / "books" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    (folder / "corpus.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("not json")
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare([str(corpus)], out, tokenizer="train:600", validation_fraction=0.1, workers=1, progress=False)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_every_document_once_in_order(corpus: Path, prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    assert manifest.domain_names == ["books", "code", "mail"]
    tokenizer = manifest.load_tokenizer()
    for name, paths in find_inputs([str(corpus)]).items():
        wanted = [text for path in paths for text in iter_documents(path) if text.strip()]
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
        chosen = HeldOut(name, 1234, 0.1).take(len(wanted))
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
    manifest.verify_hashes()
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


def test_several_workers_write_the_same_bytes(corpus: Path, prepared: Path, tmp_path: Path, monkeypatch) -> None:
    # Small blocks, so that many are under way at once.
    monkeypatch.setattr(prepare_module, "read_blocks", lambda path: read_blocks(path, 5000))
    prepare([str(corpus)], tmp_path / "out", tokenizer="train:600", validation_fraction=0.1, workers=3, progress=False)
    assert tree(tmp_path / "out") == tree(prepared)


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
        before = {path: path.stat().st_ino for path in out.rglob("*.bin")}
        prepare([str(inputs)], out, **{**options, **changed})
        return {path.parent.name for path, node in before.items() if path.stat().st_ino != node}

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


SCRIPT = """
import importlib, sys, time
module = importlib.import_module("megamix.data.prepare")
if __name__ == "__main__":
    def slowly(path):
        for block in read_blocks(path, 20000):
            time.sleep(0.02)
            yield block
    read_blocks, module.read_blocks = module.read_blocks, slowly
    module.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], validation_fraction=0.1, workers=2)
"""


def children(pid: int) -> set[int]:
    """The processes below ``pid``."""
    found: set[int] = set()
    for task in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = task.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(task.parent.name)} | children(int(task.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(corpus: Path, out: Path, tokenizer: Path) -> subprocess.Popen[bytes]:
    (script := out.parent / "main.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(script), str(corpus), str(out), str(tokenizer)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for worker processes in /proc")
def test_killed_in_mid_run_and_called_again(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wanted in ("books/train.bin.tmp", "code/train.bin.tmp", "mail/train.bin.tmp"):
        process = start(corpus, out, prepared / "tokenizer.json")
        wait_for(lambda name=wanted: (out / name).exists(), process)
        below = children(process.pid)
        assert below
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in below):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
        assert not (out / "manifest.json").exists()
        for index in out.rglob("*.idx"):
            assert IndexedTokens(index.with_suffix("")).num_tokens > 0
    assert {path.parent.name for path in out.glob("*/prepare.json")} == {"books", "code"}
    prepare(
        [str(corpus)],
        out,
        tokenizer=str(prepared / "tokenizer.json"),
        validation_fraction=0.1,
        workers=1,
        progress=False,
    )
    wanted_tree = tree(prepared)
    del wanted_tree["prepare.json"]  # says that the tokenizer was trained, which it was not here
    assert tree(out) == wanted_tree


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for worker processes in /proc")
def test_killed_worker_is_an_error(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out", prepared / "tokenizer.json")
    wait_for((tmp_path / "out" / "code" / "train.bin.tmp").exists, process)
    for pid in children(process.pid) - {pid for pid in children(process.pid) if children(pid)}:
        try:
            if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert RankFailed.__name__ in errors.decode()
    assert "tokenising processes died" in errors.decode()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def die_while_sending() -> bytes:
    """Runs in a worker: its next message ends in the middle, as if it had been killed there."""

    def half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), bytes(message)[: len(message) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half
    return b"a result"


def test_worker_killed_while_it_sends_is_noticed(prepared: Path) -> None:
    """The pool alone would read on for ever; the other workers live and hold the pipe."""
    with Encoders(2, EncodeJob(str(prepared / "tokenizer.json"), "", 0, "<u2", "text")) as encoders:
        assert encoders._pool is not None
        with pytest.raises(BrokenProcessPool):
            encoders._result(encoders._pool.submit(die_while_sending))


def test_two_at_once(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "out", prepared / "tokenizer.json")
    wait_for((tmp_path / "out" / "books").exists, process)
    with pytest.raises(InputError, match="another prepare is writing"):
        prepare([str(corpus)], tmp_path / "out", workers=1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "3 of 3 domains" in errors.decode()


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
        assert fraction > 0.1 or domain.validation.documents == 1


def test_held_out_share_and_independence_of_chunks() -> None:
    mask = HeldOut("web", 1, 0.02).take(100_000)
    assert abs(mask.mean() - 0.02) < 0.002
    cut = HeldOut("web", 1, 0.02)
    np.testing.assert_array_equal(np.concatenate([cut.take(n) for n in (1, 0, 99, 99_900)]), mask)
    assert (HeldOut("web", 2, 0.02).take(100_000) != mask).any()
    assert (HeldOut("code", 1, 0.02).take(100_000) != mask).any()


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
    expect("version 2, this megamix reads version 1", version=2)
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
    with pytest.raises(InputError, match=r"domain 'code': .* its contents have changed"):
        manifest.verify_hashes()
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
