"""Whose job a process is a rank of: torchrun's, srun's or none, and what megamix puts into the environment."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from unittest import mock

import pytest
from commands import LAUNCH_VARIABLES

from megamix.training.job.local_ranks import job_world_size

pytestmark = pytest.mark.usefixtures("outside_of_a_job")


def settled() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in LAUNCH_VARIABLES}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that knows one list of nodes; what it was asked is in the file it returns."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path / "asked"))}\n'
        '[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "asked"


STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[07-08]",
}


def test_outside_of_a_job() -> None:
    assert job_world_size() is None
    assert settled() == {}


def test_a_rank_of_torchrun(scontrol: Path) -> None:
    """torchrun's environment stays as it is, in a Slurm step too."""
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "other", "MASTER_PORT": "29500"}
    os.environ.update(torchrun)
    assert job_world_size() == 8
    os.environ.update(STEP)
    assert job_world_size() == 8
    assert settled() == torchrun
    assert not scontrol.exists()


def test_a_rank_of_srun(scontrol: Path) -> None:
    os.environ.update(STEP)
    assert job_world_size() == 4
    assert settled() == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(20000 + 12345),
    }
    assert job_world_size() == 4, "the same when asked again"


def test_srun_s_ranks_agree_on_a_port_that_can_be_used(scontrol: Path) -> None:
    for job_id in ("1", "19999", "20000", "4294967295"):
        with mock.patch.dict(os.environ, {**STEP, "SLURM_JOB_ID": job_id}):
            job_world_size()
            assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000


def test_srun_with_an_address_that_is_given(scontrol: Path) -> None:
    os.environ.update({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert job_world_size() == 4
    assert settled()["MASTER_ADDR"] == "10.0.0.1"
    assert settled()["MASTER_PORT"] == "1234"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_ID": None}, id="batch script"),
        pytest.param({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, id="step of one task"),
        pytest.param({"SLURM_PROCID": None}, id="allocation"),
    ],
)
def test_slurm_without_ranks(changes: dict[str, str | None], scontrol: Path) -> None:
    """A batch script, an interactive shell and a step of one task are not ranks of a job: megamix starts its own."""
    os.environ.update({name: value for name, value in {**STEP, **changes}.items() if value is not None})
    assert job_world_size() is None
    assert settled() == {}
    assert not scontrol.exists()
