"""Facts about this machine and its processes: cores, ports, open files, and the life of a child process."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from pathlib import Path

# Loaded before any fork: a child of a process with threads must not wait for the loader's lock.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with_parent(parent: int) -> None:
    """Makes this process end with ``parent``, however that ends; called in a child between fork and exec.

    Ranks must not outlive the process that watches them, nor keep its lock.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)


def process_began(process: int) -> int | None:
    """When a process of this host began, in clock ticks since the host did.

    Returns:
        None where it does not run: it has ended, or only threads of it are left.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])  # field 22 of proc(5)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def allow_more_files() -> None:
    """Raises the soft limit of open files, usually 1024, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
