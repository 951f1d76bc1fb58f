"""Shards written by another program's tasks: together they are the texts, and `merge` takes them for what they are."""

from __future__ import annotations

import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import stdlib_texts
from readme_code import readme_code

from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.data.tokens.tokenizer import train_tokenizer
from megamix.data.tokens.verify import verify_all
from megamix.prepare.merge import merge
from megamix.prepare.text_writer import TextWriter

TEXTS = [*stdlib_texts("json", 6), "Grüße 你好", "", " \n", *stdlib_texts("html", 3), *map(str, range(200))]
PAIRS = [(("web", "code")[number % 3 == 0], text) for number, text in enumerate(TEXTS)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    path = tmp_path / "given.json"
    path.write_bytes(train_tokenizer(TEXTS[:6], 300))
    return str(path)


def texts(manifest: Manifest, name: str, split: Any) -> list[str]:
    stream = manifest.open_domain(name, split)
    return manifest.load_tokenizer().decode(stream.read(0, stream.num_tokens)).split("<|endoftext|>")[:-1]


def test_all_texts_once(tmp_path: Path, tokenizer: str) -> None:
    writer = TextWriter(tmp_path / "out", ["web", "code", "web2"], tokenizer, validation_fraction=0.2)
    pairs = [*PAIRS, ("web2", "one"), ("web2", "two")]

    def broken() -> Iterator[tuple[str, str]]:
        yield from pairs[:40]
        raise ConnectionError("the task ends here")

    for number in (2, 1, 3):
        if number == 1:
            with pytest.raises(ConnectionError):
                writer.write(broken(), "1/3")
            with pytest.raises(InputError, match="shard 1/3, 3/3 has not finished"):
                merge(tmp_path / "out")
        share = pairs[number - 1 :: 3]
        assert pickle.loads(pickle.dumps(writer)).write(share, f"{number}/3") == sum(bool(t.strip()) for _, t in share)
    writer.write(pairs[1::3], "2/3")  # a second time
    manifest = merge(tmp_path / "out")
    verify_all(manifest)
    for name in ("web", "code", "web2"):
        train, held = (texts(manifest, name, split) for split in ("train", "validation"))
        assert sorted(train + held) == sorted(text for domain, text in pairs if domain == name and text.strip())
        assert held
        assert len(held) < len(train) or name == "web2"


def test_shards_hold_out_documents_of_their_own(tmp_path: Path, tokenizer: str) -> None:
    writer = TextWriter(tmp_path / "out", ["web"], tokenizer, validation_fraction=0.3)
    for shard in ("1/2", "2/2"):
        writer.write((("web", str(number)) for number in range(100)), shard)
    held = texts(merge(tmp_path / "out"), "web", "validation")
    assert 30 < len(held) < 90
    assert len(set(held)) > 1.2 * len(held) / 2


def test_a_step_of_datatrove(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the chapter, with a stand-in for the executor that does as datatrove's."""

    class LocalPipelineExecutor:
        def __init__(self, pipeline: list[Any], tasks: int, workers: int) -> None:
            self.pipeline, self.tasks = pipeline, min(tasks, 3)

        def run(self) -> None:
            for rank in range(self.tasks):
                data = None
                for step in self.pipeline:
                    data = step(data, rank, self.tasks)
                assert list(data) == []

    def reader(folder: str) -> Any:
        return lambda data, rank, size: iter(
            types.SimpleNamespace(text=each, metadata={}) for each in TEXTS[rank::size]
        )

    for name in ("datatrove", "datatrove.executor", "datatrove.pipeline", "datatrove.pipeline.readers"):
        module: Any = types.ModuleType(name)
        module.LocalPipelineExecutor, module.ParquetReader = LocalPipelineExecutor, reader
        monkeypatch.setitem(__import__("sys").modules, name, module)
    monkeypatch.chdir(tmp_path)
    exec(readme_code("prepare", "LocalPipelineExecutor").replace("/models/tokenizer.json", tokenizer), {})
    manifest = merge("data/web")
    found = texts(manifest, "web", "train") + texts(manifest, "web", "validation")
    assert sorted(found) == sorted(text for text in TEXTS if text.strip())


def test_refused(tmp_path: Path, tokenizer: str) -> None:
    writer = TextWriter(tmp_path / "out", ["web", "code"], tokenizer)
    step = types.SimpleNamespace
    for action, message in (
        (lambda: writer.write(PAIRS, "1/1"), "expected at least two"),
        (lambda: writer.write([("wbe", "x")], "1/2"), "a text is of the domain 'wbe'. Did you mean 'web'"),
        (lambda: writer([step(text="x", metadata={})], 0, 2), "a text is of the domain 'None'"),
        (lambda: writer.write([("web", "\ud800")], "1/2"), "the texts of 'web', row 1: not valid UTF-8"),
        (lambda: TextWriter(tmp_path, ["a", "a"], tokenizer).write([], "1/2"), "two domains are called 'a'"),
        (lambda: TextWriter(tmp_path, ["a"], "train:300").write([], "1/2"), "a path to a tokenizer.json, or hf:NAME"),
        (lambda: TextWriter(tmp_path, ["a"], tokenizer, validation_fraction=2).write([], "1/2"), "expected 0 to 0.5"),
    ):
        with pytest.raises(InputError, match=message):
            action()
    assert not list(tmp_path.rglob("*.tmp"))
    writer.write(PAIRS, "1/2")
    (tmp_path / "other.json").write_bytes(train_tokenizer(TEXTS[:6], 290))
    with pytest.raises(InputError, match="but the tokens were made with"):
        TextWriter(tmp_path / "out", ["web", "code"], str(tmp_path / "other.json")).write(PAIRS, "2/2")
