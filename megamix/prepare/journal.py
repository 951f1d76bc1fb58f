"""How far a job has come within a domain, so that one that was killed goes on from there.

The journal is a file of JSON lines: a header that says what is being made from what, then a mark for every safe point.
A mark is written after the token files have been flushed to disk up to it, and flushed itself. A torn last line, the
trace of a kill, is no mark.
"""

from __future__ import annotations

import os
from pathlib import Path

import pydantic

from megamix.core.config import Config
from megamix.core.files import replace_file
from megamix.prepare.done_notes import InputFile, PrepareSettings


class Header(Config):
    """What is being made."""

    settings: PrepareSettings
    """The options."""
    shard: str
    """Which job of how many, as i/n."""
    inputs: tuple[InputFile, ...]
    """The text of the domain."""


class Kept(Config):
    """How much of a split is safe."""

    tokens: int = 0
    """Tokens in its file."""
    documents: int = 0
    """Documents in its file."""
    nearest: tuple[int, int] | None = None
    """See `PartRecord`."""


class Mark(Config):
    """A safe point."""

    share: int = 0
    """Number of the share to go on with."""
    block: int = 0
    """Number of its block to go on with."""
    num_files: int = 0
    """Files of the domain of which something has been read, and those before them."""
    file_bytes: int = 0
    """Bytes of input that are done."""
    train: Kept = Kept()
    """The training split."""
    validation: Kept = Kept()
    """The validation split."""


class Journal:
    """The journal of one part.

    Args:
        path: The file.
        header: What is to be made now.

    Attributes:
        mark: Where to go on: the last mark that an earlier job for the same left, or the beginning.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self.mark = self._last_mark()

    def _last_mark(self) -> Mark:
        try:
            lines = self._path.read_bytes().splitlines()
            before = Header.model_validate_json(lines[0])
        except (OSError, IndexError, pydantic.ValidationError):
            return Mark()
        found = Mark()
        for line in lines[1:]:
            try:
                mark = Mark.model_validate_json(line)
            except pydantic.ValidationError:
                break
            if self._still_true(before, mark):
                found = mark
        return found

    def _still_true(self, before: Header, mark: Mark) -> bool:
        """Whether the files read up to the mark are the same; those after it do not matter to a job that is alone."""
        if (before.settings, before.shard) != (self._header.settings, self._header.shard):
            return False
        if self._header.shard != "1/1":
            return before.inputs == self._header.inputs
        return before.inputs[: mark.num_files] == self._header.inputs[: mark.num_files]

    def begin(self) -> None:
        """Starts the file anew, from `mark` on."""
        replace_file(self._path, _lines(self._header, self.mark))

    def add(self, mark: Mark) -> None:
        """Notes a safe point. What it says must be on disk already."""
        with open(self._path, "ab") as file:
            file.write(_lines(mark))
            file.flush()
            os.fsync(file.fileno())
        self.mark = mark

    def remove(self) -> None:
        """To call when the part is finished, or given up."""
        self._path.unlink(missing_ok=True)


def _lines(*entries: Config) -> bytes:
    return b"".join(entry.model_dump_json().encode("utf-8") + b"\n" for entry in entries)
