"""Run lock: one job at a time in the directory of a run or a cache, by a lock on its file ``lock``.

The file stays and names the holder, for the message to a second job; only the lock on it counts.

An NFS server takes back the locks of a client that has lost its power only after its lease, commonly 90 s. So a job
that Slurm starts again waits for the lock of its own earlier start (`LEASE_SECONDS`) instead of refusing. On a file
system without locks there is a warning, and nothing keeps two jobs apart.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from megamix.core import locks
from megamix.core.errors import InputError
from megamix.core.log import get_logger

NAME = "lock"
LEASE_SECONDS = 150.0
HELD = "MEGAMIX_RUN_LOCK"
"""Environment variable of ranks whose starter holds the lock for them: the lock's path."""


class RunLock:
    """Right to write to ``run_dir``, until the context or the process ends.

    Raises (on entering):
        InputError: another job works there, or the directory cannot be written to.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / NAME
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        if os.environ.get(HELD) == str(self._path.absolute()):
            return self
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"cannot write to {self._run_dir}: {error.strerror or error}. Choose another folder."
            ) from error
        try:
            self._take(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors that the ranks started by this process keep open: the lock holds as long as any of them lives."""
        return () if self._file is None else (self._file,)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that tell those ranks not to take the lock themselves."""
        return {HELD: str(self._path.absolute())}

    def _take(self, file: int) -> None:
        deadline = time.monotonic() + LEASE_SECONDS
        waiting = False
        while True:
            try:
                if locks.take(file):
                    break
            except OSError as error:
                get_logger().warning(
                    "%s cannot be locked (%s): nothing keeps a second job from writing there too",
                    self._path,
                    error.strerror or error,
                )
                return
            holder = _read(file)
            if not _is_earlier_start(holder) or time.monotonic() > deadline:
                raise InputError(
                    f"another job works in {self._run_dir}{_describe(holder)}. Wait until it ends, or end it, or choose another folder."
                )
            if not waiting:
                get_logger().warning("waiting for the lock of this job's earlier start%s", _describe(holder))
                waiting = True
            time.sleep(1.0)
        self._sign(file)

    def _sign(self, file: int) -> None:
        holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, (json.dumps(holder) + "\n").encode(), 0)
        except OSError as error:  # a full disk; the lock holds without it
            get_logger().warning("cannot write %s: %s", self._path, error.strerror or error)


def _read(file: int) -> dict[str, Any]:
    """Holder of the lock; empty where it is not written yet."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_earlier_start(holder: dict[str, Any]) -> bool:
    """Whether the holder is an earlier start of this same Slurm job, which Slurm has ended."""
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return job is not None and holder.get("slurm_job") == job and holder.get("slurm_restart") != restart


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return ""
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f": process {holder.get('process')} on {holder.get('host')}{job}, since {holder.get('since')}"
