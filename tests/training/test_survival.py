"""A run that is killed and steered at random moments and started again ends as if nobody had disturbed it.

By default a few kills, of processes forked from one that has imported everything; with ``-m slow`` many, of real ones.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ENVIRONMENT, ROOT, RUN_SECONDS
from disturbed import (
    Disturbed,
    assert_no_sample_lost_or_doubled,
    assert_same,
    children,
    holder_of,
    is_running,
    lines_so_far,
)
from forked import run_processes

from megamix.core.processes import free_port
from megamix.mixing.steering.journal import read_answers, read_commands
from megamix.training.job.lock import RunLock

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


@pytest.mark.parametrize("layout", ["deepspeed pp2", pytest.param("megatron dp2", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    megamix: Run, tiny_config: Write, tmp_path: Path, data_dir: Path, layout: str
) -> None:
    """A rank, all, or the starter; in a step, while a checkpoint is written, or while ranks load. It is steered all the
    while, and the other is told when it had each command."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    disturbed = Disturbed(write(tiny_config, killed, layout, STEPS, 5), killed, random.Random(7), is_steered=True)
    for moment, victim in SHORT[layout]:
        assert disturbed.kill_once(moment, victim), f"the run was done before: {disturbed.kills}"
    disturbed.finish()
    assert_all_answered(killed)
    disturbed.tell(whole)
    megamix("train", write(tiny_config, whole, layout, STEPS, 5))
    assert_same(killed, whole, STEPS, disturbed.kills)
    assert_no_sample_lost_or_doubled(killed, STEPS, 8, data_dir, 64)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in killed.rglob("*") if path.is_file()}
    assert {path: mode for path, mode in modes.items() if mode != modes[killed / "metrics.jsonl"]} == {}, "the umask's"


def assert_all_answered(run: Path) -> None:
    """Every command had its effect or is ignored, with one answer that counts."""
    commands, problems = read_commands(run)
    assert not problems
    final = {answer["id"]: answer["outcome"] for answer in read_answers(run)}
    assert final.keys() == commands.keys()
    assert set(final.values()) <= {"applied", "ignored"}
    assert "applied" in final.values()


# A job whose ranks nobody watches but they themselves


def start_ranks(config: Path, ranks: int, **environment: str) -> tuple[threading.Thread, list[Any]]:
    """Ranks as torchrun or srun starts them, in a thread that waits for them; what they return goes to the list."""
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment} for rank in range(ranks)]
    done: list[Any] = []
    arguments = ["-m", "megamix", "train", str(config)]
    thread = threading.Thread(
        target=lambda: done.extend(run_processes(arguments, environments, cwd=ROOT, seconds=RUN_SECONDS))
    )
    thread.start()
    return thread, done


def wait_for_step(run: Path, step: int, thread: threading.Thread) -> None:
    while max((line["step"] for line in lines_so_far(run / "metrics.jsonl")), default=0) < step:
        assert thread.is_alive(), f"the job ended before step {step}"
        time.sleep(0.02)


def test_without_a_starter_the_ranks_end_each_other(tiny_config: Write, tmp_path: Path) -> None:
    """Rank 0 is killed: rank 1, which nobody else would end, says so, and leaves nothing that keeps the next start
    from the run."""
    run = tmp_path / "run"
    thread, done = start_ranks(write(tiny_config, run, "deepspeed pp2", 5000, 5), 2)
    wait_for_step(run, 3, thread)
    rank_0 = holder_of(run)
    assert rank_0 is not None
    os.kill(rank_0, signal.SIGKILL)
    thread.join()
    assert [process.returncode for process in done] == [-signal.SIGKILL, 1]
    said = (
        f"megamix: [rank 1] rank 0 of 2 ({socket.gethostname()}, process {rank_0}) is gone: its process ended without"
    )
    assert done[1].stdout.count(said) == 1
    assert "Traceback" not in done[1].stdout
    with RunLock(run):
        pass


