"""Facts about this machine and its processes: cores, ports, open files, and the life of a child process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
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
    """A port of this machine that nobody uses, and that stays free until it is listened on.

    Not one that the kernel hands out: another process may get that one for a connection in the meantime.
    """
    lowest = _lowest_handed_out()
    below = range(min(lowest, max(1024, lowest - 16384)), lowest)
    for port in (*random.SystemRandom().sample(below, min(100, len(below))), 0):  # 0: the kernel's choice, if need be
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return probe.getsockname()[1]
    raise OSError("this machine has no free port")


def _lowest_handed_out() -> int:
    """The lowest port that the kernel gives to a process which asks for any."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 32768  # Linux; others begin higher


def allow_more_files() -> None:
    """Raises the soft limit of open files, usually 1024, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
