"""A process that saves checkpoints and is killed, at every step of the way and at random moments; run as a script.

The savers are forked from one process that has imported everything, so that each costs its work only.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_files import engine_at, job, loads

from megamix.training.checkpoints.keeping import mend
from megamix.training.checkpoints.saving import CheckpointWriter
from megamix.training.checkpoints.store import candidates, damage, newest
from megamix.training.config import CheckpointConfig

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
OLD = 100
"""Added to what a checkpoint of an earlier course of the run holds."""


def saver(folder: Path, steps: Any, size: int = 50, kill_at: int | None = None, offset: int = 0) -> None:
    """Saves ``steps``, in a process of its own; kills itself before event number ``kill_at`` in the folder."""
    (folder.parent / "store").unlink(missing_ok=True)
    with job(folder.parent) as group:
        writer = CheckpointWriter(folder, engine_at(0), CheckpointConfig(keep=2), group)
        if kill_at is not None:
            _kill_at(kill_at, folder)
        with writer:
            for step in steps:
                writer._engine = engine_at(step + offset, size=size)
                writer.save(step, {})


def _kill_at(number: int, folder: Path) -> None:
    seen = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(folder)) and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def forked(act: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return pid


def at_every_step(folder: Path) -> list[dict[str, Any]]:
    """Saves step 6, where there is one from before, and step 8, and is killed before the first, second, ... event.

    What is found after each: the steps that can be loaded, before and after `mend`, and the names that are then left.
    """
    template, checkpoints = folder / "template", folder / "checkpoints"
    os.waitpid(forked(lambda: saver(template, [4, 6], offset=OLD)), 0)
    found = []
    for number in itertools.count(1):
        shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.copytree(template, checkpoints)
        _, status = os.waitpid(forked(lambda number=number: saver(checkpoints, [6, 8], kill_at=number)), 0)
        before = _whole(checkpoints)
        newest_before = newest(checkpoints)
        mend(checkpoints)
        left = sorted(path.name for path in checkpoints.iterdir())
        found.append(
            {
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "failed": os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0,
                "whole": before,
                "newest": str(newest_before.name) if newest_before else None,
                "mended": _whole(checkpoints),
                "left": left,
            }
        )
        if not found[-1]["killed"]:
            return found
    raise AssertionError


def _whole(folder: Path) -> list[int]:
    """What each of the checkpoints that can be found holds, newest first; -1 for one that cannot be loaded."""
    held = []
    for path in candidates(folder):
        step = int(path.with_suffix("").name[5:])
        is_whole = damage(path) is None
        held.append(next((value for value in (step, step + OLD) if is_whole and loads(path, step, value=value)), -1))
    return held


def at_random(folder: Path, times: int, seed: int) -> list[dict[str, Any]]:
    """A saver that is killed after a random time and started again; what is found each time.

    ``times`` times or, on a machine that is too busy to write a checkpoint within that time, more: up to step 4, and
    until a kill has met a checkpoint in writing.
    """
    checkpoints, numbers, size = folder / "checkpoints", random.Random(seed), 100_000
    found: list[dict[str, Any]] = []
    last = 0
    while len(found) < 20 * times and (len(found) < times or last < 4 or not any(each["under_way"] for each in found)):
        pid = forked(lambda last=last: saver(checkpoints, itertools.count(last + 1), size=size))
        # From before the first file of the first start to some checkpoints on.
        time.sleep(numbers.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        path = newest(checkpoints)
        step = int(path.name.split(".")[0][5:]) if path else 0
        under_way = [path.name for path in checkpoints.glob("*.*")] if checkpoints.is_dir() else []
        is_whole = path is None or loads(path, step, size=size)
        found.append({"killed": os.WIFSIGNALED(status), "step": step, "whole": is_whole, "under_way": under_way})
        last = step
    return found


if __name__ == "__main__":
    where = Path(sys.argv[1])
    print("found", json.dumps({"steps": at_every_step(where / "a"), "random": at_random(where / "b", 20, seed=11)}))
