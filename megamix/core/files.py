"""Files that are there whole or not at all, also after a power cut; and records of one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamix.errors import InputError


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` under ``path`` whole or not at all: a temporary file, flushed to disk, takes its name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl record, each of which has ``keys``; none where there is no file.

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
            line = json.loads(text)
        except ValueError as error:
            problem = str(error)
        else:
            absent = [key for key in keys if key not in line] if isinstance(line, dict) else list(keys)
            problem = f"it has no '{absent[0]}'" if absent else None
        if problem is not None:
            raise InputError(
                f"{path}, line {index} is damaged: {problem}. "
                "Remove that line, or resume the run from a checkpoint before it."
            )
        lines.append(line)
    return lines
