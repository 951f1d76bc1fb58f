"""Shards: any number of jobs write what one writes, each document once and in the same split; merge checks them all."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_lines import jsonl
from prepared import stdlib_texts, write_corpus

from megamix.core.errors import InputError
from megamix.data.tokens.indexed import IndexedTokens
from megamix.data.tokens.manifest import Manifest, Split
from megamix.data.tokens.verify import verify_all
from megamix.prepare.columns import RowGroup
from megamix.prepare.kinds import kind_of
from megamix.prepare.merge import merge
from megamix.prepare.pieces import Piece, pieces_of, read_piece
from megamix.prepare.pipeline import prepare
from megamix.prepare.shards import Shard, divide

OPTIONS: dict[str, Any] = {"validation_fraction": 0.1, "workers": 1, "progress": False, "block_bytes": 5000}
SPLITS: tuple[Split, Split] = ("train", "validation")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    texts = pa.array(stdlib_texts("importlib", 20) + stdlib_texts("urllib", 5), pa.string())
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet", row_group_size=4)
    (folder / "huge.jsonl").write_bytes(jsonl(stdlib_texts("unittest", 10) + ["a short one"] * 50))
    (folder / "packed").mkdir()
    for number, text in enumerate(stdlib_texts("logging", 3) + stdlib_texts("ctypes", 9)):
        (folder / "packed" / f"{number}.jsonl.gz").write_bytes(gzip.compress(jsonl(text.splitlines(True))))
    return folder


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    prepare([str(corpus)], out, tokenizer="train:600", **OPTIONS)
    return out


def documents(out: Path) -> dict[tuple[str, str], Counter[bytes]]:
    """How often each document stands in each split of each domain."""
    manifest = Manifest.load(out)
    found: dict[tuple[str, str], Counter[bytes]] = {}
    for domain in manifest.domains:
        for split in SPLITS:
            count = found[domain.name, split] = Counter()
            for prefix in manifest.prefixes(domain.name, split):
                tokens = IndexedTokens(prefix)
                ends = [*tokens.document_starts.tolist(), tokens.num_tokens]
                count.update(tokens.tokens[a:b].tobytes() for a, b in itertools.pairwise(ends))
    return found


@pytest.fixture(scope="module")
def sharded(corpus: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, not merged."""
    out = tmp_path_factory.mktemp("sharded")
    for number in (2, 3, 1):
        given = prepare([str(corpus)], out, tokenizer=str(alone / "tokenizer.json"), shard=f"{number}/3", **OPTIONS)
        assert given is None
    return out


@pytest.mark.parametrize("count", [2, 5])
def test_union_is_what_one_job_writes(corpus: Path, alone: Path, tmp_path: Path, count: int) -> None:
    for number in range(count, 0, -1):
        prepare([str(corpus)], tmp_path, tokenizer=str(alone / "tokenizer.json"), shard=f"{number}/{count}", **OPTIONS)
    manifest = merge(tmp_path)
    assert manifest == Manifest.load(tmp_path)
    verify_all(manifest)
    assert documents(tmp_path) == documents(alone)
    wanted = Manifest.load(alone)
    assert manifest.domain_names == wanted.domain_names
    for domain in manifest.domains:
        one = wanted.domain(domain.name)
        for seen, expected in ((domain.train, one.train), (domain.validation, one.validation)):
            counts = (seen.tokens, seen.documents, seen.max_token)
            assert counts == (expected.tokens, expected.documents, expected.max_token)
        assert domain.validation.unigram_nats == pytest.approx(one.validation.unigram_nats, rel=1e-12)
        assert list(domain.train.prefixes) == sorted(domain.train.prefixes)
        assert domain.train.prefixes[0].endswith(f"-of-{count:05}")
    # One file is spread, too, and documents of its one domain come from every job.
    assert len(manifest.domain("huge").train.prefixes) == count
    assert len(manifest.domain("mail").train.prefixes) > 1
    assert len(manifest.domain("packed").train.prefixes) == count


