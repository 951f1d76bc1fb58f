"""Tasks of a study: what each makes, whether it is done, how it runs here and how Slurm runs it.

    study --> tasks --> run_tasks: here, in order
                   \\--> slurm.submit: jobs that wait for each other

A task is done when its outputs are there and were made from its inputs as they are now:

    a run      its last checkpoint is of its last step, and it was started after its inputs last changed
    a file     it is newer than its inputs; where the content matters, a `Stamp` holds the hashes of both
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamix.core.config import Config
from megamix.core.errors import EXIT_OK, ResumeRefused
from megamix.core.files import parse_json, replace_json
from megamix.core.log import get_logger
from megamix.training.checkpoints.state import newest_state
from megamix.training.config import RunConfig

STAMPS = "steps.json"


@dataclass(frozen=True)
class Job:
    """Slurm job of a task, or array of jobs.

    Attributes:
        script: in the folder ``slurm``.
        options: of sbatch: resources.
        members: of an array, the indices that are not done; None: no array.
        limit: members that run at a time; 0: all.
        names: of an array, what each index stands for.
        after: how the task before has to end: ``afterok`` or ``afterany``.
        environment: variables that the script reads.
    """

    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    members: tuple[int, ...] | None = None
    limit: int = 0
    after: str = "afterok"
    names: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def never() -> bool:
    """The answer to `Task.is_done` of a task that is cheap, or that passes over what is done itself."""
    return False


@dataclass(frozen=True)
class Task:
    """Part of a study; it follows the task before it.

    Attributes:
        is_done: whether the outputs are there, made from the inputs as they are now.
        run: runs it on this machine and returns the exit code; None: it runs on Slurm only.
        job: how Slurm runs it; None: submitting the tasks after it runs it here.
    """

    name: str
    is_done: Callable[[], bool] = never
    run: Callable[[], int] | None = None
    job: Job | None = None


def run_tasks(tasks: Iterable[Task], *, again: bool = False) -> int:
    """Runs the tasks that are not done, or with ``again`` all, in order; returns the first exit code that is not 0."""
    for task in tasks:
        if not again and task.is_done():
            get_logger().info("%s: done", task.name)
        elif task.run is not None and (code := task.run()) != EXIT_OK:
            return code
    return EXIT_OK


def is_run_done(config: RunConfig, inputs: Sequence[Path] = (), until: int | None = None) -> bool:
    """Whether a run's last checkpoint is of its last step, or of ``until`` or later, and the run was started after
    ``inputs`` last changed."""
    try:
        state = newest_state(config.run_dir / "checkpoints")
    except ResumeRefused:
        return False  # all checkpoints are damaged, which the run itself says
    if state is None or state.step < (until or config.train.steps):
        return False
    return not inputs or is_newer(config.run_dir / "config.resolved.yaml", inputs)


def is_newer(output: Path, inputs: Sequence[Path]) -> bool:
    """Whether a file is there and not older than any of its inputs."""
    made = output.stat().st_mtime_ns if output.is_file() else -1
    return made >= 0 and all(path.stat().st_mtime_ns <= made for path in inputs if path.exists())


@dataclass(frozen=True)
class Stamp:
    """Hashes of outputs and of what they were made from, in ``FOLDER/steps.json``.

    Attributes:
        outputs: files in the folder.
        settings, inputs: what they are made from; an input that is not there counts as empty.
    """

    folder: Path
    outputs: tuple[str, ...]
    settings: Config
    inputs: tuple[Path, ...]

    def holds(self) -> bool:
        """Whether the outputs are there, as they were made, from the settings and inputs as they are now."""
        there = all((self.folder / name).is_file() for name in self.outputs)
        if not there:
            return False
        noted = self._noted()
        return all(noted.get(name) == made for name, made in self._present().items())

    def set(self) -> None:
        """Notes that the outputs have been made."""
        replace_json(self.folder / STAMPS, self._noted() | self._present())

    def _noted(self) -> dict[str, list[str]]:
        """The hashes on disk; none of a file that cannot be read, so that the steps are done again."""
        path = self.folder / STAMPS
        try:
            noted = parse_json(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _present(self) -> dict[str, list[str]]:
        made_from = hashlib.sha256(self.settings.model_dump_json().encode())
        for path in self.inputs:
            made_from.update(path.read_bytes() if path.is_file() else b"")
        digests = {name: hashlib.sha256((self.folder / name).read_bytes()) for name in self.outputs}
        return {name: [made_from.hexdigest(), digest.hexdigest()] for name, digest in digests.items()}
