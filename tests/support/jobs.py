"""Several runs one after the other in one job, so that many layouts are compared without starting processes for each.

As a module it starts the job; as a script it is one rank of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_job(
    ranks: int, runs: Sequence[tuple[Path, Sequence[str]]], script: str | Path = __file__, **environment: str
) -> None:
    """Trains (config, overrides) after (config, overrides) on ``ranks`` ranks; a run's ``stop_after`` ends it only.

    Args:
        script: what a rank runs.

    Raises:
        AssertionError: a rank failed; with what it said.
    """
    from ranks import run_ranks

    wanted = json.dumps([[str(config), list(overrides)] for config, overrides in runs])
    run_ranks(Path(script), ranks, wanted, cwd=Path(__file__).parent, environment=environment)


def run_rank(runs: list[Any], before: Callable[[int], None] = lambda number: None) -> None:
    """
    Args:
        before: called with the number of each run, counted from 0, before it begins.
    """
    import torch.distributed as dist

    from megamix.core.config import load_config
    from megamix.engines.choose import start_distributed
    from megamix.training.config import RunConfig
    from megamix.training.plan import make_plan
    from megamix.training.run import train_rank

    ranks = int(os.environ["WORLD_SIZE"])
    configs = [load_config(RunConfig, Path(path), overrides) for path, overrides in runs]
    # DeepSpeed wants to be there from the start; Megatron takes what it finds.
    start_distributed(min((config.engine for config in configs), key=lambda engine: engine.name))
    for number, config in enumerate(configs):
        before(number)
        train_rank(make_plan(config, ranks, verify=False))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(json.loads(sys.argv[1]))
