"""Token files, tokenizers and command lines for the tests of ``megamix blend``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from megamix.cli import app
from megamix.data.indexed import IndexedWriter
from megamix.data.tokenizer import train_tokenizer
from megamix.errors import InputError

EOD = 0
VOCAB = 270


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json with at most `VOCAB` entries, whose end-of-document token is `EOD`."""
    path = folder / "tokenizer.json"
    path.write_bytes(train_tokenizer(["in the beginning was the word " * 20], VOCAB))
    return path


def write_documents(prefix: Path, lengths: Sequence[int], dtype: str = "uint16", seed: int = 0) -> list[list[int]]:
    """Writes documents of so many random tokens, `EOD` the last, and returns them."""
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(1, 256, length - 1).tolist(), EOD] for length in lengths]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def blend(*arguments: object) -> str:
    """What ``megamix blend ARGUMENTS`` prints on standard output; raises what it raises."""
    result = CliRunner().invoke(app, ["blend", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def error_of(*arguments: object) -> str:
    """The message that ``megamix blend ARGUMENTS`` ends with."""
    result = CliRunner().invoke(app, ["blend", *map(str, arguments)])
    assert isinstance(result.exception, InputError), f"{result.exception!r}\n{result.output}"
    assert result.stdout == ""
    return str(result.exception)
