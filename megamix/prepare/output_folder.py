"""Output folder of `prepare`: its locks, and errors in writing to it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from megamix.core import locks
from megamix.core.errors import InputError
from megamix.prepare.shards import Shard

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Turns errors of a full or read-only folder into an `InputError`."""
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
    """Keeps a second job for the same work out of the folder.

    Jobs of several share the folder's lock, and each has one for its shard. A lone job, or a merge, shares none.
    """
    refused = f"is writing to {out}. Wait for it, or choose another folder."
    alone = shard.count == 1
    with contextlib.ExitStack() as held:
        held.enter_context(locks.hold(out / ".prepare.lock", f"another prepare {refused}", shared=not alone))
        if not alone:
            own = out / f".prepare{shard.suffix}.lock"
            held.enter_context(locks.hold(own, f"another prepare --shard {shard} {refused}"))
        yield
