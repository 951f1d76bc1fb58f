"""A small corpus of real text in every kind of file, prepared once, and what to compare of a prepared folder."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import zstandard
from json_lines import jsonl

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def stdlib_texts(folder: str, num: int) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((STDLIB / folder).glob("*.py"))[:num]]


def write_corpus(folder: Path) -> Path:
    """Three domains in four kinds of file, about 1.5 MB."""
    code = stdlib_texts("asyncio", 40)
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "a.jsonl").write_bytes(jsonl(code[:10]) + b"\n" + jsonl(["", " \n", *code[10:20]]))
    (folder / "code" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(code[20:])))
    tests = stdlib_texts("json", 10) + stdlib_texts("email", 30)
    frames = zstandard.compress(jsonl(tests[:5])) + zstandard.compress(jsonl(tests[5:]))
    (folder / "mail.jsonl.zst").write_bytes(frames)
    (folder / "books").mkdir()
    for number, text in enumerate(stdlib_texts("http", 5) + stdlib_texts("html", 5) + ["Grüße aus Köln, 你好\n"] * 30):
        (folder / "books" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    (folder / "corpus.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("not json")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def contents(folder: Path) -> dict[str, Any]:
    """Every file, but of the records only what does not say how the work was cut."""
    found: dict[str, Any] = tree(folder)
    for name in [name for name in found if name.endswith("/prepare.json")]:
        found[name] = json.loads(found[name])
        del found[name]["settings"]["block_bytes"]
    found.pop("prepare.json", None)  # says where the tokenizer came from
    return found
