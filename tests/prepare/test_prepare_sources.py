"""What `prepare` reads besides lines and parquet: arrow files and saved datasets, archives, files of one's own kind,
and what fsspec opens. Each gives the texts that were put in; what cannot be read is refused by name."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from json_lines import jsonl
from prepared import contents, stdlib_texts

from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.prepare import parts, storage
from megamix.prepare.documents import find_inputs
from megamix.prepare.pieces import iter_documents, pieces_of, read_piece
from megamix.prepare.pipeline import prepare
from megamix.prepare.samples import sample_texts
from megamix.prepare.storage import Url

TEXTS = [*stdlib_texts("json", 6), "Grüße 你好", *stdlib_texts("html", 3), "x", "y"]


def run(inputs: list[str], out: Path, **options: Any) -> Manifest | None:
    options = {"tokenizer": "train:300", "workers": 1, "validation_fraction": 0.3, "progress": False, **options}
    return prepare(inputs, out, **options)


def documents(out: Path, name: str) -> list[str]:
    manifest = Manifest.load(out)
    tokenizer, texts = manifest.load_tokenizer(), []
    for split in ("train", "validation"):
        stream = manifest.open_domain(name, split)
        texts += tokenizer.decode(stream.read(0, stream.num_tokens)).split("<|endoftext|>")[:-1]
    return sorted(texts)


def arrow(path: Path, texts: list[Any] = TEXTS, *, stream: bool = True, kind: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"n": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=5):
            writer.write_batch(batch)
    return path


def tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w", **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def by_blocks(path: Path, block_bytes: int) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    places: list[int] = []
    for number, piece in enumerate(pieces_of(path)):
        for block in read_piece(piece, number, block_bytes=block_bytes):
            found = block.documents()
            texts += found.texts
            places += found.places.tolist()
    return texts, places


# Tables. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("block_bytes", [50, 20_000, 1 << 20])
def test_rows_of_arrow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, block_bytes: int) -> None:
    monkeypatch.setattr("megamix.prepare.arrow._GROUP_BYTES", 30_000)
    path = arrow(tmp_path / "a.arrow", stream=stream)
    assert len(pieces_of(path)) > 1
    assert by_blocks(path, block_bytes) == (TEXTS, list(range(len(TEXTS))))
    assert set() < set(sample_texts([path], num_bytes=1 << 28)) <= set(TEXTS)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
def test_columns_of_bytes(tmp_path: Path, kind: Any) -> None:
    texts = [text.encode() for text in TEXTS]
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet")
    assert list(iter_documents(tmp_path / "a.parquet")) == TEXTS
    assert list(iter_documents(arrow(tmp_path / "a.arrow", texts, kind=kind))) == TEXTS
    path = arrow(tmp_path / "b.arrow", [b"fine", None, b"br\xffken"], kind=kind)
    assert list(iter_documents(path, skip_bad=True)) == ["fine"]
    with pytest.raises(InputError, match=r"b.arrow, row 2: 'text' is null"):
        list(iter_documents(path))


def test_damaged_arrow_files(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow")
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"plain text, no arrow file", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.arrow(: the arrow file is damaged| has 0 bytes)"):
            run([f"a={path}"], tmp_path / "out")
    with pytest.raises(InputError, match=r"no column 'body' \(columns: n, text\)"):
        list(iter_documents(arrow(path), "body"))
    path = arrow(tmp_path / "b.jsonl", stream=False)
    with pytest.raises(InputError, match=r"b.jsonl begins as a .arrow file does"):
        find_inputs([f"a={path}"])


def test_a_saved_dataset_without_what_map_left_in_it(tmp_path: Path) -> None:
    """As datasets 5 wrote it, with the file of a later ``map``."""
    saved = tmp_path / "dict" / "train"
    files = [arrow(saved / f"data-0000{n}-of-00002.arrow", TEXTS[n::2]) for n in range(2)]
    arrow(saved / "cache-ea4dc1bde530dff3.arrow", ["not part of it"])
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": file.name} for file in files]}))
    assert find_inputs([f"a={saved}"]) == {"a": files}
    assert find_inputs([str(tmp_path / "dict")]) == {"train": files}
    with pytest.raises(InputError, match=r"is one saved dataset. Name it as a domain: train="):
        find_inputs([str(saved)])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"splits train, test. Name one: .*/dict/train"):
        find_inputs([f"a={tmp_path / 'dict'}"])
    files[1].unlink()
    with pytest.raises(InputError, match=r"a saved dataset without data-00001-of-00002.arrow"):
        find_inputs([f"a={saved}"])


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    files = [{"filename": str(arrow(tmp_path / f"cache/{n}.arrow", TEXTS[n::2]))} for n in range(2)]

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if name in ("no/where", str(tmp_path)):
            raise ConnectionError("Couldn't reach 'no/where' on the Hub (LocalEntryNotFoundError)\nand more")
        return types.SimpleNamespace(cache_files=files)

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run(["a=hf://org/name:part@validation", "b=hf://org/name"], tmp_path / "out")
    assert asked == [("org/name", "part", "validation"), ("org/name", None, "train")]
    assert documents(tmp_path / "out", "a") == documents(tmp_path / "out", "b") == sorted(TEXTS)
    for text, message in (
        ("a=hf://no/where", "cannot be loaded: Couldn't reach 'no/where' on the Hub .LocalEntryNotFoundError.. Check"),
        (f"a=hf://{tmp_path}", f"names what is here, not a dataset of the hub. Leave hf:// out: {tmp_path}"),
        ("a=hf://org/name@train[:10%]", "name of a whole split"),
        ("hf://org/name", "is one dataset. Name it as a domain"),
    ):
        with pytest.raises(InputError, match=message) as error:
            find_inputs([text])
        assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets, .*pip install 'megamix\[datasets\]'"):
        find_inputs(["a=hf://org/name"])


# Archives. -----------------------------------------------------------------------------------------------------------

LONG = "d" * 120 + "/" + "e" * 90 + "/"


@pytest.mark.parametrize("name", ["w.tar", "w.tar.gz", "w.tgz"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_members_of_archives(tmp_path: Path, name: str, form: int, block_bytes: int) -> None:
    members: dict[str, bytes] = {"._a.txt": b"left out"}
    for number, text in enumerate(TEXTS):
        sample = f"{LONG if number % 2 else ''}{number:05}"
        if number % 3:
            members[sample + ".json"] = json.dumps({"text": text}).encode()
        else:
            members[sample + ".json"] = b"what is said of the sample"
            members[sample + ".txt"] = text.encode()
            members[sample + ".seg.json"] = b"too"
        members[sample + ".jpg"] = b"\xff\xd8" * 300
    path = tar(tmp_path / name, members, format=form)
    assert by_blocks(path, block_bytes) == (TEXTS, list(range(len(TEXTS))))
    assert set() < set(sample_texts([path], num_bytes=1 << 28)) <= set(TEXTS)
    assert not [path for path in tmp_path.iterdir() if path.name != name]


def test_a_bad_member_is_named(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "w.tar", {"a.txt": b"fine", "b.json": b'{"body": "x"}', "c.txt": b"br\xffken", "d.json": b"{"}
    )
    with pytest.raises(InputError, match=r"w.tar, b.json: no key 'text' \(keys: body\)"):
        list(iter_documents(path))
    assert list(iter_documents(path, skip_bad=True)) == ["fine"]


def header(**fields: Any) -> bytes:
    info = tarfile.TarInfo("a.txt")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


BAD_ARCHIVES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda data: data[:-9000], "damaged at byte [0-9]+ .it ends there"),
    (lambda data: data[:1024] + b"\1" + data[1025:], "damaged at byte 1536 .bad checksum"),
    (lambda data: header(size=1 << 40), "w.tar, a.txt: longer than 1024 MiB"),
    (lambda data: header(type=b"L", size=1 << 40), "a header of 1,099,511,627,776 bytes"),
    (lambda data: header(type=b"x", size=5) + b"9 a=b".ljust(512, b"\0"), "an extended header"),
    (lambda data: header(type=b"S"), "sparse file a.txt"),
    (lambda data: b"no archive" * 100, "damaged at byte 512"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_ARCHIVES)
def test_a_bad_archive(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tar(tmp_path / "w.tar", {"a.txt": b"one", "b.txt": b"two"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        list(iter_documents(path, skip_bad=True))
    packed = tmp_path / "p.tar.gz"
    packed.write_bytes(gzip.compress(tar(tmp_path / "q.tar", {"a.txt": b"one" * 500}).read_bytes())[:-20])
    with pytest.raises(InputError, match=r"p.tar.gz: .*(cut short|ends there)"):
        list(iter_documents(packed))


# Files of one's own kind, keys by domain. ----------------------------------------------------------------------------


def test_source_files_and_keys_by_domain(tmp_path: Path) -> None:
    (tmp_path / "in" / "code" / "deep").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / "code" / "deep" / f"{number}.py").write_text(text)
    (tmp_path / "in" / "code" / "notes.md").write_text("passed over")
    (tmp_path / "in" / "web.jsonl").write_bytes(jsonl(TEXTS, "body"))
    pq.write_table(pa.table({"content": TEXTS}), tmp_path / "in" / "rows.parquet")
    tar(tmp_path / "in" / "w.tar", {f"{number}.py": text.encode() for number, text in enumerate(TEXTS)})
    keys = ["body", "rows=content"]
    run([str(tmp_path / "in")], tmp_path / "out", text_files=["*.py"], text_key=keys)
    for name in ("code", "web", "rows", "w"):
        assert documents(tmp_path / "out", name) == sorted(TEXTS), name
    for bad, message in (
        (["a", "b"], "'b': expected one KEY for all domains"),
        (["rows="], "'rows=': expected"),
        (["no=a"], "--text-key: no domain 'no'"),
    ):
        with pytest.raises(InputError, match=message):
            run([str(tmp_path / "in")], tmp_path / "out", text_files=["*.py"], text_key=bad)


# What fsspec opens. --------------------------------------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """Breaks the connection at every second read, or always."""

    protocol = ("flaky",)
    store: Any = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    reads, always = 0, False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("flaky://", "memory://"))

    def unstrip_protocol(self, name: str) -> str:
        return f"flaky://{name}"

    def cat_file(self, *arguments: Any, **options: Any) -> bytes:
        Flaky.reads += 1
        if Flaky.always or Flaky.reads % 2:
            raise ConnectionResetError("by peer")
        data = super().cat_file(*arguments, **options)
        return data if Flaky.reads % 4 else data[:-1]


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(storage, "WAITS", (0, 0, 0, 0))
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.reads, Flaky.always = 0, False
    files = Flaky()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def put(remote: Any, tmp_path: Path) -> None:
    remote.pipe("/c/web.jsonl", jsonl(TEXTS))
    remote.pipe("/c/deep/er/a.jsonl.gz", gzip.compress(jsonl(TEXTS)))
    remote.pipe("/c/.hidden.jsonl", b"no")
    remote.pipe("/c/arrow.arrow", arrow(tmp_path / "a.arrow").read_bytes())
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    remote.pipe("/c/rows.parquet", (tmp_path / "a.parquet").read_bytes())
    remote.pipe(
        "/c/tar.tar", tar(tmp_path / "a.tar", {f"{n}.txt": t.encode() for n, t in enumerate(TEXTS)}).read_bytes()
    )
    remote.pipe("/c/txt/one.txt", b"one")
    remote.pipe("/c/txt/two.txt", b"two")


def test_remote_files_over_a_bad_connection(tmp_path: Path, remote: Any) -> None:
    """Each kind gives its texts once, though every second read breaks and every fourth comes short."""
    put(remote, tmp_path)
    found = find_inputs(["flaky://c"])
    assert sorted(found) == ["arrow", "deep", "rows", "tar", "txt", "web"]
    assert found["deep"] == [Url("flaky:///c/deep/er/a.jsonl.gz")]
    assert find_inputs(["x=flaky://c/*.jsonl,flaky://c/deep"]) == {
        "x": [Url("flaky:///c/deep/er/a.jsonl.gz"), Url("flaky:///c/web.jsonl")]
    }
    run(["flaky://c"], tmp_path / "out", block_bytes=3000)
    assert documents(tmp_path / "out", "txt") == ["one", "two"]
    for name in ("arrow", "deep", "rows", "tar", "web"):
        assert documents(tmp_path / "out", name) == sorted(TEXTS), name
    assert Flaky.reads > 50


def test_a_killed_prepare_of_remote_files(tmp_path: Path, remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the same bytes; what is finished is kept, unless a file has changed."""
    put(remote, tmp_path)
    given = ["web=flaky://c/web.jsonl,flaky://c/deep"]
    small = {"block_bytes": 3000, "journal_bytes": 500}
    run(given, tmp_path / "whole", **small)
    added, add = 0, parts.PartWriter.add

    def until(self: Any, encoded: Any) -> None:
        nonlocal added
        added += 1
        if added == 9:
            raise KeyboardInterrupt
        add(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(parts.PartWriter, "add", until)
        with pytest.raises(KeyboardInterrupt):
            run(given, tmp_path / "out", **small)
    run(given, tmp_path / "out", **small)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    Flaky.always = True
    run(given, tmp_path / "out", **small)  # reads nothing
    Flaky.always = False
    remote.pipe("/c/web.jsonl", jsonl(TEXTS[::-1]))  # of the same size
    (tmp_path / "out" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    run(given, tmp_path / "new", tokenizer=str(tmp_path / "tokenizer.json"), **small)
    run(given, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), **small)
    for name in ("train.bin", "validation.bin"):
        assert (tmp_path / "out/web" / name).read_bytes() == (tmp_path / "new/web" / name).read_bytes()
        assert (tmp_path / "out/web" / name).read_bytes() != (tmp_path / "whole/web" / name).read_bytes()


def test_remote_files_that_cannot_be_read(tmp_path: Path, remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(remote, tmp_path)
    for spec, message in (
        ("a=flaky://c/no.jsonl", r"cannot read flaky://c/no.jsonl: FileNotFoundError"),
        ("a=flaky://c/no/*.jsonl", "no file matches 'flaky://c/no/"),
        ("flaky://c/web.jsonl", "is no folder with a file or folder per domain. Name a file"),
        ("a=nothing://x/a.jsonl", "nothing://x/a.jsonl cannot be opened: ValueError .Protocol not known: nothing"),
        ("a=flaky://c/a.exe", "cannot read|is of an unknown kind"),
    ):
        with pytest.raises(InputError, match=message):
            find_inputs([spec])
    Flaky.always = True
    with pytest.raises(InputError, match=r"cannot read flaky:.*: ConnectionResetError .by peer., 5 times. .* goes on"):
        run(["a=flaky://c/web.jsonl"], tmp_path / "out")
    Flaky.always = False
    monkeypatch.setattr(Flaky, "cat_file", lambda self, path, start, end: bytes(end - start + 1))
    with pytest.raises(InputError, match="sends whole files instead of the parts"):
        run(["a=flaky://c/web.jsonl"], tmp_path / "out")
    monkeypatch.setattr(Flaky, "info", lambda self, path: {"name": path, "size": None, "type": "file"})
    with pytest.raises(InputError, match="does not give parts of files"):
        find_inputs(["a=flaky://c/web.jsonl"])
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(InputError, match=r"needs the package fsspec, .*pip install 'megamix\[remote\]'"):
        find_inputs(["a=flaky://c/web.jsonl"])
