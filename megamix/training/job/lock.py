"""Run lock: one job at a time in the directory of a run or a cache, by a lock on its file ``lock``.

The file stays and names the holder, for the message to a second job; only the lock on it counts.

An NFS server takes back the locks of a client that has lost its power only after its lease, commonly 90 s. So a job
that Slurm starts again waits for the lock of its own earlier start (`LEASE_SECONDS`) instead of refusing; every job
waits for a holder that is dying (`megamix.core.locks`). On a file system without locks there is a warning, and nothing
keeps two jobs apart.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

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
        MegamixError: its file system fails.
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
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
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
        job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")

        def patience(holder: locks.Holder) -> float:
            is_earlier = job is not None and holder.get("slurm_job") == job and holder.get("slurm_restart") != restart
            return LEASE_SECONDS if is_earlier else locks.GLANCE_SECONDS

        try:
            holder = locks.acquire(self._path, file, patience=patience, slurm_job=job, slurm_restart=restart)
        except locks.NoLocks as error:
            get_logger().warning(
                "%s cannot be locked (%s): nothing keeps a second job from writing there too",
                self._path,
                error.strerror or error,
            )
            return
        if holder is not None:
            raise InputError(
                f"another job works in {self._run_dir}{locks.describe(holder)}. Wait until it ends, or end it, or choose another folder."
            )
