"""Files: written whole or not at all, added to line by line, and those that ship with megamix."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError, MegamixError, given_twice
from megamix.core.text import shortened

MOST_TEXT = 1 << 30
"""Bytes of a text file that is read as a whole."""


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` under ``path`` whole or not at all: a temporary file, flushed to disk, takes its name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(buffer[:size])
    return found.hexdigest()


def replace_json(path: Path, content: object) -> None:
    """Writes a JSON file for people and programs, as `replace_file` does."""
    replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def writing(place: object, remedy: str) -> Iterator[None]:
    """Turns an OSError into an InputError: ``cannot write PLACE: reason. REMEDY``."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}. {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file that people write: not of a device or a pipe, which may never end.

    Raises:
        InputError: it is none, or has more than ``most`` bytes.
        OSError: it cannot be read.
    """
    kind = path.stat()
    if not stat.S_ISREG(kind.st_mode) and not stat.S_ISDIR(kind.st_mode):
        raise InputError(f"{path} is a device or a pipe, expected a file. Check the path.")
    if kind.st_size > most:
        raise InputError(f"{path} has {kind.st_size:,} bytes, expected at most {most:,}. Check the path.")
    with path.open("rb") as file:
        return file.read(most)


@contextlib.contextmanager
def mode_of_umask(path: Path) -> Iterator[None]:
    """Gives ``path``, which the block writes, the mode of any new file there: some libraries leave 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def read_text(path: Path, what: str = "", lost: str = "Check the path.") -> str:
    """The text of a file.

    Args:
        what: the kind of file, for messages: ``the manifest``.
        lost: what to do about a file that cannot be read.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    try:
        return read_regular(path, MOST_TEXT).decode("utf-8")
    except OSError as error:
        named = f"{what} {path}".lstrip()
        raise InputError(f"cannot read {named}: {error.strerror or error}. {lost}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text: {error}. Check the path.") from error


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists or objects are nested too deep") from error


def read_json(path: Path, what: str = "", lost: str = "Check the path.", damaged: str = "Correct it.") -> Any:
    """The value in a JSON file.

    Args:
        what, lost: see `read_text`.
        damaged: what to do about a file that is no JSON.

    Raises:
        InputError: it cannot be read, is no JSON, or has an object with the same key twice.
    """
    text = read_text(path, what, lost)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not valid JSON: {reason}. {damaged}") from error


def read_csv(path: Path, what: str = "", lost: str = "Check the path.") -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not empty, each with the number of its last line.

    Args:
        what, lost: see `read_text`.

    Raises:
        InputError: it cannot be read, or a field is longer than 128 KiB, as after a quote that is never closed.
    """
    reader = csv.reader(io.StringIO(read_text(path, what, lost).removeprefix("\ufeff"), newline=""))
    try:
        return [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num} is no CSV: {error}. Look for a quote that is not closed."
        ) from error


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """json keeps the last of two equal keys in silence."""
    result = dict(pairs)
    if len(result) < len(pairs):
        doubled = given_twice(name for name, _ in pairs)
        raise InputError(f"{path} names '{doubled[0]}' twice. Keep one of them.")
    return result


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl record; none where there is no file.

    A last line that is still being written, or was cut off in writing, is left out.

    Raises:
        InputError: the file cannot be read, or a line is damaged; the message names file and line.
    """
    if not path.is_file():
        return []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    lines = []
    # What follows the last end of a line is a line that was cut off in writing, or nothing.
    for index, text in enumerate(content.split(b"\n")[:-1], start=1):
        line, problem = None, None
        try:
            line = parse_json(text)
        except ValueError as error:
            problem = str(error)
        else:
            problem = None if isinstance(line, dict) else f"it is {shortened(repr(line))}, expected an object"
        if problem is not None:
            raise InputError(
                f"{path}, line {index} is damaged: {problem}. "
                "Remove that line, or resume the run from a checkpoint before it."
            )
        lines.append(line)
    return lines


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

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def write(self, data: bytes) -> None:
        """Adds ``data`` whole; where that fails, the file is cut back to what it held before, if that can be done.

        Raises:
            MegamixError: the disk is full, or whatever else keeps it from being written; or the file was moved away.
        """
        self._check_place()
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

    def _check_place(self) -> None:
        """Raises MegamixError where the path names another file by now, or none: nobody would find what is added."""
        opened = os.fstat(self._file.fileno())
        try:
            named = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            named = None
        except OSError:
            return  # a file server that is not there for a moment; writing will tell
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise MegamixError(
                f"{self.path} was moved, removed or replaced while it was written to, and nobody would find what is added. "
                "Put it back where it was; then the same command goes on from the last checkpoint."
            )

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


def remove(path: Path) -> None:
    """Removes a file of a record, where it is there.

    Raises:
        MegamixError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise write_failed(path, error) from error


def write_failed(path: Path, error: OSError) -> MegamixError:
    """What a run ends with that cannot write its record."""
    return MegamixError(
        f"cannot write {path}: {error.strerror or error}. Free space or mend the disk; then the same command goes on from the "
        "last checkpoint."
    )


def shipped_folder(name: str) -> Path:
    """A folder that ships with megamix, ``configs`` or ``slurm``: in the checkout, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
