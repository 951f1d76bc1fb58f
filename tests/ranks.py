"""Python scripts as ranks of a job, as torchrun would start them but without its seconds."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT

SECONDS = 240


def run_ranks(script: Path, num_ranks: int, *arguments: object, cwd: Path, code: int = 0) -> list[str]:
    """Runs ``script`` once per rank, with the variables that torchrun sets; fails if an exit code is not ``code``.

    Returns:
        What each rank printed, standard error included.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=cwd,
            env={**ENVIRONMENT, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        printed = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    assert codes == [code] * num_ranks, f"exit codes {codes}\n" + "\n".join(printed)
    return printed
