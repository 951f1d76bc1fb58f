"""Standard streams of a command: closed ones, and an output that cannot be written."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megamix.core.errors import MegamixError


def open_streams() -> None:
    """Makes standard output say in one error that it cannot be written, and gives every closed stream a place.

    Without one, the next file opened would take its number, and whatever writes there would write into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number < 2 else os.O_WRONLY)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - as long as the process lives
    old = sys.stdout
    if old is not None:
        old.flush()
    sys.stdout = _StandardOutput(
        open(1, "wb", closefd=False),  # noqa: SIM115 - as long as the process lives
        encoding="utf-8" if old is None else old.encoding,
        # A character that the terminal's encoding lacks is written as its number.
        errors="backslashreplace" if old is None or old.errors == "strict" else old.errors,
        line_buffering=old is not None and old.isatty(),
    )


class _StandardOutput(io.TextIOWrapper):
    """Standard output; whoever reads it may leave (EPIPE), all else that keeps it from being written is an error."""

    def write(self, text: str, /) -> int:
        with _said():
            return super().write(text)

    def flush(self) -> None:
        with _said():
            super().flush()


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror or error
        raise MegamixError(f"cannot write to standard output: {reason}. Send it elsewhere.") from error
