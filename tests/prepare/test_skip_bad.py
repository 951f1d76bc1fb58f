"""``--on-bad-line skip``: what is no document is passed over, counted by reason and named; else all is as ever."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from json_lines import jsonl
from pyarrow import parquet

from megamix.core.errors import InputError
from megamix.prepare.merge import merge
from megamix.prepare.pipeline import prepare

GOOD = [f"text number {number} of many words " * 3 for number in range(400)]
BAD = {
    b'{"text": \n': "not JSON",
    b'{"body": "x"}\n': "no text",
    b'{"text": null}\n': "no text",
    b'["text"]\n': "no text",
    b'{"text": "\xff"}\n': "not UTF-8",
    b'{"text": "\\ud800"}\n': "half of a character",
}
COUNTS = {"half of a character": 1, "no text": 3, "not JSON": 1, "not UTF-8": 1}


def mixed() -> bytes:
    """The good lines, with a bad one after every 60."""
    lines = jsonl(GOOD).splitlines(keepends=True)
    for number, bad in enumerate(BAD, 1):
        lines.insert(61 * number - 1, bad)
    return b"".join(lines)


def run(inputs: list[str], out: Path, **options: Any) -> Any:
    settings = {"tokenizer": "train:300", "workers": 1, "progress": False, "block_bytes": 4096, "skip_bad": True}
    return prepare(inputs, out, **{**settings, **options})


def skipped(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("*/skipped*.jsonl")) for line in path.read_text().splitlines()]


def documents(out: Path) -> tuple[int, int]:
    notes = [json.loads(path.read_text()) for path in out.glob("a/prepare*.json")]
    return sum(note["train"]["documents"] for note in notes), sum(note["validation"]["documents"] for note in notes)


@pytest.mark.parametrize("packed", [False, True])
def test_lines(tmp_path: Path, packed: bool) -> None:
    data = mixed()
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(InputError, match=r"line 61: not valid JSON"):
        run([f"a={path}"], tmp_path / "stopped", skip_bad=False)
    run([f"a={path}"], tmp_path / "out", validation_fraction=0.1)
    assert sum(documents(tmp_path / "out")) == len(GOOD)
    told = skipped(tmp_path / "out")
    assert [(line["file"], line["reason"]) for line in told] == [(str(path), reason) for reason in BAD.values()]
    assert [data[line["byte"] :].startswith(bad) for line, bad in zip(told, BAD, strict=True)] == [True] * len(BAD)
    assert "no key 'text' (keys: body)" in told[1]["message"]
    note = json.loads((tmp_path / "out/a/prepare.json").read_text())
    assert note["skipped"] == COUNTS


def test_rows_and_files(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one two three", None, "four five six", None, "seven eight nine"]})
    parquet.write_table(table.slice(0, 4), tmp_path / "rows.parquet")
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo \xe4")
    (tmp_path / "good.txt").write_text("some words of text")
    paths = f"{tmp_path / 'rows.parquet'},{tmp_path / 'bad.txt'},{tmp_path / 'good.txt'}"
    with pytest.raises(InputError, match=r"bad\.txt, line 2: not valid UTF-8"):
        run([f"a={paths}"], tmp_path / "stopped", skip_bad=False)
    run([f"a={paths}"], tmp_path / "out")
    assert sum(documents(tmp_path / "out")) == 3
    told = [(Path(line["file"]).name, line.get("row"), line.get("byte")) for line in skipped(tmp_path / "out")]
    assert told == [("bad.txt", None, 0), ("rows.parquet", 2, None), ("rows.parquet", 4, None)]


def test_the_same_in_shards_and_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(mixed())
    whole = tmp_path / "whole"
    run([f"a={path}"], whole)

    from megamix.prepare import parts

    added, add = 0, parts.PartWriter.add

    def until(self: parts.PartWriter, encoded: Any) -> None:
        nonlocal added
        added += 1
        if added == 9:
            raise KeyboardInterrupt
        add(self, encoded)

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(parts.PartWriter, "add", until)
        with pytest.raises(KeyboardInterrupt):
            run([f"a={path}"], killed, journal_bytes=2000)
    before = skipped(killed)
    assert 0 < len(before) < len(BAD)
    # A line after the last safe point, as of a kill before the next.
    with open(killed / "a" / "skipped.jsonl", "ab") as file:
        file.write(b"{}\n")
    run([f"a={path}"], killed, journal_bytes=2000)
    for name in ("skipped.jsonl", "train.bin", "validation.bin", "prepare.json"):
        assert (killed / "a" / name).read_bytes() == (whole / "a" / name).read_bytes(), name

    shards = tmp_path / "shards"
    run([f"a={path}"], shards, tokenizer_only=True)
    for number in (1, 2, 3):
        run([f"a={path}"], shards, shard=f"{number}/3")
    merge(shards)
    assert sorted(line["byte"] for line in skipped(shards)) == sorted(line["byte"] for line in skipped(whole))
    assert documents(shards) == documents(whole)


def test_another_choice_is_another_data_set(tmp_path: Path) -> None:
    """What was prepared with skips is not kept by a call that stops at them; and nothing of it is left."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(mixed())
    run([f"a={path}"], tmp_path / "out")
    with pytest.raises(InputError, match="not valid JSON"):
        run([f"a={path}"], tmp_path / "out", skip_bad=False)
    assert skipped(tmp_path / "out") == []


def test_nothing_but_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(GOOD[:1]) + b"".join(BAD))
    with pytest.raises(InputError, match=r"has 1 non-empty documents \(6 skipped \(1 half of a character, 3 no text"):
        run([f"a={path}"], tmp_path / "out")