def test_tokenizer_is_made_once_and_before(corpus: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "tokenizer": "train:300"}
    with pytest.raises(InputError, match=r"shard 1/2: .*tokenizer\.json is not there.*--tokenizer-only"):
        prepare([str(corpus)], tmp_path, shard="1/2", **options)
    assert prepare([str(corpus)], tmp_path, tokenizer_only=True, **options) is None
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"tokenizer.json", "prepare.json"}
    made = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    for number in (1, 2):
        prepare([str(corpus)], tmp_path, shard=f"{number}/2", **options)
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == made
    assert merge(tmp_path).tokenizer.vocab_size == 300
    with pytest.raises(InputError, match="was made from other text or options"):
        prepare([str(corpus)], tmp_path, shard="1/2", **{**options, "tokenizer": "train:301"})


def test_second_call_keeps_a_finished_shard(corpus: Path, alone: Path, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    prepare([str(corpus)], tmp_path / "out", tokenizer=str(alone / "tokenizer.json"), shard="2/3", **OPTIONS)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}


@pytest.mark.parametrize("text", ["0/8", "9/8", "x", "", "1", "1/0", "-1/2", "1/2/3", "1.5/2", " 1/2"])
def test_bad_shards(corpus: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=f"shard '{text}': expected i/n with i from 1 to n"):
        prepare([str(corpus)], tmp_path / "out", shard=text, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_merge_of_what_cannot_be_merged(corpus: Path, alone: Path, sharded: Path, tmp_path: Path) -> None:
    def again() -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return Path(shutil.copytree(sharded, tmp_path / "out"))

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            merge(tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()

    tokenizer = str(alone / "tokenizer.json")
    with pytest.raises(InputError, match="is no folder"):
        merge(tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    refused("holds no shards to merge")
    out = again()
    (out / "shard-00002-of-00003.json").unlink()
    refused("shard 2/3 has not finished")
    (out / "shard-00003-of-00003.json").unlink()
    refused("shard 2/3, 3/3 has not finished")
    out = again()
    (out / "code" / "prepare-00002-of-00003.json").unlink()
    refused("domain 'code': shard 2/3 is not finished there")
    out = again()
    (out / "huge" / "train-00003-of-00003.bin").write_bytes(b"")
    refused("domain 'huge': shard 3/3 is not finished there, or its files are not those it wrote")
    again()
    prepare([str(corpus)], out, tokenizer=tokenizer, shard="2/3", **{**OPTIONS, "seed": 5})
    refused("seed is 1234 in shard 1/3, but 5 in shard 2/3")
    again()
    prepare([str(corpus)], out, tokenizer=tokenizer, shard="3/3", **{**OPTIONS, "block_bytes": 6000})
    refused("block_bytes is 5000 in shard 1/3, but 6000 in shard 3/3")
    again()
    prepare([f"code={corpus / 'code'}"], out, tokenizer=tokenizer, shard="2/3", **OPTIONS)
    refused(r"shards 1/3 and 2/3 do not have the same domains \(books, huge, mail")
    again()
    prepare([str(corpus)], out, tokenizer=tokenizer, shard="1/2", **OPTIONS)
    refused("holds shards of 2 and of 3 jobs")
    again()
    record = json.loads((out / "huge" / "prepare-00003-of-00003.json").read_text())
    record["inputs"][0]["num_bytes"] += 1
    (out / "huge" / "prepare-00003-of-00003.json").write_text(json.dumps(record))
    refused(r"domain 'huge': shards 1/3 and 3/3 were made from different text \(.*huge\.jsonl")
    again()
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text() + "\n")
    refused("but the tokens were made with")
    with pytest.raises(InputError, match="is another tokenizer than the one given"):
        prepare([str(corpus)], out, tokenizer=tokenizer, shard="1/3", **OPTIONS)


def test_jobs_that_write_to_one_folder(corpus: Path, alone: Path, sharded: Path, tmp_path: Path) -> None:
    from megamix.prepare.output_folder import sole_writer

    out = Path(shutil.copytree(sharded, tmp_path / "out"))
    tokenizer = str(alone / "tokenizer.json")
    with sole_writer(out, Shard(2, 3)):
        with pytest.raises(InputError, match="another prepare --shard 2/3 is writing"):
            prepare([str(corpus)], out, tokenizer=tokenizer, shard="2/3", **OPTIONS)
        prepare([str(corpus)], out, tokenizer=tokenizer, shard="1/3", **OPTIONS)
        with pytest.raises(InputError, match="another prepare is writing"):
            merge(out)
        with pytest.raises(InputError, match="another prepare is writing"):
            prepare([str(corpus)], out, tokenizer=tokenizer, **OPTIONS)
    assert len(merge(out).domains) == 6


@pytest.mark.parametrize("fraction", [0.0, 1e-9])
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_document_is_held_out_where_chance_holds_out_none(tmp_path: Path, fraction: float, count: int) -> None:
    texts = [f"document number {number} of a small domain" for number in range(40)]
    (tmp_path / "web.jsonl").write_bytes(b"\n" * 300 * round(1 - fraction) + jsonl(texts))
    options = {**OPTIONS, "tokenizer": "train:300", "validation_fraction": fraction, "block_bytes": 200}
    held_out: set[str] = set()
    for out, jobs in ((tmp_path / "alone", 1), (tmp_path / "shards", count)):
        prepare([f"web={tmp_path / 'web.jsonl'}"], out, tokenizer_only=True, **options)
        for number in range(1, jobs + 1):
            prepare([f"web={tmp_path / 'web.jsonl'}"], out, shard=f"{number}/{jobs}", **options)
        manifest = Manifest.load(out) if jobs == 1 else merge(out)
        assert (manifest.domain("web").train.documents, manifest.domain("web").validation.documents) == (39, 1)
        verify_all(manifest)
        manifest = Manifest.load(out)
        seen: dict[Split, list[str]] = {}
        for split in SPLITS:
            tokens = manifest.open_domain("web", split)
            flat = tokens.read(0, tokens.num_tokens)
            seen[split] = manifest.load_tokenizer().decode(flat).split("<|endoftext|>")[:-1]
        assert sorted(seen["train"] + seen["validation"]) == sorted(texts)
        held_out |= set(seen["validation"])
        counts = sum(np.load(path) for path in (out / "web").glob("counts*.npy"))
        assert counts.sum(axis=1).tolist() == [
            manifest.domain("web").train.tokens,
            manifest.domain("web").validation.tokens,
        ]
    assert len(held_out) == 1


def group(number: int) -> RowGroup:
    return RowGroup(number, 0, 1, 1, 1)


@settings(deadline=None, max_examples=200)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(["jsonl", "gz", "parquet", "txt"]), st.integers(0, 10**6)), max_size=30),
    count=st.integers(1, 12),
)
def test_every_block_has_one_job(kinds: list[tuple[str, int]], count: int) -> None:
    pieces = [
        Piece(f"{number}.{kind}", number, size, kind_of(f".{kind}"), group(number) if kind == "parquet" else None)
        for number, (kind, size) in enumerate(kinds)
    ]
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(1, count + 1):
        shares = divide(pieces, Shard(number, count))
        assert [share.piece.file for share in shares] == sorted(share.piece.file for share in shares)
        seen.update((share.piece.file, block) for share in shares for block in range(40) if share.wants(block))
    assert seen == Counter({(number, block): 1 for number in range(len(pieces)) for block in range(40)})


