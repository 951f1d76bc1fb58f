"""Journal of an unfinished part: the place from which a killed job continues.

A file of JSON lines: a header with inputs and options, then one mark per safe point. A mark is written and flushed
after the token files have been flushed up to it. A torn last line, left by a kill, is ignored.
"""

from __future__ import annotations

import os
from pathlib import Path

import pydantic

from megamix.core.config import Config
from megamix.core.files import replace_file
from megamix.prepare.done_notes import InputFile, PrepareSettings


class Header(Config):
    """Inputs and options of a part."""

    settings: PrepareSettings
    shard: str
    """The job, as i/n."""
    inputs: tuple[InputFile, ...]
    """All files of the domain."""


class Kept(Config):
    """Safe amount of a split."""

    tokens: int = 0
    documents: int = 0
    nearest: tuple[int, int] | None = None
    """See `PartNote`."""


class Mark(Config):
    """Safe point."""

    share: int = 0
    """Number of the next share to read."""
    block: int = 0
    """Number of the next block in the share."""
    num_files: int = 0
    """Files of the domain up to the last one of which something was read."""
    file_bytes: int = 0
    """Bytes of input done."""
    empty: int = 0
    """Documents left out so far."""
    skipped: dict[str, int] = pydantic.Field(default={})
    """See `PartNote`, so far."""
    skipped_bytes: int = 0
    """Size of skipped.jsonl."""
    train: Kept = Kept()
    validation: Kept = Kept()


class Journal:
    """Journal of one part.

    Attributes:
        mark: The last mark that an earlier job with the same header left, or the beginning.
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
        """Whether the files read up to the mark are unchanged; to a single job, later files do not matter."""
        if (before.settings, before.shard) != (self._header.settings, self._header.shard):
            return False
        if self._header.shard != "1/1":
            return before.inputs == self._header.inputs
        return before.inputs[: mark.num_files] == self._header.inputs[: mark.num_files]

    def begin(self) -> None:
        """Starts the file again with header and `mark`."""
        replace_file(self._path, _lines(self._header, self.mark))

    def add(self, mark: Mark) -> None:
        """Adds a mark. The token files must be on disk up to it."""
        with open(self._path, "ab") as file:
            file.write(_lines(mark))
            file.flush()
            os.fsync(file.fileno())
        self.mark = mark

    def remove(self) -> None:
        """Removes the file, when the part is finished or abandoned."""
        self._path.unlink(missing_ok=True)


def _lines(*entries: Config) -> bytes:
    return b"".join(entry.model_dump_json().encode("utf-8") + b"\n" for entry in entries)
