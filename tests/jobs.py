"""Several runs one after the other in one job, so that many layouts are compared without starting processes for each.

As a module it starts the job; as a script it is one rank of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 600


def run_job(ranks: int, runs: Sequence[tuple[Path, Sequence[str]]], **environment: str) -> None:
    """Trains (config, overrides) after (config, overrides) on ``ranks`` ranks; a run's ``stop_after`` ends it only.

    Raises:
        AssertionError: a rank failed; with what it said.
    """
    from conftest import ENVIRONMENT

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    wanted = json.dumps([[str(config), list(overrides)] for config, overrides in runs])
    shared = {
        **ENVIRONMENT,
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, wanted],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert not any(codes), "\n".join(f"rank {rank}: exit code {code}\n{said[rank]}" for rank, code in enumerate(codes))


def _rank(runs: list[Any]) -> None:
    import torch.distributed as dist

    from megamix.config import load_config
    from megamix.engines.choose import start_distributed
    from megamix.plan import make_plan
    from megamix.run import train_rank
    from megamix.run_config import RunConfig

    ranks = int(os.environ["WORLD_SIZE"])
    configs = [load_config(RunConfig, Path(path), overrides) for path, overrides in runs]
    # DeepSpeed wants to be there from the start; Megatron takes what it finds.
    start_distributed(min((config.engine for config in configs), key=lambda engine: engine.name))
    for config in configs:
        train_rank(make_plan(config, ranks, verify=False))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
