"""File locks that end with their process, however it ends: flock, without waiting.

Every caller meets two kinds of file system: one with locks, where a file is free or held, and one without (as some NFS
and Lustre mounts are), where nothing keeps two jobs apart and the caller says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.log import get_logger

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def take(file: int, *, shared: bool = False) -> bool:
    """Locks an open file; False where another process holds it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True


@contextlib.contextmanager
def hold(path: Path, held: str, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of ``path``, a file that is made where it is missing; without locks, a line in the log says so.

    Raises:
        InputError: another process holds it, with the message ``held``.
    """
    with path.open("ab") as file:
        try:
            free = take(file.fileno(), shared=shared)
        except OSError:
            get_logger().info("%s cannot be locked: see that each job runs only once at a time", path.parent)
        else:
            if not free:
                raise InputError(held)
        yield