STUCK = """
import time
from megamix.mixing.mixers import Mixer, ScheduleConfig

class StuckConfig(ScheduleConfig):
    \"\"\"Never answers after step 3.\"\"\"

class Stuck(Mixer):
    config: StuckConfig

    def _observe(self, stats, step):
        while step >= 3:
            time.sleep(0.1)

    def _new_weights(self, step):
        return self.weights
"""


def test_a_job_that_hangs_ends_itself(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """Its mixer never answers: all ranks live, and wait. One reason, from the starter, says that nothing advances."""
    (tmp_path / "stuck.py").write_text(STUCK)
    config = tiny_config(
        run_dir=str(tmp_path / "run"), engine={"pipeline": 2}, watchdog={"stall_minutes": 0.1}, log={"every": 2}
    )
    text = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**text, "mixer": {"name": "stuck:Stuck"}}))
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(tmp_path)])
    done = megamix("train", config, code=1, PYTHONPATH=path)
    assert done.stderr.count("nothing has advanced for 0.1 min (watchdog.stall_minutes)") == 1
    assert "rank 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_second_start_is_refused_while_the_first_goes_on(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """With exit code 2, by its starter or, where there is none, by its ranks; nothing of the first run is touched."""
    run = tmp_path / "run"
    config = write(tiny_config, run, "megatron dp2", 5000, 5)
    arguments = [sys.executable, "-m", "megamix", "train", str(config)]
    # A real process: of the forked ones no second starts before the first has ended.
    first = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + RUN_SECONDS
        while holder_of(run) != first.pid:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        said = f"another job works in {run}: process {first.pid} on {socket.gethostname()}"
        assert said in megamix("train", config, code=2).stderr  # while the first may still be loading
        thread, refused = start_ranks(config, 2)
        thread.join()
        assert [process.returncode for process in refused] == [2, 2]
        assert all(said in process.stdout for process in refused)
        assert holder_of(run) == first.pid
        assert first.poll() is None
        while not any(line["event"] == "train" for line in lines_so_far(run / "metrics.jsonl")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
def test_a_stopped_rank_ends_its_job(tiny_config: Write, tmp_path: Path) -> None:
    """SIGSTOP, which its starter cannot see: the other rank finds it silent, the starter says so and ends both."""
    run = tmp_path / "run"
    path = write(tiny_config, run, "deepspeed dp2", 5000, 5)
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, "watchdog": {"silence_seconds": 10}}))
    arguments = [sys.executable, "-m", "megamix", "train", str(path)]
    job = subprocess.Popen(
        arguments, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not lines_so_far(run / "metrics.jsonl"):
        assert job.poll() is None
        time.sleep(0.05)
    ranks = children(job.pid)
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGSTOP)
    _, said = job.communicate(timeout=RUN_SECONDS)
    assert job.returncode == 1
    assert f"rank 1 of 2 ({socket.gethostname()}, process {max(ranks)}) has not been heard of for " in said
    assert said.count("(watchdog.silence_seconds)") == 1
    assert not any(map(is_running, ranks))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_many_times(
    megamix: Run, tiny_config: Write, tmp_path: Path, data_dir: Path, layout: str
) -> None:
    """15 kills of real processes in each layout, at moments that the printed seed decides."""
    steps, kills, seed = 400, 15, random.randrange(10**6)
    print(f"{layout}: seed {seed}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    disturbed = Disturbed(
        write(tiny_config, killed, layout, steps, 7), killed, random.Random(seed), fork=False, is_steered=True
    )
    for _ in range(kills):
        assert disturbed.kill_once(), f"the run was done before: {disturbed.kills}, seed {seed}"
    print("\n".join(disturbed.kills))
    disturbed.finish()
    assert_all_answered(killed)
    disturbed.tell(whole)
    megamix("train", write(tiny_config, whole, layout, steps, 7))
    assert_same(killed, whole, steps, (seed, disturbed.kills))
    assert_no_sample_lost_or_doubled(killed, steps, 8, data_dir, 64)
