"""Being asked to stop: at which boundary ranks agree to, what is saved there, and that nothing is lost by it.

The request is tested in one job whose ranks ask themselves at given steps, so that the boundary is known, and with real
signals to real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ENVIRONMENT, RUN_SECONDS, SUPPORT
from jobs import run_job
from processes import children, start, wait_for_step
from records import record, samples

from megamix.core.processes import free_port

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def two_stages() -> dict[str, object]:
    return {"engine": {"pipeline": 2, "zero": 1}, "log": {"every": 3, "samples": True}}


@pytest.mark.parametrize("weight_lag", [1, 3])
def test_one_rank_asked_stops_all_where_its_step_takes_effect(
    tiny_config: Write, tmp_path: Path, weight_lag: int, two_stages: dict[str, object]
) -> None:
    """Only the last rank is asked, in step 5 (counted from 0): all stop before step 6 + weight_lag, save there although
    no checkpoint is due, and the resumed run's record is the undisturbed one's, evaluations included."""
    sections = {**two_stages, "data": {"weight_lag": weight_lag}, "checkpoint": {"every": 0, "keep": 9}}
    whole = tiny_config(run_dir=str(tmp_path / "whole"), **sections)
    stopped = tmp_path / "stopped"
    config = tmp_path / "stopped.yaml"
    config.write_text(whole.read_text().replace(str(tmp_path / "whole"), str(stopped)))
    run_job(2, [(whole, [])])
    script = SUPPORT / "asking_ranks.py"
    run_job(2, [(config, [])], script=script, ASK_RANK="1", ASK_STEP="5")
    assert saved_steps(stopped) == [6 + weight_lag]
    assert max(samples(stopped)) == 6 + weight_lag
    run_job(2, [(config, [])])
    assert saved_steps(stopped) == [6 + weight_lag, 12]
    assert record(stopped) == record(tmp_path / "whole")
    assert samples(stopped) == samples(tmp_path / "whole")


@pytest.mark.slow
def test_signals_lose_nothing(megamix: Run, tiny_config: Write, tmp_path: Path, two_stages: dict[str, object]) -> None:
    """USR1 to the starter, then TERM to one rank alone: 75 each time, and the same command finishes the run."""
    sections = {**two_stages, "train": {"steps": 90}, "checkpoint": {"every": 0}, "evaluate": {"every": 50}}
    config = tiny_config(run_dir=str(tmp_path / "run"), **sections)
    run = tmp_path / "run"
    process = start(config)
    wait_for_step(run, 9, process)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 75, said
    (first,) = saved_steps(run)
    assert f"stands at step {first} of 90, saved. The same command goes on from there." in said
    process = start(config)
    wait_for_step(run, first + 10, process)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    _, said = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 75, said
    second = saved_steps(run)[-1]
    assert first < second < 90
    assert f"resuming from {run / 'checkpoints' / f'step_{first}'}" in said
    megamix("train", config)
    whole = tmp_path / "whole"
    megamix("train", config, f"run_dir={whole}")
    assert record(run) == record(whole)
    assert samples(run) == samples(whole)


def test_a_checkpoint_is_due_by_time(tiny_config: Write, tmp_path: Path) -> None:
    """With next to no time as the limit, every step requests a save. The first request arrives weight_lag steps after
    the first step; the step after the last one that arrives is the last step, saved in any case."""
    config = tiny_config(checkpoint={"every": 0, "every_minutes": 1e-9, "keep": 99}, train={"steps": 6})
    run_job(1, [(config, [])])
    assert saved_steps(tmp_path / "run") == [2, 3, 4, 5, 6]


def test_no_checkpoint_before_its_time(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config(checkpoint={"every": 4, "every_minutes": 60.0, "keep": 99}, train={"steps": 6})
    run_job(1, [(config, [])])
    assert saved_steps(tmp_path / "run") == [4, 6]


def test_asked_before_it_has_begun(tiny_config: Write, tmp_path: Path) -> None:
    """A signal while a rank still imports its libraries is heeded at the first boundary, not by dying of it."""
    config = tiny_config(train={"steps": 300})
    script = (
        "import os, signal, sys\n"
        "from megamix.training.job.signals import heed_signals\n"
        "heed_signals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from megamix.cli import main\n"
        f"sys.argv = ['megamix', 'train', {str(config)!r}]\n"
        "main()\n"
    )
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**ENVIRONMENT, **job},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert saved_steps(tmp_path / "run") == [2]
