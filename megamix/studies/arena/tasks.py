"""``megamix arena``: all members of a comparison, and what they say; here or on Slurm.

RUN_DIR/traps/NAME                the data sets of traps
RUN_DIR/members                   a run's config for each member (`megamix.studies.arena.study`)
RUN_DIR/runs/NAME, logs           these runs, and what they said
RUN_DIR/results.csv, .json, .md   the results (`megamix.studies.arena.collect`)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamix.core.errors import EXIT_OK, InputError, RankFailed
from megamix.core.log import get_logger
from megamix.core.paths import argument
from megamix.core.text import plural
from megamix.studies.arena.begun import refuse_changed
from megamix.studies.arena.checks import read_study
from megamix.studies.arena.collect import JSON as RESULTS
from megamix.studies.arena.collect import collect
from megamix.studies.arena.study import ARMS, BEGIN, FROZEN_ARMS, TRAPS, ArenaStudy
from megamix.studies.pool import default_at_once, run_members
from megamix.studies.runs import absolute, command_job, members_job
from megamix.studies.slurm.resources import Resources
from megamix.studies.slurm.submit import submit_or_show
from megamix.studies.tasks import Task, is_newer, run_tasks
from megamix.training.job.local_ranks import job_world_size
from megamix.training.job.lock import RunLock
from megamix.training.records.recorded_run import METRICS

TaskName = Literal["data", "run", "collect"]
LOGS = "logs"
ARRAYS = {BEGIN: "begin", ARMS: "run", FROZEN_ARMS: "frozen"}
"""The arrays on Slurm, by the folder of their members' configs."""


@dataclass(frozen=True)
class Submission:
    """How the tasks of an arena are submitted.

    Attributes:
        command: collects the results in a job.
        limit: members that run at a time; 0: all.
    """

    command: tuple[str, ...]
    resources: Resources
    limit: int


def arena(config_path: Path, overrides: list[str], only: TaskName | None = None, *, at_once: int | None = None) -> int:
    """Runs all members that are not done, and writes the results; returns the exit code.

    Args:
        only: data: only the data sets of traps and the members' configs; run: these and the members; collect: only the
            results of the members that are done, also while others run.
        at_once: members that run at a time, in the place of ``arena.at_once``.

    Raises:
        MegamixError: anything a user can mend.
    """
    if job_world_size() is not None:
        raise InputError(
            "megamix arena starts its own ranks. Outside of torchrun and srun, take `megamix arena CONFIG`, or with --slurm."
        )
    study = read_study(config_path, overrides)
    if only == "collect":
        collect(study).show()
        return EXIT_OK
    with RunLock(study.run_dir):
        _tell_cost(study)
        wanted = {"data": ("traps", "members"), "run": ("traps", "members", "run")}
        failed: list[RankFailed] = []
        tasks = _tasks(study, at_once, failed)
        code = run_tasks(task for task in tasks if only is None or task.name in wanted[only])
    if failed:
        raise RankFailed("\n".join(map(str, failed)))
    return code


def submit_arena(
    config_path: Path, overrides: list[str], resources: Resources, limit: int, *, dry_run: bool = False
) -> str:
    """Writes the data sets and configs here, submits all that follows, and returns what to print."""
    study = read_study(config_path, overrides)
    command = ("arena", argument(config_path), *absolute(overrides), "--only", "collect")
    with RunLock(study.run_dir):
        _tell_cost(study)
        tasks = _tasks(study, None, [], Submission(command, resources, limit))
        return submit_or_show(study.run_dir, tasks, dry_run=dry_run)


def _tasks(
    study: ArenaStudy, at_once: int | None, failed: list[RankFailed], slurm: Submission | None = None
) -> Iterator[Task]:
    """The tasks of an arena, each made when those before it are done or submitted.

    Args:
        failed: gets the members that fail, as the results are of the others.
    """
    yield Task("traps", run=lambda: _traps(study))
    yield Task("members", run=lambda: _members(study))
    if slurm is None:
        yield Task("run", run=lambda: _run(study, at_once, failed))
    else:
        yield from _arrays(study, slurm)
    # Of the members that are done, where others have failed.
    job = slurm and command_job(slurm.command, slurm.resources, after="afterany")
    done = (lambda: _is_collected(study)) if slurm is not None else (lambda: False)
    yield Task("results", done, lambda: _collect(study), job)


def _run(study: ArenaStudy, at_once: int | None, failed: list[RankFailed]) -> int:
    """Runs the members condition by condition, so that the results of the first are there early; returns the exit
    code."""
    for condition in study.conditions:
        for part in (BEGIN, ARMS, FROZEN_ARMS):
            members = study.members(part, condition)
            if not members:
                continue
            number = at_once or study.config.at_once or default_at_once(members[0])
            try:
                code = run_members(members, [], number, study.run_dir / LOGS)
            except RankFailed as error:
                failed.append(error)
            else:
                if code != EXIT_OK:
                    return code
    return EXIT_OK


def _arrays(study: ArenaStudy, slurm: Submission) -> Iterator[Task]:
    """The members as arrays, one for each part. A member that fails does not keep the others from running: one that
    needs it says so itself."""
    for part, name in ARRAYS.items():
        if members := study.members(part):
            # The weights of a mean are there when the members before it are done.
            checked = part != FROZEN_ARMS
            folder = study.folder(part)
            limits = slurm.resources, slurm.limit
            job = members_job(folder, [], members, *limits, check_data=checked, after="afterany")
            yield Task(name, job=job)


def _traps(study: ArenaStudy) -> int:
    for trap in study.traps.values():
        if trap.writes_data:
            trap.write(study.run_dir / TRAPS / trap.name, study.plan.config.data.seq_length)
    return EXIT_OK


def _members(study: ArenaStudy) -> int:
    refuse_changed(study)
    study.write()
    return EXIT_OK


def _collect(study: ArenaStudy) -> int:
    collect(study).show()
    return EXIT_OK


def _is_collected(study: ArenaStudy) -> bool:
    """Whether all members are done, and their results are written."""
    members = [*study.members(ARMS), *study.members(FROZEN_ARMS)]
    records = [member.config.run_dir / METRICS for member in members]
    return all(member.is_done for member in members) and is_newer(study.run_dir / RESULTS, records)


def _tell_cost(study: ArenaStudy) -> None:
    """Says what will run before anything does."""
    batches = study.plan.config.batches
    tokens = sum(batches.tokens(entry.condition.steps) for entry in study.entries)
    get_logger().info(
        "%s: %s, %s; %s tokens together", plural(len(study.entries), "member"), plural(len(study.arms), "arm"),
        plural(len(study.config.seeds), "seed"), f"{tokens:,}",
    )  # fmt: skip
