"""Temporary folders that the next start removes where their process was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megamix.core import locks


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder of this process, removed at the end of the block, with all that dead processes left under ``prefix``.

    The folder itself is locked, so that a folder in use is told from one that is left over.
    """
    _remove_left_over(prefix)
    folder, file = _make(prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


def _make(prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        file = os.open(folder, os.O_RDONLY)
        # Without a lock (NFS locks no folders: EBADF) it serves as well; only what is left over then stays.
        with contextlib.suppress(OSError):
            if not locks.take(file) or not folder.is_dir():  # another start took it for left over
                os.close(file)
                continue
        return folder, file


def _remove_left_over(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        # What belongs to others, is gone meanwhile or cannot be locked stays.
        with contextlib.suppress(OSError):
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(file).st_uid == os.getuid() and locks.take(file):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(file)
