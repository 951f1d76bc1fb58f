"""What the ranks of a job do in the tests of checkpoints; each function is the whole life of one rank of two.

As a module it starts them; as a script it is one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

RANKS = 2


def run(name: str, *arguments: object) -> list[tuple[int, Any]]:
    """(exit code, what it found) of every rank."""
    from commands import ENVIRONMENT, RUN_SECONDS
    from forked import run_processes

    environments = [{**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": str(RANKS)} for rank in range(RANKS)]
    done = run_processes([__file__, name, *arguments], environments, cwd=Path(__file__).parent, seconds=RUN_SECONDS)
    found = []
    for rank in done:
        lines = [line for line in rank.stdout.splitlines() if line.startswith("found ")]
        assert lines or rank.returncode < 0, rank.stdout
        found.append((rank.returncode, json.loads(lines[0][6:]) if lines else None))
    return found


def _tell(found: object) -> None:
    print("found", json.dumps(found), flush=True)


def _told(act: Callable[[], Any]) -> str:
    from megamix.core.errors import MegamixError

    try:
        return str(act())
    except MegamixError as error:
        return f"{type(error).__name__}: {error}"


def fail(folder: Path) -> None:
    """Saves, cannot write on rank 1, cannot rename on rank 0: in the background, then at once."""
    from checkpoint_files import engine_at, job

    from megamix.training.checkpoints import saving
    from megamix.training.config import CheckpointConfig

    rank = int(os.environ["RANK"])
    engine = engine_at(1, own=[(0, 1), (2, 3)][rank], size=30_000)
    found = []
    with job(folder, rank, RANKS) as group:
        for asynchronous in (True, False):
            place = folder / str(asynchronous)
            config = CheckpointConfig(keep=9, asynchronous=asynchronous)

            def attempt(step: int, place: Path = place, config: CheckpointConfig = config) -> None:
                writer = saving.CheckpointWriter(place, engine, config, group)
                found.append(_told(lambda: (writer.save(step, {}), writer.wait())))

            attempt(1)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            attempt(2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            named = saving.give_name
            if rank == 0:
                saving.give_name = _read_only
            attempt(3)
            saving.give_name = named
    _tell(found)


def _read_only(path: Path) -> Path:
    raise OSError(30, "Read-only file system", str(path))


def die(folder: Path) -> None:
    """Rank 1 is killed when its part is written."""
    from checkpoint_files import engine_at, job

    from megamix.training.checkpoints import saving
    from megamix.training.config import CheckpointConfig

    rank = int(os.environ["RANK"])
    with suppress(RuntimeError), job(folder, rank, RANKS) as group:
        writer = saving.CheckpointWriter(folder / "c", engine_at(1, own=(rank,)), CheckpointConfig(), group)
        writer.save(1, {})
        writer.wait()
        if rank == 1:
            describe = saving.describe
            saving.describe = lambda path: (
                describe(path) if path.name == "state.json" else os.kill(os.getpid(), signal.SIGKILL)
            )
        writer.save(2, {})
        _tell(_told(writer.wait))


def choose(config: Path, scenarios: Path) -> None:
    """Agrees on the checkpoint to continue from in every run directory of a folder: what each rank then has, and which
    files it has read for it."""
    import torch.distributed as dist
    from checkpoint_files import job

    from megamix.core.config import load_config
    from megamix.training.checkpoints import store
    from megamix.training.checkpoints.resume import agree_on_checkpoint
    from megamix.training.config import RunConfig
    from megamix.training.plan import make_plan

    rank = int(os.environ["RANK"])
    found = {}
    describe, read = store.describe, []

    def reading(path: Path, sync: bool = True) -> dict[str, Any]:
        read.append(str(path))
        return describe(path, sync)

    store.describe = reading
    with job(scenarios, rank, RANKS):
        group: Any = dist.new_group(backend="gloo")
        for folder in sorted(path for path in scenarios.iterdir() if path.is_dir()):
            overrides = [f"run_dir={folder}", "engine={pipeline: 1, data: 2}"]
            if (folder / "overrides").is_file():
                overrides += (folder / "overrides").read_text().splitlines()
            plan = make_plan(load_config(RunConfig, config, overrides), RANKS, verify=False)
            store.PATIENCE_SECONDS = 0.5
            if (folder / "late").is_file():
                store.PATIENCE_SECONDS = 20.0
                dist.barrier(group)
                if rank == 0:
                    subprocess.Popen(["sh", (folder / "late")])
            read.clear()

            def agreed(plan: Any = plan) -> str | None:
                resumed = agree_on_checkpoint(plan, group)
                return None if resumed is None else f"{resumed.path.name} of step {resumed.step}"

            found[folder.name] = (_told(agreed), list(read))
    _tell(found)


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
