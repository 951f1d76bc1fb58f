"""What `prepare` notes about a finished piece of work, to see later whether it must be done again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pydantic

from megamix.core.config import Config
from megamix.core.files import replace_file
from megamix.data.tokens.manifest import SplitEntry

R = TypeVar("R", bound=Config)


class PrepareSettings(Config):
    """The options that decide what the token files of a domain hold."""

    seed: int
    """Seed of the split."""
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
    """Text in a block. It decides which job reads what, not what is written in all."""


class InputFile(Config):
    """An input file as it was when it was read."""

    path: str
    """Absolute path."""
    num_bytes: int
    """Its size."""
    mtime_ns: int
    """When it was last changed."""


class PartRecord(Config):
    """A finished part: what one job has made of one domain. Where there is one job, that is the domain."""

    settings: PrepareSettings
    """The options it was made with."""
    inputs: tuple[InputFile, ...]
    """The text of the domain."""
    train: SplitEntry
    """What is trained on."""
    validation: SplitEntry
    """What is held out."""
    nearest_train: tuple[int, int] | None
    """Hash and number of the training document that would be held out next."""
    nearest_validation: tuple[int, int] | None
    """Hash and number of the held-out document that would be trained on next."""


class ShardRecord(Config):
    """A job of several that has finished all its parts."""

    settings: PrepareSettings
    """Its options."""
    domains: tuple[str, ...]
    """The domains."""


class TokenizerRecord(Config):
    """A finished tokenizer that came from training or from the hub."""

    spec: str
    """The option it was made from."""
    eod: str | None
    """The end-of-document token asked for."""
    text_key: str
    """Key of the text in a JSON line."""
    inputs: tuple[tuple[InputFile, ...], ...]
    """The text it was trained on, by domain; empty where it was fetched."""
    sha256: str
    """Hash of tokenizer.json."""
    eod_id: int
    """The end-of-document token found."""


def input_files(paths: Sequence[Path]) -> tuple[InputFile, ...]:
    """The files as they are now."""
    stats = [(path, path.stat()) for path in paths]
    return tuple(
        InputFile(path=os.path.abspath(path), num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns) for path, stat in stats
    )


def read_record(model: type[R], path: Path) -> R | None:
    """None where there is no record, or one that this version cannot read: the work is then done again."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def write_record(record: Config, path: Path) -> None:
    """Writes a record, whole or not at all."""
    replace_file(path, (record.model_dump_json(indent=1) + "\n").encode("utf-8"))
