"""A chain of jobs: its steps, which of them are still to be submitted, and submitting them in order.

A job's name is ``megamix-FOLDER-STEP-HASH``, with the name and a hash of the absolute path of what the chain makes. So
a second launch finds the jobs of the first, and two that meet wait for each other (``--dependency=singleton``).
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamix.core.errors import InputError
from megamix.core.files import shipped_folder
from megamix.core.log import get_logger
from megamix.studies.slurm import slurm


@dataclass(frozen=True)
class Step:
    """One job of a chain, or one array of jobs.

    Attributes:
        name: in the chain.
        script: of the folder ``slurm``.
        arguments: of the script.
        options: of sbatch: resources.
        done: whether its result is there.
        members: of an array, those whose result is not there; None: no array.
        limit: members that run at a time; 0: no limit.
        after: how the step before has to end: ``afterok``, or ``afterany``.
        environment: what the script reads beside its arguments.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    done: bool = False
    members: tuple[int, ...] | None = None
    limit: int = 0
    after: str = "afterok"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Steps that follow on each other, and the folder of what they make."""

    folder: Path
    steps: Sequence[Step]

    def job_name(self, step: Step) -> str:
        """The name of a step's job: the same for the same folder, whoever asks from where."""
        folder = self.folder.absolute()
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        return f"megamix-{folder.name}-{step.name}-{digest}"

    @property
    def logs(self) -> Path:
        """Where jobs write what they say."""
        return self.folder.absolute() / "slurm"

    def command(self, step: Step, members: Sequence[int] | None, after: Sequence[int | str]) -> list[str]:
        """The command line that submits a step.

        Args:
            after: the jobs of the step before.
        """
        pattern = "%x-%A_%a.out" if members is not None else "%x-%j.out"
        options = [f"--job-name={self.job_name(step)}", f"--output={self.logs / pattern}", "--export=ALL"]
        dependencies = [f"{step.after}:{':'.join(map(str, after))}"] if after else []
        if members is not None:
            limit = f"%{step.limit}" if step.limit else ""
            options.append(f"--array={','.join(map(str, members))}{limit}")
        else:  # Members of an array have one name, and would wait for each other.
            dependencies.append("singleton")
        if dependencies:
            options.append(f"--dependency={','.join(dependencies)}")
        if after:
            options.append("--kill-on-invalid-dep=yes")
        return ["sbatch", *options, *step.options, str(shipped_folder("slurm") / step.script), *step.arguments]

    def environment(self, step: Step) -> dict[str, str]:
        """What the job scripts are told by variables."""
        told = {"MEGAMIX_SLURM": str(shipped_folder("slurm")), "MEGAMIX_LOGS": str(self.logs), **step.environment}
        if not os.environ.get("MEGAMIX_CONTAINER"):
            told["MEGAMIX_PYTHON"] = os.environ.get("MEGAMIX_PYTHON", sys.executable)
        return told


def submit(chain: Chain) -> None:
    """Submits what is neither done nor in the queue, after everything has been checked.

    Raises:
        InputError: something that Slurm refuses; nothing is submitted then.
    """
    log, environment = get_logger(), dict(os.environ)
    waiting = {step.name: slurm.queued(chain.job_name(step)) for step in chain.steps if not step.done}
    for step in chain.steps:
        if not step.done and not waiting[step.name]:
            slurm.check(chain.command(step, step.members, ()), {**environment, **chain.environment(step)})
    _make_logs(chain)
    before: list[int] = []
    for step in chain.steps:
        name = chain.job_name(step)
        if step.done:
            log.info("%s: done", step.name)
            before = []
            continue
        found = waiting[step.name]
        jobs = sorted({job.job for job in found})
        if found:
            states = ", ".join(sorted({job.state.lower() for job in found}))
            log.info("%s: not submitted again, job %s is %s (%s)", step.name, ", ".join(map(str, jobs)), states, name)
        members = step.members
        if members is not None:
            members = tuple(member for member in members if member not in {job.member for job in found})
        if members or (members is None and not found):
            command = chain.command(step, members, before)
            jobs.append(slurm.submit(command, {**environment, **chain.environment(step)}))
            which = "" if members is None else f", members {', '.join(map(str, members))}"
            log.info("%s: submitted as job %d (%s)%s", step.name, jobs[-1], name, which)
        before = jobs


def show(chain: Chain) -> str:
    """What `submit` would do, without asking the cluster: the commands and the scripts they submit."""
    lines: list[str] = []
    before: list[str] = []
    for step in chain.steps:
        if step.done:
            lines.append(f"# {step.name}: done")
            before = []
            continue
        told = [f"{name}={shlex.quote(value)}" for name, value in chain.environment(step).items()]
        command = shlex.join(chain.command(step, step.members, before))
        for placeholder in before:
            command = command.replace(f"'{placeholder}'", placeholder)
        lines += [f"# {step.name}", " ".join([*told, command]), ""]
        before = [f"<{step.name}>"]
    for script in dict.fromkeys(step.script for step in chain.steps if not step.done):
        text = (shipped_folder("slurm") / script).read_text(encoding="utf-8")
        lines += [f"# ---- {shipped_folder('slurm') / script}", text]
    if shutil.which("sbatch") is None:
        lines.append("# There is no sbatch here: what the cluster has was not looked at.")
    return "\n".join(lines)


def _make_logs(chain: Chain) -> None:
    """Slurm does not make the folder of a job's output, and ends a job without one in silence."""
    try:
        chain.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {chain.logs}: {error.strerror or error}. Choose another run_dir.") from error
