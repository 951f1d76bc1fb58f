"""Submitting tasks as jobs that wait for each other.

A job's name is ``megamix-FOLDER-TASK-HASH``, with the name and a hash of the absolute path of the study's folder. So a
second submission finds the jobs of the first, and two that meet wait for each other (``--dependency=singleton``). Names
are plain: squeue takes a comma for the end of one, and the job's output is a file of that name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.files import shipped_folder
from megamix.core.log import get_logger
from megamix.studies.slurm import commands
from megamix.studies.tasks import Job, Task, run_tasks

LONGEST_PART = 80
"""Characters of a folder's or a task's name in a job's: with a number and an ending it is the name of a file."""
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "PMI")
"""Variables that a job does not inherit from a job that submits it."""


@dataclass(frozen=True)
class Chain:
    """Tasks that follow on each other, and the folder of what they make.

    Attributes:
        tasks: all with a job.
    """

    folder: Path
    tasks: Sequence[Task]

    def job_name(self, task: Task) -> str:
        """The name of a task's job: the same for the same folder, from wherever it is submitted."""
        folder = self.folder.absolute()
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        return f"megamix-{_plain(folder.name)}-{_plain(task.name)}-{digest}"

    @property
    def logs(self) -> Path:
        """Folder of the jobs' output."""
        return self.folder.absolute() / "slurm"

    def jobs(self) -> list[tuple[Task, Job | None]]:
        """Each task with its job; None for one that is done. What follows a task that is not done is not done either,
        but for members of arrays."""
        found: list[tuple[Task, Job | None]] = []
        for task in self.tasks:
            if task.job is not None and task.job.members is not None:
                done = not task.job.members
            else:
                done = all(job is None for _, job in found) and task.is_done()
            found.append((task, None if done else task.job))
        return found

    def command(self, task: Task, job: Job, members: Sequence[int] | None, after: Sequence[str]) -> list[str]:
        """The command line that submits a task after the jobs ``after``."""
        pattern = "%x-%j.out" if members is None else "%x-%A_%a.out"
        output = f"{escape_path(self.logs)}/{pattern}"
        options = [f"--job-name={self.job_name(task)}", f"--output={output}", "--export=ALL"]
        if members is not None:
            options.append(f"--array={','.join(map(str, members))}" + (f"%{job.limit}" if job.limit else ""))
        if dependency := dependency_of(job, after):
            options.append(f"--dependency={dependency}")
        if after:
            options.append("--kill-on-invalid-dep=yes")
        return ["sbatch", *options, *job.options, str(shipped_folder("slurm") / job.script), *job.arguments]

    def environment(self, job: Job) -> dict[str, str]:
        """Variables of the job scripts."""
        told = {"MEGAMIX_SLURM": str(shipped_folder("slurm")), "MEGAMIX_LOGS": str(self.logs), **job.environment}
        if not os.environ.get("MEGAMIX_CONTAINER"):
            told["MEGAMIX_PYTHON"] = os.environ.get("MEGAMIX_PYTHON", sys.executable)
        return told


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:LONGEST_PART]


def escape_path(path: Path) -> str:
    """A path as Slurm reads it in ``--output``, where ``%j`` and the like are replaced.

    Raises:
        InputError: a backslash, for which nothing else would be replaced, or the end of a line.
    """
    for sign, name in (("\\", "a backslash"), ("\n", "the end of a line")):
        if sign in str(path):
            raise InputError(
                f"Slurm cannot write the output of a job to {str(path)!r}: {name} is in the path. Choose another run_dir."
            )
    return str(path).replace("%", "%%")


def dependency_of(job: Job, after: Sequence[str]) -> str:
    """What a job waits for; members of an array have one name, and would wait for each other."""
    waits = [f"{job.after}:{':'.join(after)}"] if after else []
    return ",".join(waits if job.members is not None else [*waits, "singleton"])


