"""Notes of finished work: inputs, options and results, from which a later `prepare` sees what it can keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pydantic

from megamix.core.config import Config
from megamix.core.files import replace_file
from megamix.data.tokens.manifest import SplitEntry
from megamix.prepare.storage import InputPath, Url, stat_of

R = TypeVar("R", bound=Config)


class PrepareSettings(Config):
    """Options that decide the contents of a domain's token files."""

    seed: int
    """Seed of the train/validation split."""
    validation_fraction: float
    """Share of the documents held out."""
    text_key: str
    """Key of the text in a JSON line."""
    tokenizer_sha256: str
    """Hash of tokenizer.json."""
    eod_id: int
    """Token at the end of every document."""
    dtype: str
    """Type of a stored token."""
    block_bytes: int
    """Text per block. It decides how jobs divide the text, not the result of all."""
    keep_empty: bool = False
    """Whether documents without text are kept."""
    skip_bad: bool = False
    """Whether what is no document is passed over."""
    text_files: tuple[str, ...] = ()
    """Patterns of names of files that are one document each."""


class InputFile(Config):
    """Identity of an input file when it was read."""

    path: str
    """Absolute path, or address."""
    num_bytes: int
    mtime_ns: int
    """Time of the last change; 0 for a remote file."""
    version: str | None = None
    """Of a remote file: its etag, or time of the last change."""


class PartNote(Config):
    """Finished part: one job's token files of one domain."""

    settings: PrepareSettings
    inputs: tuple[InputFile, ...]
    """All files of the domain."""
    train: SplitEntry
    validation: SplitEntry
    empty: int = 0
    """Documents without text that were left out."""
    skipped: dict[str, int] = pydantic.Field(default={})
    """Lines, rows and files that are no documents, by reason; each is a line of the part's skipped.jsonl."""
    nearest_train: tuple[int, int] | None
    """Hash and number of the training document that would be held out next."""
    nearest_validation: tuple[int, int] | None
    """Hash and number of the held-out document that would be trained on next."""


class ShardNote(Config):
    """Finished job of several: all its parts are there."""

    settings: PrepareSettings
    domains: tuple[str, ...]


class TokenizerNote(Config):
    """Finished tokenizer, from training or from the hub."""

    spec: str
    """The ``tokenizer`` option."""
    eod: str | None
    """The ``eod`` option."""
    text_key: str
    """Key of the text in a JSON line; where domains differ, all of them."""
    text_files: tuple[str, ...] = ()
    """See `PrepareSettings`."""
    inputs: tuple[tuple[InputFile, ...], ...]
    """Training text by domain; empty for a tokenizer of the hub."""
    sha256: str
    """Hash of tokenizer.json."""
    eod_id: int
    """The end-of-document token found."""


def input_files(paths: Sequence[InputPath]) -> tuple[InputFile, ...]:
    """The present identity of files."""
    return tuple(InputFile(path=_as_text(path), **stat_of(path)._asdict()) for path in paths)


def _as_text(path: InputPath) -> str:
    """The address or absolute path; bytes that are no UTF-8, which JSON cannot hold, as ``\\udcff``."""
    whole = path if isinstance(path, Url) else os.path.abspath(path)
    return whole.encode("utf-8", "backslashreplace").decode("utf-8")


def read_note(model: type[R], path: Path) -> R | None:
    """A note; None if it is missing or another version wrote it, so that the work is done again."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def write_note(note: Config, path: Path) -> None:
    """Writes a note, whole or not at all."""
    replace_file(path, (note.model_dump_json(indent=1) + "\n").encode("utf-8"))
