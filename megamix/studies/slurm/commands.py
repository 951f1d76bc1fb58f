"""Commands of Slurm."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamix.core.errors import InputError

UNAVAILABLE = "not available (down, drained or reserved)"
"""sbatch --test-only says so of nodes that a job may well wait for."""


@dataclass(frozen=True)
class Queued:
    """A job, or a member of an array, that waits or runs."""

    job: int
    member: int | None
    state: str

    @property
    def member_id(self) -> str:
        """The name of the job in dependencies; of a member alone, for others of its array may have failed."""
        return str(self.job) if self.member is None else f"{self.job}_{self.member}"


def queued(name: str) -> list[Queued]:
    """The user's jobs of a name that wait or run, members of arrays one by one.

    A job that is ending is left out, and so is the job that asks: what is submitted now waits for it
    (``--dependency=singleton``).
    """
    # %A: a member's own number; %F: that of the array; %K: its index, N/A where there is no array.
    shown = _run(
        ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", f"--name={name}", "--format=%F %K %T"]
    )
    found = []
    for line in shown.splitlines():
        job, member, state = line.split()
        if state not in ("COMPLETING", "CANCELLED") and job != os.environ.get("SLURM_JOB_ID"):
            found.append(Queued(int(job), int(member) if member.isdigit() else None, state))
    return found


def check(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Checks that the cluster can ever run a job.

    Raises:
        InputError: no such partition, account, number of nodes or GPUs; with Slurm's words.
    """
    done = _start([command[0], "--test-only", *command[1:]], environment)
    if done.returncode and UNAVAILABLE not in done.stderr:
        raise InputError(
            f"Slurm refuses this job: {_words(done.stderr)}. Change --partition, --account, --nodes, --gpus-per-node, "
            "--cpus-per-task, --mem or --time; `sinfo` shows what there is."
        )


def submit(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs ``sbatch``; returns the job's number, or raises InputError if Slurm refuses the job."""
    done = _start([command[0], "--parsable", *command[1:]], environment)
    if done.returncode:
        raise InputError(f"Slurm refuses this job: {_words(done.stderr)}.")
    return int(done.stdout.strip().split(";")[0])


def wait_for(jobs: Sequence[Queued], dependency: str) -> None:
    """Changes what waiting jobs wait for; one that has begun or gone meanwhile is left alone."""
    for job in jobs:
        _start(["scontrol", "update", f"JobId={job.member_id}", f"Dependency={dependency}"], None)


def _run(command: Sequence[str]) -> str:
    done = _start(command, None)
    if done.returncode:
        raise InputError(f"{command[0]} fails: {_words(done.stderr)}. Is the cluster up (`sinfo`)?")
    return done.stdout


def _start(command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {command[0]} on this machine. Run megamix launch where jobs are submitted from, or look at what "
            "it would submit: --dry-run."
        ) from error


def _words(text: str) -> str:
    """Slurm's messages without its prefixes, as one line."""
    lines = [line.split("error: ", 1)[-1].strip() for line in text.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("allocation failure: ").rstrip(".") for line in lines) or "it gives no reason"