def test_division_is_even() -> None:
    many = [Piece(f"{number}.jsonl.gz", number, 1000 + number * 7 % 500) for number in range(100)]
    huge = Piece("huge.jsonl.gz", 100, 10_000_000)
    rows = [Piece("huge.jsonl", 101, 5_000_000)]
    loads = [sum(share.num_bytes for share in divide([*many, huge, *rows], Shard(n, 8))) for n in range(1, 9)]
    assert max(loads) < 1.01 * min(loads)
    loads = [sum(share.num_bytes for share in divide(many, Shard(n, 8))) for n in range(1, 9)]
    assert max(loads) < 1.1 * min(loads)  # 12 or 13 files each


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=40), block_bytes=st.integers(1, 90), end=st.booleans())
def test_blocks_of_a_plain_file_cut_no_line(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], block_bytes: int, end: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [json.dumps({"text": "x" * size}).encode() if size % 5 else b"" for size in sizes]
    path.write_bytes(b"\n".join(lines) + b"\n" * end)
    texts: list[str] = []
    places: list[int] = []
    for block in read_piece(*pieces_of(path), block_bytes=block_bytes):
        found = block.documents()
        texts += found.texts
        places += found.places.tolist()
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1]
    assert texts == [json.loads(line)["text"] for line in lines if line]
    assert places == [start for start, line in zip(starts, lines, strict=True) if line]
