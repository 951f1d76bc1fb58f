"""Runs as tasks of a study: one run, and the members of a folder of run configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamix.core.config import C, load_config, validate
from megamix.core.config_files import apply_overrides, read_yaml
from megamix.core.errors import InputError
from megamix.core.files import replace_file, writing
from megamix.core.paths import argument, expand
from megamix.studies.slurm.resources import Resources
from megamix.studies.tasks import Job, Task, is_run_done
from megamix.training.config import KINDS, RunConfig
from megamix.training.run import train


@dataclass(frozen=True)
class Member:
    """One of several runs that a study compares: an ordinary run with a config file.

    Attributes:
        until: the step that the study lets it train to; None: its last.
    """

    path: Path
    config: RunConfig
    until: int | None = None

    @property
    def name(self) -> str:
        """The name of its config file, by which tables and messages know it."""
        return self.path.stem

    @property
    def is_done(self) -> bool:
        """Whether its last checkpoint is of its last step, or of the one that the study lets it train to."""
        return is_run_done(self.config, until=self.until)


def members_of(folder: Path, overrides: Sequence[str]) -> list[Member]:
    """The members in a folder, in the order of their array indices (that of the names' bytes).

    Raises:
        InputError: no config, one that cannot be read, or two of one run directory.
    """
    # As the shell of the job script lists them: without hidden files, such as an editor's.
    found = (path for path in folder.glob("*.yaml") if not path.name.startswith("."))
    paths = sorted(found, key=lambda path: path.name.encode())
    if not paths:
        raise InputError(f"{folder} holds no *.yaml: a swarm is a folder with one config for each run.")
    members = [Member(path, load_config(RunConfig, path, list(overrides))) for path in paths]
    taken: dict[Path, Path] = {}
    for member in members:
        run_dir = member.config.run_dir.absolute()
        if run_dir in taken:
            raise InputError(f"{member.path} and {taken[run_dir]} have the same run_dir, {run_dir}. Give each its own.")
        taken[run_dir] = member.path
    return members


def members_job(
    folder: Path,
    overrides: Sequence[str],
    members: Sequence[Member],
    resources: Resources,
    limit: int,
    *,
    check_data: bool = True,
    after: str = "afterok",
) -> Job:
    """Array with an index for each member of a folder; raises InputError for members of different numbers of ranks.

    Args:
        check_data: whether data and mixtures of the members are there already.
        after: as of `Job`.
    """
    options = [resources.of_run(member.config, str(member.path), check_data=check_data) for member in members]
    odd = next((i for i, other in enumerate(options) if other != options[0]), None)
    if odd is not None:
        raise InputError(
            f"{members[odd].path} is for {' '.join(options[odd][:2])}, and {members[0].path} for {' '.join(options[0][:2])}: "
            "the jobs of an array are of one size. Put them into two folders."
        )
    left = tuple(index for index, member in enumerate(members) if not member.is_done)
    names = tuple(str(member.path) for member in members)
    return Job("swarm.sbatch", (str(folder.absolute()), *absolute(overrides)), options[0], left, limit, after, names)


def run_task(name: str, path: Path, inputs: Sequence[Path] = (), resources: Resources | None = None) -> Task:
    """Run of a config file that the study has written.

    Args:
        inputs: files beside the config that the run follows from.
        resources: of its Slurm job; None: it runs here.
    """
    config = load_config(RunConfig, path)
    job = None
    if resources is not None:
        # Its mixture may not be there yet; its data was checked when the config was written.
        options = resources.of_run(config, str(path.absolute()), check_data=False)
        job = Job("train.sbatch", (argument(path),), options)
    return Task(name, lambda: is_run_done(config, (path, *inputs)), lambda: train(path, []), job)


def command_job(arguments: Sequence[str], resources: Resources | None, after: str = "afterok") -> Job | None:
    """Job of one process, ``megamix ARGUMENTS``; None without resources."""
    return None if resources is None else Job("command.sbatch", tuple(arguments), resources.of_process(), after=after)


def absolute(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides with the whole paths of those that are files."""
    return tuple(item if "=" in item else argument(Path(expand(item))) for item in overrides)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a config, unless the file holds it already: so it is newer than a run only where it has changed.

    Raises:
        InputError: it cannot be written.
    """
    data = yaml.safe_dump(dict(content), sort_keys=False).encode()
    with writing(path, "Choose another run_dir."):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            replace_file(path, data)


def read_section(
    model: type[C], key: str, path: Path, overrides: list[str], settled: Mapping[str, Sequence[str]], why: str
) -> tuple[dict[str, Any], C]:
    """Reads the config of a study.

    Args:
        key: the study's own key in the config.
        settled: {run: keys that have no effect}; ``why`` says why.

    Returns:
        The run's config without ``key``, not validated; the config under ``key``.

    Raises:
        InputError: a key or value that cannot be used.
    """
    data = apply_overrides(read_yaml(path, KINDS), overrides, KINDS)
    section = data.pop(key, None)
    config = validate(model, {} if section is None else section, f"{path}, {key}")
    for run, names in settled.items():
        for name in names:
            if name in (getattr(config, run) or {}):
                raise InputError(f"{path}: {key}.{run}.{name} cannot be set: {why}")
    return data, config
