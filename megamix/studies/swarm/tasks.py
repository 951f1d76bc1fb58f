"""``megamix swarm all``: from one config to a proposed mixture, and to a model trained with it; here or on Slurm.

    DIR/swarm.yaml          the config, resolved
    DIR/priors.json         tokens and shares of the domains
    DIR/update.json         of an update: what of the old mixture is frozen
    DIR/swarm.csv           the mixtures of the members
    DIR/members/NNNN.yaml   a run's config for each
    DIR/runs/NNNN, logs     these runs, and what they said
    DIR/ratios.csv, metrics.csv    what they were trained on, and their results
    DIR/fit.json, mixture.json     the law, and the mixture that follows
    DIR/target              a run with that mixture, where one is asked for

DIR is the config's run_dir.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megamix.core.errors import EXIT_OK, InputError
from megamix.core.files import read_csv, replace_json
from megamix.core.log import get_logger
from megamix.core.paths import argument
from megamix.mixing.weight_files import SWARM_MIXTURE
from megamix.studies.pool import default_at_once, run_members
from megamix.studies.runs import absolute, command_job, members_job, members_of, run_task, write_yaml
from megamix.studies.slurm.resources import Resources
from megamix.studies.slurm.submit import run_those_without_job, submit_or_show
from megamix.studies.swarm.collect import FOLDER, METRICS, RATIOS, collect, is_collected, place_of_tables
from megamix.studies.swarm.fit.fitted import JSON as FIT
from megamix.studies.swarm.fit.tables import write_ratios
from megamix.studies.swarm.generate.levels import Floats
from megamix.studies.swarm.generate.mixtures import draw_mixtures
from megamix.studies.swarm.priors import FILE as PRIORS
from megamix.studies.swarm.priors import Priors
from megamix.studies.swarm.propose.config import OPTIONS_FILE, ProposeConfig
from megamix.studies.swarm.propose.reuse import UPDATE_FILE
from megamix.studies.swarm.study import SwarmStudy, read_study, tokens_of, write_members
from megamix.studies.swarm.update import cost
from megamix.studies.tasks import Job, Stamp, Task, run_tasks
from megamix.training.job.local_ranks import job_world_size
from megamix.training.job.lock import RunLock
from megamix.training.records.recorded_run import METRICS as METRICS_RECORD
from megamix.training.records.recorded_run import WEIGHTS as LEDGER

TaskName = Literal["priors", "generate", "run", "collect", "fit", "propose", "target"]
MIXTURES = "swarm.csv"
LOGS = "logs"
ARRAY = "swarm"
"""The array of the members on Slurm, also of ``megamix launch --chain swarm``: one finds the jobs of the other."""


@dataclass(frozen=True)
class Submission:
    """How the tasks of a swarm are submitted.

    Attributes:
        command: runs a task in a job, with ``--only TASK`` after it.
        resources, target: of the members' jobs and of the target run's.
        limit: members that run at a time; 0: all.
    """

    command: tuple[str, ...]
    resources: Resources
    target: Resources
    limit: int


def swarm(config_path: Path, overrides: list[str], only: TaskName | None = None, *, at_once: int | None = None) -> int:
    """Runs all tasks that are not done, or one; returns the exit code.

    Args:
        only: this task alone, even if it is done; with the mixtures also the priors.
        at_once: members that run at a time, in the place of ``swarm.run.at_once``.

    Raises:
        MegamixError: anything a user can mend.
    """
    if job_world_size() is not None:
        raise InputError(
            "megamix swarm starts its own ranks. Outside of torchrun and srun, take `megamix swarm generate CONFIG`; then run "
            "the members (`megamix swarm run CONFIG --slurm`); then `megamix swarm all CONFIG` for what follows."
        )
    study = read_study(config_path, overrides)
    with RunLock(study.run_dir):
        if only is None:
            _tell_cost(study)
            return run_tasks(itertools.chain(_tasks(study, at_once), _target(study)))
        _refuse_absent(study, only)
        names = ("priors", "generate") if only == "generate" else (only,)
        tasks = _target(study) if only == "target" else _tasks(study, at_once)
        return run_tasks((task for task in tasks if task.name in names), again=True)


def _refuse_absent(study: SwarmStudy, only: TaskName) -> None:
    """Raises InputError for a task that the study does not have."""
    if only == "target" and study.target is None:
        raise InputError(f"{study.source}: swarm.target is null, so there is no target run. Set it to {{}} or to keys.")
    if only not in ("priors", "propose", "target") and study.is_settled:
        raise InputError(
            f"{study.source}: this update leaves no weight to be found, so there is no swarm. `megamix swarm all` writes its mixture."
        )


def submit_swarm(
    config_path: Path, overrides: list[str], resources: Resources, target: Resources, limit: int, *, dry_run: bool
) -> str:
    """Writes the members' configs here, submits all that follows, and returns what to print.

    Args:
        target: resources of the target run.
        limit: members that run at a time; 0: all.
    """
    study = read_study(config_path, overrides)
    command = ("swarm", "all", argument(config_path), *absolute(overrides))
    submission = Submission(command, resources, target, limit)
    # Not while the same swarm runs here: its members' configs are written. The jobs take this lock themselves.
    with RunLock(study.run_dir):
        _tell_cost(study)
        tasks = run_those_without_job(itertools.chain(_tasks(study, None, submission), _target(study, submission)))
    return submit_or_show(study.run_dir, tasks, dry_run=dry_run)


def submit_members(
    folder: Path, overrides: list[str], resources: Resources, limit: int, *, dry_run: bool, check_data: bool = True
) -> str:
    """Submits a run for each config of a folder as an array, and a job that writes their tables."""
    members = members_of(folder, overrides)
    job = members_job(folder, overrides, members, resources, limit, check_data=check_data)
    gather = ("launch", *job.arguments, "--chain", "swarm", "--gather")
    tables = command_job(gather, resources, "afterany")  # of those that have ended well, where others have not
    tasks = [Task(ARRAY, job=job), Task("results", lambda: is_collected(folder, members), job=tables)]
    return submit_or_show(place_of_tables(folder), tasks, dry_run=dry_run)


def _tasks(study: SwarmStudy, at_once: int | None, slurm: Submission | None = None) -> Iterator[Task]:
    """The tasks up to the mixture, each made when those before it are done: an array is made of configs."""
    folder = study.run_dir / FOLDER

    def job(task: TaskName) -> Job | None:
        return slurm and command_job((*slurm.command, "--only", task), slurm.resources)

    yield Task("priors", run=lambda: _priors(study))
    if not study.is_settled:
        yield Task("generate", run=lambda: _generate(study))
        array = slurm and members_job(folder, [], members_of(folder, []), slurm.resources, slurm.limit)
        yield Task(ARRAY if slurm else "run", run=lambda: _run(study, at_once), job=array)
        yield Task("collect", lambda: _tables(study).holds(), lambda: _collect(study), job("collect"))
        yield Task("fit", _law(study).holds, lambda: _fit(study), job("fit"))
    yield Task("propose", lambda: _mixture(study).holds(), lambda: _propose(study), job("propose"))


def _target(study: SwarmStudy, slurm: Submission | None = None) -> Iterator[Task]:
    """The target run, if there is one; its config is written when the task is asked for."""
    if study.target is not None:
        path = study.run_dir / "target.yaml"
        write_yaml(path, study.target.model_dump(mode="json"))
        yield run_task("target", path, [study.run_dir / SWARM_MIXTURE], slurm and slurm.target)


def _priors(study: SwarmStudy) -> int:
    """Writes the shares that a proposal is compared with, of all real domains, and what an update freezes."""
    priors = Priors(study.token_counts, study.centre)
    priors.write(study.run_dir / PRIORS)
    if study.update is None:
        (study.run_dir / UPDATE_FILE).unlink(missing_ok=True)
    else:
        study.update.save(study.run_dir)
    for line in priors.table().text().splitlines():
        get_logger().info("%s", line)
    return EXIT_OK


def _generate(study: SwarmStudy) -> int:
    path = study.config.generate.existing_mix_file
    existing = None if path is None else _read_mixtures(path, study.domains)
    weights = draw_mixtures(study.space, study.num_members, existing)
    real = weights if study.update is None else study.update.expand(weights)
    write_members(study.run_dir, study.proxy, tuple(study.token_counts), real, f"{study.source}, proxy run")
    names = [f"{number:04}" for number in range(len(weights))]
    write_ratios(study.run_dir / MIXTURES, names, study.domains, weights)
    get_logger().info("the configs of %d members are in %s", len(weights), study.run_dir / FOLDER)
    return EXIT_OK


def _run(study: SwarmStudy, at_once: int | None) -> int:
    members = members_of(study.run_dir / FOLDER, [])
    number = at_once or study.config.run.at_once or default_at_once(members[0])
    return run_members(members, [], number, study.run_dir / LOGS)


def _tables(study: SwarmStudy) -> Stamp:
    """The tables follow from the records of all members."""
    metrics = study.config.metrics
    records = [METRICS_RECORD, LEDGER, *([metrics.file] if metrics.file else [])]
    runs = [member.config.run_dir for member in members_of(study.run_dir / FOLDER, [])]
    inputs = (study.run_dir / UPDATE_FILE, *(run / name for run in runs for name in records))
    return Stamp(study.run_dir, (RATIOS, METRICS), metrics, inputs)


def _collect(study: SwarmStudy) -> int:
    collect(study.run_dir / FOLDER, [], study.config.metrics)
    _tables(study).set()
    return EXIT_OK


def _law(study: SwarmStudy) -> Stamp:
    """The fit follows from the tables."""
    return Stamp(study.run_dir, (FIT,), study.config.fit, (study.run_dir / RATIOS, study.run_dir / METRICS))


def _fit(study: SwarmStudy) -> int:
    from megamix.studies.swarm.fit.fit import fit, report

    run_dir = study.run_dir
    report(fit(run_dir / RATIOS, run_dir / METRICS, run_dir, study.config.fit), run_dir).show()
    _law(study).set()
    return EXIT_OK


def _options(study: SwarmStudy) -> ProposeConfig:
    options = study.config.propose
    if options.target_tokens is None and study.target_tokens is not None:
        options = options.model_copy(update={"target_tokens": float(study.target_tokens)})
    return options


def _mixture(study: SwarmStudy) -> Stamp:
    """The proposed mixture follows from the fit, the priors and the update."""
    inputs = tuple(study.run_dir / name for name in (FIT, PRIORS, UPDATE_FILE))
    return Stamp(study.run_dir, (SWARM_MIXTURE,), _options(study), inputs)


def _propose(study: SwarmStudy) -> int:
    from megamix.studies.swarm.propose.propose import propose_in, propose_settled
    from megamix.studies.swarm.propose.report import report

    if study.update is not None and study.is_settled:
        _, path = propose_settled(study.run_dir, study.update)
        get_logger().info("nothing is to be found: the old weights, scaled to sum 1, are in %s", path)
    else:
        # What `megamix swarm propose DIR` goes by, too.
        options = _options(study)
        replace_json(study.run_dir / OPTIONS_FILE, options.model_dump(mode="json", exclude_defaults=True))
        report(*propose_in(study.run_dir, options)).show()
    _mixture(study).set()
    return EXIT_OK


def _tell_cost(study: SwarmStudy) -> None:
    """Says what will run before anything does."""
    log, tokens, number = get_logger(), tokens_of(study.plan.config), study.num_members
    log.info("%d proxy runs of %s tokens, %s together", number, f"{tokens:,}", f"{number * tokens:,}")
    if study.update is not None:
        for line in cost(study.update, tokens, number).text().splitlines():
            log.info("%s", line)
    if study.target_tokens is not None:
        log.info("and a target run of %s tokens", f"{study.target_tokens:,}")


def _read_mixtures(path: Path, domains: tuple[str, ...]) -> Floats:
    """float64 [rows, K]: the rows of a ratios.csv that have all their weight on these domains."""
    key = "swarm.generate.existing_mix_file"
    read = read_csv(path, what=key)
    header = read[0][1] if read else []
    try:
        named = [dict(zip(header, fields, strict=False)) for _, fields in read[1:]]
        rows = [[float(row.get(name) or 0.0) for name in domains] for row in named]
    except ValueError as error:
        raise InputError(f"{key}: cannot read {path}: {error}. Check the path.") from error
    return np.array([row for row in rows if abs(sum(row) - 1) < 1e-3], np.float64).reshape(-1, len(domains))
