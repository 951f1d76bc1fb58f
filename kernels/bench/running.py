"""Processes of the acceptance: nothing that a measurement starts outlives it, or the acceptance.

A process that did would share the GPU with the measurements after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

OWNER = "MEGAMIX_ACCEPTANCE"
"""Variable of the environment: the process id of the acceptance."""
GRACE_S = 10.0
"""Time in which a launcher can end its ranks, which are in groups of their own."""


class Ended(NamedTuple):
    """How a process ended: its exit code, None after too long a time, and what it wrote to stderr."""

    code: int | None
    stderr: str


def run(command: Sequence[str], variables: Mapping[str, str], limit_s: float) -> Ended:
    """Runs a command in a process group of its own, and ends the group if it takes too long or this process stops."""
    environment = {**variables, OWNER: str(os.getpid())}
    with subprocess.Popen(
        command,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            _, stderr = process.communicate(timeout=limit_s)
            return Ended(process.returncode, stderr)
        except subprocess.TimeoutExpired:
            return Ended(None, "")
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group is empty
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)


def end_with_owner() -> None:
    """Makes this process and its group end with the acceptance that started it, however that ends."""
    owner = os.environ.get(OWNER)
    if owner is not None:
        threading.Thread(target=_watch, args=(int(owner),), daemon=True).start()


def _watch(owner: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(owner, 0)
            time.sleep(1)
    os.killpg(0, signal.SIGTERM)
