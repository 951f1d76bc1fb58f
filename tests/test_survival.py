"""A run that is killed at random moments and started again ends as if nobody had disturbed it.

By default a few kills, of processes forked from one that has imported everything; with ``-m slow`` many, of real ones.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from disturbed import Disturbed, assert_no_sample_lost_or_doubled, assert_same

Write = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 40
LAYOUTS: dict[str, dict[str, Any]] = {
    "deepspeed pp2": {"name": "deepspeed", "pipeline": 2, "data": 1, "zero": 1},
    "deepspeed dp2": {"name": "deepspeed", "pipeline": 1, "data": 2, "zero": 1},
    "megatron pp2": {"name": "megatron", "pipeline": 2, "data": 1},
    "megatron dp2": {"name": "megatron", "pipeline": 1, "data": 2},
}
# (moment, victim) of each kill.
SHORT = {
    "deepspeed pp2": [("step", "rank"), ("checkpoint", "all"), ("loading", "starter")],
    "megatron dp2": [("checkpoint", "rank"), ("step", "starter")],
}


def write(tiny_config: Write, run: Path, layout: str, steps: int, checkpoint_every: int) -> Path:
    path = tiny_config(
        run_dir=str(run),
        train={"steps": steps},
        checkpoint={"every": checkpoint_every},
        evaluate={"every": 10, "batches": 1},
    )
    # Not merged: the engines have different keys.
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = run.with_suffix(".yaml")
    own.write_text(yaml.safe_dump({**config, "engine": LAYOUTS[layout]}), encoding="utf-8")
    return own


@pytest.mark.parametrize("layout", SHORT)
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    megamix: Run, tiny_config: Write, tmp_path: Path, data_dir: Path, layout: str
) -> None:
    """A rank, all, or the starter; in a step, while a checkpoint is written, or while ranks load."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    megamix("train", write(tiny_config, whole, layout, STEPS, 5))
    disturbed = Disturbed(write(tiny_config, killed, layout, STEPS, 5), killed, random.Random(7))
    for moment, victim in SHORT[layout]:
        assert disturbed.kill_once(moment, victim), f"the run was done before: {disturbed.kills}"
    disturbed.finish()
    assert_same(killed, whole, STEPS, disturbed.kills)
    assert_no_sample_lost_or_doubled(killed, STEPS, 8, data_dir, 64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_many_times(
    megamix: Run, tiny_config: Write, tmp_path: Path, data_dir: Path, layout: str
) -> None:
    """15 kills of real processes in each layout, at moments that the printed seed decides."""
    steps, kills, seed = 400, 15, random.randrange(10**6)
    print(f"{layout}: seed {seed}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    megamix("train", write(tiny_config, whole, layout, steps, 7))
    disturbed = Disturbed(write(tiny_config, killed, layout, steps, 7), killed, random.Random(seed), fork=False)
    for _ in range(kills):
        assert disturbed.kill_once(), f"the run was done before: {disturbed.kills}, seed {seed}"
    print("\n".join(disturbed.kills))
    disturbed.finish()
    assert_same(killed, whole, steps, (seed, disturbed.kills))
    assert_no_sample_lost_or_doubled(killed, steps, 8, data_dir, 64)
