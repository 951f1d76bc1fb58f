"""Names of jobs and paths of their output, as Slurm reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megamix.core.errors import InputError
from megamix.studies.slurm.submit import Chain
from megamix.studies.tasks import Job, Task

JOB = Job("train.sbatch", ("x.yaml",), ())


def options(folder: str, task: str = "train") -> dict[str, str]:
    """The options of sbatch by name."""
    chain = Chain(Path("/runs") / folder, [Task(task, job=JOB)])
    words = chain.command(chain.tasks[0], JOB, None, ())
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))


def test_runs_of_alike_names_are_different_jobs() -> None:
    """What a name loses, its hash has; and it stays short enough for a file, ending and all."""
    folders = ("a,b", "a_b", "a%b", "a b", "\u00e4" * 100, "\u00f6" * 100, "x" * 250)
    names = {options(folder)["job-name"] for folder in folders} | {options("a", "t,1")["job-name"]}
    assert len(names) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]{1,200}", name) for name in names)
    assert options("mine-1.5_b+c")["job-name"].startswith("megamix-mine-1.5_b+c-train-")


@pytest.mark.parametrize(("folder", "read"), [("mine", "mine"), ("%j", "%%j"), ("a%%b,c d", "a%%%%b,c d")])
def test_percent_signs_of_a_folder_are_not_replaced(folder: str, read: str) -> None:
    assert options(folder)["output"] == f"/runs/{read}/slurm/%x-%j.out"


@pytest.mark.parametrize("folder", ["back\\slash", "two\nlines"])
def test_a_folder_that_slurm_cannot_write_to_is_refused(folder: str) -> None:
    with pytest.raises(InputError, match=r"Slurm cannot write .*Choose another run_dir"):
        options(folder)
