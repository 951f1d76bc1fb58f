"""Tasks of a study: what each makes, whether it is done, how it runs here and how Slurm runs it.

    study --> tasks --> run_tasks: here, in order
                   \\--> slurm.submit: jobs that wait for each other

A task is done when its outputs are there and were made from its inputs as they are now:

    a run      its last checkpoint is of its last step, and it was started after its inputs last changed
    a file     it is newer than its inputs; where the content matters, a `Stamp` holds the hashes of both
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamix.core.config import Config
from megamix.core.errors import EXIT_OK
from megamix.core.files import replace_file
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
        after: how the task before has to end: ``afterok`` or ``afterany``.
        environment: variables that the script reads.
    """

    script: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    members: tuple[int, ...] | None = None
    limit: int = 0
    after: str = "afterok"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Part of a study; it follows the one before it.

    Attributes:
        is_done: whether the outputs are there, made from the inputs as they are now.
        run: runs it on this machine and returns the exit code; None: it runs on Slurm only.
        job: how Slurm runs it; None: submitting the tasks after it runs it here.
    """

    name: str
    is_done: Callable[[], bool]
    run: Callable[[], int] | None = None
    job: Job | None = None


def run_tasks(tasks: Iterable[Task]) -> int:
    """Runs the tasks that are not done, in order; returns the exit code, of the first that ends with another than 0."""
    for task in tasks:
        if task.is_done():
            get_logger().info("%s: done", task.name)
        elif (code := _run(task)) != EXIT_OK:
            return code
    return EXIT_OK


def _run(task: Task) -> int:
    assert task.run is not None
    return task.run()


def is_run_done(config: RunConfig, inputs: Sequence[Path] = ()) -> bool:
    """Whether a run's last checkpoint is of its last step, and the run was started after ``inputs`` last changed."""
    state = newest_state(config.run_dir / "checkpoints")
    if state is None or state.step < config.train.steps:
        return False
    return not inputs or is_newer(config.run_dir / "config.resolved.yaml", inputs)


def is_newer(output: Path, inputs: Sequence[Path]) -> bool:
    """Whether a file is there and not older than any of its inputs."""
    if not output.is_file():
        return False
    made = output.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= made for path in inputs if path.exists())


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
        paths = [self.folder / name for name in self.outputs]
        if not all(path.is_file() for path in paths):
            return False
        stamps, made_from = self._stamps(), self._made_from()
        return all(stamps.get(path.name) == [made_from, _digest(path)] for path in paths)

    def set(self) -> None:
        """Notes that the outputs have been made."""
        made_from = self._made_from()
        stamps = self._stamps() | {name: [made_from, _digest(self.folder / name)] for name in self.outputs}
        replace_file(self.folder / STAMPS, (json.dumps(stamps, indent=1) + "\n").encode())

    def _stamps(self) -> dict[str, list[str]]:
        path = self.folder / STAMPS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _made_from(self) -> str:
        found = hashlib.sha256(self.settings.model_dump_json().encode())
        for path in self.inputs:
            found.update(path.read_bytes() if path.is_file() else b"")
        return found.hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
