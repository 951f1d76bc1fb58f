"""Python scripts as ranks of a job: as torchrun would start them but without its seconds, and by torchrun itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from commands import ENVIRONMENT, RUN_SECONDS, SUPPORT
from forked import run_processes

from megamix.core.processes import free_port


def run_ranks(
    script: Path,
    num_ranks: int,
    *arguments: object,
    cwd: Path,
    code: int = 0,
    fork: bool = True,
    environment: dict[str, str] | None = None,
) -> list[str]:
    """Runs ``script`` once per rank, with the variables that torchrun sets; fails if an exit code is not ``code``.

    Args:
        fork: as of `run_processes`.
        environment: more variables.

    Returns:
        What each rank printed, standard error included.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # The script may be a test file, which imports from tests/support.
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(SUPPORT)])
    job = {**ENVIRONMENT, "PYTHONPATH": path, **(environment or {}), **address, "WORLD_SIZE": str(num_ranks)}
    ranks = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    done = run_processes([script, *arguments], ranks, cwd=cwd, seconds=2 * RUN_SECONDS, fork=fork)
    printed = [rank.stdout for rank in done]
    said = "\n".join(f"rank {rank}: exit code {each.returncode}\n{each.stdout}" for rank, each in enumerate(done))
    assert [each.returncode for each in done] == [code] * num_ranks, said
    return printed


def torchrun(script: Path, num_ranks: int, *arguments: object, cwd: Path) -> None:
    """Runs ``script`` on the ranks of a real torchrun; fails if it does not succeed."""
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(SUPPORT)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        env={**ENVIRONMENT, "PYTHONPATH": path},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