def submit(chain: Chain) -> None:
    """Submits what is neither done nor in the queue, after everything has been checked.

    A job that waits already is made to wait for the new jobs of the task before it, too.

    Raises:
        InputError: something that Slurm refuses; nothing is submitted then.
    """
    log, inherited = get_logger(), _inherited()
    jobs = chain.jobs()
    queued = {task.name: commands.queued(chain.job_name(task)) for task, job in jobs if job is not None}
    for task, job in jobs:
        if job is not None and not queued[task.name]:
            commands.check(chain.command(task, job, job.members, ()), inherited | chain.environment(job))
    _make_logs(chain)
    before: list[str] = []
    is_new = False
    for task, job in jobs:
        if job is None:
            log.info("%s: done", task.name)
            continue
        name, found, members = chain.job_name(task), queued[task.name], job.members
        after = sorted({one.member_id for one in found})
        if found:
            states = ", ".join(sorted({one.state.lower() for one in found}))
            numbers = ", ".join(map(str, sorted({one.job for one in found})))
            log.info("%s: not submitted again, job %s is %s (%s)", task.name, numbers, states, name)
            if is_new:
                commands.wait_for([one for one in found if one.state == "PENDING"], dependency_of(job, before))
        if members is not None:
            members = tuple(member for member in members if member not in {one.member for one in found})
        if members or (members is None and not found):
            command = chain.command(task, job, members, before)
            number = commands.submit(command, inherited | chain.environment(job))
            which = "" if members is None else f", members {', '.join(map(str, members))}"
            log.info("%s: submitted as job %d (%s)%s", task.name, number, name, which)
            after.append(str(number))
            is_new = True
        before = after


def show(chain: Chain) -> str:
    """What `submit` would do, without asking the cluster: the commands, the members of arrays, and all scripts."""
    lines: list[str] = []
    before: list[str] = []
    scripts: dict[Path, None] = {}
    for task, job in chain.jobs():
        if job is None:
            lines.append(f"# {task.name}: done")
            continue
        told = [f"{name}={shlex.quote(value)}" for name, value in chain.environment(job).items()]
        command = shlex.join(chain.command(task, job, job.members, before))
        for placeholder in before:
            command = command.replace(f"'{placeholder}'", placeholder)
        members = [f"#   {index}: {job.names[index]}" for index in job.members or () if job.names]
        lines += [f"# {task.name}", " ".join([*told, command]), *members, ""]
        before = [f"<{task.name}>"]
        scripts[shipped_folder("slurm") / job.script] = None
    for script in [*scripts, *(_sourced() if scripts else [])]:
        lines += [f"# ---- {script}", script.read_text(encoding="utf-8")]
    if shutil.which("sbatch") is None:
        lines.append("# There is no sbatch here: what the cluster has was not looked at.")
    return "\n".join(lines)


def _sourced() -> list[Path]:
    """The scripts that every job script runs, and the environment."""
    folder = shipped_folder("slurm")
    environment = Path(os.environ.get("MEGAMIX_ENV") or folder / "env.sh")
    launchers = ["rank.sh", *(["torchrun.sh"] if os.environ.get("MEGAMIX_LAUNCHER") == "torchrun" else [])]
    if not environment.is_file():
        raise InputError(f"MEGAMIX_ENV is {environment}, which is no file. Every job would fail: correct it.")
    return [environment, folder / "common.sh", *(folder / name for name in launchers)]


def run_those_without_job(tasks: Iterable[Task]) -> list[Task]:
    """The tasks with a job; runs the others. Each is read when those before it are done: it may be made of their
    outputs."""
    left = []
    for task in tasks:
        if task.job is None:
            run_tasks([task])
        else:
            left.append(task)
    return left


def submit_or_show(folder: Path, tasks: Iterable[Task], *, dry_run: bool) -> str:
    """Submits tasks, or with ``dry_run`` only says what would be submitted; returns what to print."""
    chain = Chain(folder, run_those_without_job(tasks))
    if dry_run:
        return show(chain)
    submit(chain)
    return ""


def _inherited() -> dict[str, str]:
    """The environment of a new job. Where a job submits it, without the variables that are that job's own."""
    found = dict(os.environ)
    if "SLURM_JOB_ID" not in found:
        return found
    if found.get("OMP_NUM_THREADS") == found.get("SLURM_CPUS_PER_TASK"):  # set by slurm/rank.sh
        found.pop("OMP_NUM_THREADS", None)
    return {name: value for name, value in found.items() if name == "SLURM_CONF" or not name.startswith(OF_A_JOB)}


def _make_logs(chain: Chain) -> None:
    """Slurm does not make the folder of a job's output, and ends a job without one in silence."""
    try:
        chain.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {chain.logs}: {error.strerror or error}. Choose another run_dir.") from error
