"""Files that a run adds to while it goes on, so that a full disk is one clear error and leaves whole lines only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamix.errors import MegamixError


class AppendFile:
    """A file opened for adding to; what is added is with the operating system when `write` returns.

    Nothing is held back in memory: after a full disk, closing the file must not fail a second time.

    Raises:
        MegamixError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise write_failed(path, error) from error

    def write(self, data: bytes) -> None:
        """Adds ``data`` whole; where that fails, the file is cut back to what it held before, if that can be done.

        Raises:
            MegamixError: the disk is full, or whatever else keeps it from being written.
        """
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            # A reader takes no cut line for a whole one; but a row of a binary file would be followed by others.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise write_failed(self.path, error) from error
        self._size += len(data)

    def write_line(self, line: Mapping[str, Any]) -> None:
        """Adds ``line`` as JSON.

        Raises:
            ValueError: a number that is not finite: JSON has none.
            MegamixError: as `write`.
        """
        self.write((json.dumps(line, allow_nan=False) + "\n").encode("utf-8"))

    def sync(self) -> None:
        """Makes everything so far safe on disk.

        Raises:
            MegamixError: the disk is full; some filesystems say so only here.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_failed(self.path, error) from error

    def close(self) -> None:
        """Closes the file; a second time does nothing."""
        with contextlib.suppress(OSError):  # what it could say, `sync` has said
            self._file.close()


def write_failed(path: Path, error: OSError) -> MegamixError:
    """What a run ends with that cannot write its record."""
    return MegamixError(
        f"cannot write {path}: {error.strerror or error}. Free space or mend the disk; then the same command goes on from the "
        "last checkpoint."
    )
