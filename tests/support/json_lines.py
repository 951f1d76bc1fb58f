"""Texts as the contents of a .jsonl file."""

from __future__ import annotations

import json


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode("utf-8")
