"""Wholeness of a record: every checkpoint says how large the files of the record were and how they ended, and a resume
what is missing.

Files of a record only grow, but for a resume, which cuts them back to what they held at its checkpoint. So a file that
is smaller than its checkpoint says has lost lines; and one that has other bytes where it ended then has lost lines
before them, or is another file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamix.core.files import parse_json
from megamix.core.text import listed

_FILES = ("*.jsonl", "*.bin", "statistics/*.bin", "shadow/*.jsonl", "shadow/*.bin")
_END_BYTES = 4096


def record_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of every file of the record in ``run_dir``, by its path there."""
    return {str(path.relative_to(run_dir)): path.stat().st_size for path in _files(run_dir)}


def record_ends(run_dir: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """A hash of the last bytes of every file of `record_sizes`, by its path."""
    return {name: _end(run_dir / name, size) for name, size in sizes.items()}


def measure_record(run_dir: Path) -> dict[str, Any]:
    """Sizes and ends as a checkpoint keeps them: ``record`` and ``record_ends`` of its state."""
    sizes = record_sizes(run_dir)
    return {"record": sizes, "record_ends": record_ends(run_dir, sizes)}


def missing_from_record(
    run_dir: Path, sizes: Mapping[str, int], step: int, ends: Mapping[str, str] | None = None
) -> str | None:
    """What a record has lost of the steps up to a checkpoint, in words; None where it is whole.

    Args:
        sizes: `record_sizes` at the checkpoint.
        step: of the checkpoint.
        ends: `record_ends` at the checkpoint; None for one of before they were kept.
    """
    lost = []
    for name, size in sizes.items():
        path = run_dir / name
        try:
            if not path.is_file():
                lost.append(f"{name} is gone ({size:,} bytes)")
            elif (left := path.stat().st_size) < size:
                lost.append(f"{name} has {left:,} of {size:,} bytes{_up_to(path)}")
            elif ends is not None and _end(path, size) != ends.get(name):
                lost.append(f"{name} has lost or changed bytes among its first {size:,}, or is another file")
        except OSError as error:
            lost.append(f"{name} cannot be read ({error.strerror or error})")
    if not lost:
        return None
    return (
        f"the record in {run_dir} is not whole: of the steps up to {step}, {listed(lost)}. The run goes on; what reads the "
        "record does not see these steps. If you have the files, stop the run, put them back, and resume it from this "
        "checkpoint (checkpoint.resume)."
    )


def _files(run_dir: Path) -> Iterator[Path]:
    for pattern in _FILES:
        yield from (path for path in sorted(run_dir.glob(pattern)) if path.is_file())


def _end(path: Path, size: int) -> str:
    """A hash of the last of the first ``size`` bytes."""
    with path.open("rb") as file:
        file.seek(max(size - _END_BYTES, 0))
        return hashlib.blake2b(file.read(min(size, _END_BYTES)), digest_size=8).hexdigest()


def _up_to(path: Path) -> str:
    """The step of the last line of a .jsonl file, in words; nothing where none can be told."""
    if path.suffix != ".jsonl":
        return ""
    try:
        whole = path.read_bytes().split(b"\n")[:-1]
        return f", up to step {int(parse_json(whole[-1])['step'])}"
    except (OSError, IndexError, ValueError, KeyError, TypeError, OverflowError):
        return ""
