"""``megamix`` as a user would run it, and the environment of every process that a test starts."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from forked import run_processes

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
"""Scripts that tests start as processes of their own, and what several tests share."""
ENVIRONMENT = {
    **os.environ,
    # Packages laid over the environment reach every process.
    "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "kernels")])),
    "HF_HUB_OFFLINE": "1",
    # Two ranks on two cores: more threads than that only get in each other's way.
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "0",
}
RUN_SECONDS = int(os.environ.get("MEGAMIX_RUN_SECONDS", "900"))
"""Limit of every wait that a defect would make endless. No test is about time: a busy machine may take minutes, and one
with more work than cores needs another limit."""
LAUNCH_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "MEGAMIX_FAILURE_REPORTS"),
}
"""Environment variables that make a process a rank of a job."""
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def run_megamix(
    *arguments: object, code: int = 0, fork: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``megamix ARGUMENTS`` in a process of its own; fails the test if the exit code is not the expected one.

    It is forked from one that has imported everything, if ``fork`` is left at that (see `forked`).
    """
    (done,) = run_processes(
        ["-m", "megamix", *arguments],
        [{**ENVIRONMENT, **environment}],
        cwd=ROOT,
        seconds=RUN_SECONDS,
        fork=fork,
        separate=True,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
