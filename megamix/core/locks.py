"""File locks that end with their process, however it ends: flock, without waiting for a holder that works.

A killed process holds its locks until its last thread and the processes it gave them to have ended, which takes
seconds. So a lock file names its holder, and the lock of a dead process of this host is waited for.

There are file systems without locks (some NFS and Lustre mounts), where nothing keeps two jobs apart: callers say so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError, MegamixError
from megamix.core.files import parse_json
from megamix.core.log import get_logger
from megamix.core.processes import process_began

DYING_SECONDS = 30.0
POLL_SECONDS = 0.1
GLANCE_SECONDS = 0.5
"""Longer than `is_free` holds a lock."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

Holder = dict[str, Any]
"""What a lock file says of its holder; empty where it says nothing (yet)."""


class NoLocks(OSError):
    """The file system has no locks."""


def take(file: int, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file; False where another process holds it.

    Args:
        wait: until nobody holds it, for locks that are held for a moment only.

    Raises:
        NoLocks: the file system has none.
        OSError: it has, and fails.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            raise NoLocks(error.errno, error.strerror) from error
        raise
    return True


def acquire(
    path: Path,
    file: int,
    *,
    shared: bool = False,
    patience: Callable[[Holder], float] = lambda holder: 0.0,
    **facts: object,
) -> Holder | None:
    """Locks ``path``, open as ``file``, and writes this process and ``facts`` into it.

    Waits for a holder that is dead on this host, at most `DYING_SECONDS`.

    Args:
        patience: seconds to wait for any other holder.

    Returns:
        None once it is locked; else its holder.

    Raises:
        NoLocks: the file system has none.
        MegamixError: the file system fails.
    """
    began, is_said = time.monotonic(), False
    while not _take(path, file, shared=shared):
        holder = _read(file)
        limit = max(DYING_SECONDS if is_dead(holder) else 0.0, patience(holder))
        if time.monotonic() - began >= limit:
            return holder
        if not is_said and limit > GLANCE_SECONDS:
            get_logger().warning("waiting for the lock %s%s, which has ended", path, describe(holder))
            is_said = True
        time.sleep(POLL_SECONDS)
    _sign(path, file, facts)
    return None


def is_free(path: Path) -> bool | None:
    """Whether nobody holds the lock of ``path``; None where that cannot be told. It is held shared for a moment."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return None
    try:
        return take(file, shared=True)
    except OSError:
        return None
    finally:
        os.close(file)


@contextlib.contextmanager
def hold(path: Path, held: str, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of ``path``, a file that is made where it is missing; without locks, a line in the log says so.

    Raises:
        InputError: another process holds it, with the message ``held``.
        MegamixError: the file system fails.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            holder = acquire(path, file, shared=shared)
        except NoLocks:
            get_logger().info("%s cannot be locked: see that each job runs only once at a time", path.parent)
        else:
            if holder is not None:
                raise InputError(held)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Waits for other blocks like this one of the same folder, which are over in seconds. Where a folder cannot be
    locked, as on NFS, nobody waits."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            if not take(file):
                get_logger().info("%s: waiting for another process that works there", folder)
                take(file, wait=True)
        yield
    finally:
        os.close(file)


def is_dead(holder: Holder) -> bool:
    """Whether the holder is a process of this host that has ended, or of which only threads are left."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    began = process_began(process)
    return began is None or began != holder.get("began", began)  # else its number is another's by now


def describe(holder: Holder) -> str:
    """``: process 7 on node3, Slurm job 12, since 2026-01-31 12:00:00``; nothing where the holder is not known."""
    if not holder:
        return ""
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f": process {holder.get('process')} on {holder.get('host')}{job}, since {holder.get('since')}"


def _take(path: Path, file: int, *, shared: bool) -> bool:
    try:
        return take(file, shared=shared)
    except NoLocks:
        raise
    except OSError as error:
        raise MegamixError(
            f"cannot lock {path}: {error.strerror or error}. Without its lock two jobs may write there. Mend the file "
            "system, or choose another folder."
        ) from error


def _sign(path: Path, file: int, facts: Mapping[str, object]) -> None:
    process = os.getpid()
    who = {"host": socket.gethostname(), "process": process, "began": process_began(process)}
    holder = {**who, **facts, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, (json.dumps(holder) + "\n").encode(), 0)
    except OSError as error:  # a full disk; the lock holds without it
        get_logger().warning("cannot write %s: %s", path, error.strerror or error)


def _read(file: int) -> Holder:
    try:
        holder = parse_json(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}
