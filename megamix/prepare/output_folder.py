"""The output folder of `prepare`: who may write to it, and what is said where it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.prepare.shards import Shard

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turns the errors of a full or forbidden folder into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot write to {out}: {error.strerror} ({error.filename or 'while writing'}). Make room, or choose"
            " another output folder; what was safe is kept, and another call goes on from there."
        ) from error


@contextlib.contextmanager
def sole_writer(out: Path, shard: Shard) -> Iterator[None]:
    """Keeps a second job for the same work out of the folder. The locks go with the process, however that ends.

    Jobs of several share the folder's lock and each has one of its own; a job that is alone, or a merge, does not.
    """
    with contextlib.ExitStack() as files:
        alone = shard.count == 1
        _lock(files, out, ".prepare.lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH, "another prepare")
        if not alone:
            _lock(files, out, f".prepare{shard.suffix}.lock", fcntl.LOCK_EX, f"another prepare --shard {shard}")
        yield


def _lock(files: contextlib.ExitStack, out: Path, name: str, kind: int, who: str) -> None:
    file = files.enter_context(open(out / name, "a+b"))  # noqa: SIM115
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{who} is writing to {out}. Wait for it, or choose another folder.") from error
    except OSError:  # a file system without locks
        get_logger().info("%s cannot be locked: see that each job runs only once at a time", out)
