"""``megamix doremi``: from one config to DoReMi's weights, and on to a model trained with them; here or on Slurm.

    RUN/reference   a run with the reference weights (``mixture``)
    RUN/cache       its loss of every label that the proxy reads
    RUN/proxy       a run whose weights rise where its loss is above the reference's
    RUN/weights.json   the mean of those weights over the proxy's steps, also as ``mixture: {file: RUN/weights.json}``
    RUN/target      a run with these weights, where one is asked for

Source: Xie et al., arXiv 2305.10429. Iterated rounds are theirs too: the result becomes the reference weights of the
next round, in RUN/round_N, until no weight changes by more than a tolerance. On Slurm the job that ends a round
submits the next one: only its result says whether there is one.

Each task is a run, or a job, like those of ``megamix train`` and ``megamix reference``, from a config in RUN/TASK.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from megamix.core.config import load_config
from megamix.core.errors import EXIT_OK, InputError
from megamix.core.files import parse_json, replace_file
from megamix.core.log import get_logger
from megamix.core.paths import argument
from megamix.core.text import Table
from megamix.core.text import number as number_text
from megamix.data.reference_losses import FILE_NAME as LOSSES
from megamix.data.reference_losses import read_info
from megamix.studies.doremi.study import WEIGHTS, DoremiStudy, Weights, read_study
from megamix.studies.runs import absolute, command_job, run_task
from megamix.studies.slurm.resources import Resources
from megamix.studies.slurm.submit import submit_or_show
from megamix.studies.tasks import Task, is_newer, run_tasks
from megamix.training.checkpoints import store
from megamix.training.checkpoints.state import RunState, newest_state
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import job_world_size
from megamix.training.plan import make_plan
from megamix.training.records.lines import WeightsLine, read_lines
from megamix.training.records.recorded_run import WEIGHTS as LEDGER
from megamix.training.reference.cache import cache_key, samples_read
from megamix.training.reference.run import reference

TaskName = Literal["configs", "reference", "cache", "proxy", "weights", "target"]
NOISY = 0.03
"""A change from step to step above which weights are noise: on the mini-pile eta 1 made 0.094, 0.1 made 0.009."""


def doremi(config_path: Path, overrides: list[str], only: TaskName | None) -> int:
    """Runs all tasks that are not done, or one; returns the exit code.

    Args:
        only: this task alone, of the last round that was begun; ``configs`` writes the configs of the runs.

    Raises:
        MegamixError: anything a user can mend.
    """
    if job_world_size() is not None:
        raise InputError(
            "megamix doremi starts its own ranks. Under torchrun or srun, take the tasks one by one: first, outside of "
            "them, `megamix doremi CONFIG --only configs`; then `megamix train RUN/reference.yaml`, `megamix reference "
            "RUN/reference --out RUN/cache --for RUN/proxy.yaml`, `megamix train RUN/proxy.yaml`; then, outside again, "
            "`megamix doremi CONFIG --only weights`."
        )
    study = read_study(config_path, overrides)
    if only is not None:
        return _run_one(study, only)
    for _, tasks in _rounds(study, None):
        if (code := run_tasks(tasks)) != EXIT_OK:
            return code
    return run_tasks(_target(study, None))


def submit_doremi(
    config_path: Path, overrides: list[str], resources: Resources, *, dry_run: bool = False, check_data: bool = True
) -> str:
    """Submits the tasks of the first round that is not done, and all that follows; returns what to print."""
    study = read_study(config_path, overrides, check_data=check_data)
    command = ("doremi", argument(config_path), *absolute(overrides))
    tasks: list[Task] = []
    target_follows = True
    for number, round_tasks in _rounds(study, resources):
        if number == study.config.rounds:
            job = command_job((*command, "--only", "weights"), resources)
            tasks = [*round_tasks, Task("weights", lambda: _is_saved(study), job=job)]
        elif not all(task.is_done() for task in round_tasks):
            job = command_job((*command, "--slurm", *resources.arguments()), resources)
            tasks = [*round_tasks, Task(_name("weights", number), job=job)]
            target_follows = False
        if tasks:
            break
    target = _target(study, resources)  # last, so that what is wrong with all runs is said of the first
    return submit_or_show(study.run_dir, [*tasks, *(target if target_follows else ())], dry_run=dry_run)


def _rounds(study: DoremiStudy, resources: Resources | None) -> Iterator[tuple[int, list[Task]]]:
    """Each round with its tasks; the next is asked for when those are done. Saves the weights after the last."""
    weights: Weights | None = None
    for number in range(1, study.config.rounds + 1):
        if weights is not None:
            study.write_round(number, weights)
        yield number, _tasks(study, number, resources)
        weights, change = _result(study, number)
        if change < study.config.tolerance:
            break
    assert weights is not None
    _save_weights(study, weights)


def _tasks(study: DoremiStudy, number: int, resources: Resources | None) -> list[Task]:
    """The tasks of a round."""
    folder = study.folder(number)
    cache, proxy = folder / "cache", folder / "proxy.yaml"
    if not study.needs_reference:
        return [run_task(_name("proxy", number), proxy, resources=resources)]
    trained = run_task(_name("reference", number), folder / "reference.yaml", resources=resources)
    job = trained.job
    if job is not None:  # as many ranks as the reference run
        run, out, reader = map(argument, (folder / "reference", cache, proxy))
        job = replace(job, script="reference.sbatch", arguments=(run, "--out", out, "--for", reader))

    def compute() -> int:
        _finished(load_config(RunConfig, folder / "reference.yaml"))
        return reference(folder / "reference", cache, [], proxy)

    losses = Task(_name("cache", number), lambda: _is_computed(folder), compute, job)
    return [trained, losses, run_task(_name("proxy", number), proxy, [cache / LOSSES], resources)]


def _target(study: DoremiStudy, resources: Resources | None) -> list[Task]:
    if study.config.target is None:
        return []
    return [run_task("target", study.run_dir / "target.yaml", [study.run_dir / WEIGHTS], resources)]


def _name(task: str, number: int) -> str:
    return task if number == 1 else f"{task}-{number}"


def _is_computed(folder: Path) -> bool:
    """Whether the reference losses of a round are there, of the reference run's last checkpoint and for its proxy."""
    checkpoint = store.newest(folder / "reference" / "checkpoints")
    if checkpoint is None or not (folder / "cache" / LOSSES).is_file():
        return False
    info = read_info(folder / "cache")
    if info.checkpoint_sha256 != store.describe(checkpoint / store.LISTING, sync=False)["sha256"]:
        return False
    if is_newer(folder / "cache" / LOSSES, [folder / "proxy.yaml"]):
        return True
    plan = make_plan(load_config(RunConfig, folder / "proxy.yaml"), verify=False)
    held = {name: domain.model_copy(update={"blocks": None}) for name, domain in info.domains.items()}
    return held == samples_read(plan).describe(cache_key(plan))


def _run_one(study: DoremiStudy, only: TaskName) -> int:
    rounds = range(1, study.config.rounds + 1)
    number = max((n for n in rounds if (study.folder(n) / "proxy.yaml").is_file()), default=1)
    if only == "target" and study.config.target is None:
        raise InputError(
            f"{study.source}: doremi.target is null, so there is no target run. Set it to {{}} or to keys."
        )
    if only in ("reference", "cache") and not study.needs_reference:
        raise InputError(
            f"{study.source}: the proxy's mixer.reference is given, so there is no task {only}. Remove it."
        )
    if only == "weights":
        _save_weights(study, _result(study, number)[0])
    tasks = _target(study, None) if only == "target" else _tasks(study, number, None)
    wanted = only if only == "target" else _name(only, number)
    return run_tasks([task for task in tasks if task.name == wanted], again=True)


def _result(study: DoremiStudy, number: int) -> tuple[Weights, float]:
    """The weights that a round has found, and the largest difference of one from its reference weight."""
    folder = study.folder(number)
    plan = make_plan(load_config(RunConfig, folder / "reference.yaml"), verify=False)
    before = dict(zip(plan.domain_names, plan.policy.stages.at(0).tolist(), strict=True))
    after = _found(folder)
    rows = [(name, number_text(before[name]), number_text(weight)) for name, weight in after.items()]
    log = get_logger()
    for line in Table(("domain", "reference weight", "DoReMi's weight"), rows).text().splitlines():
        log.info("%s", line)
    change = max(abs(after[name] - before[name]) for name in after)
    log.info("round %d: the largest change of a weight is %.4g", number, change)
    swing = swing_of(folder / "proxy")
    if swing > NOISY:
        log.warning(
            "the proxy's weights changed by %.0f %% of their sum from each step to the next: they follow the noise of single "
            "batches, and the proxy learns one domain at a time. Lower mixer.eta of the proxy run, or take larger batches.",
            100 * swing,
        )
    return after, change


def swing_of(proxy: Path) -> float:
    """The change of DoReMi's weights from one update to the next: total variation distance, mean over the run."""
    lines = read_lines(proxy / LEDGER, WeightsLine)
    names = lines[-1]["domain_names"] if lines else []
    rows = [line.get("loss_weights", line["domain_weights"]) for line in lines if line["domain_names"] == names]
    return 0.0 if len(rows) < 2 else float(np.abs(np.diff(rows, axis=0)).sum(axis=1).mean() / 2)


def _found(folder: Path) -> Weights:
    """The mean weights of a round's proxy run."""
    mixer = _finished(load_config(RunConfig, folder / "proxy.yaml")).mixer
    assert mixer is not None
    return dict(zip(mixer["domains"], mixer["average_weights"], strict=True))


def _finished(config: RunConfig) -> RunState:
    """The state in the last checkpoint of a run; raises InputError if the run is not done."""
    state = newest_state(config.run_dir / "checkpoints")
    if state is None or state.step < config.train.steps:
        raise InputError(
            f"the run {config.run_dir} has taken {0 if state is None else state.step} of its {config.train.steps} "
            "steps. Let it end first: `megamix doremi` without --only, and without train.stop_after."
        )
    return state


def _is_saved(study: DoremiStudy) -> bool:
    """Whether the weights that the last round found are saved."""
    path = study.run_dir / WEIGHTS
    try:
        saved = parse_json(path.read_bytes())
    except (OSError, ValueError):  # not there, or cut off: to be saved again
        return False
    return saved == _found(study.folder(study.config.rounds))


def _save_weights(study: DoremiStudy, weights: Weights) -> None:
    """Writes the weights, unless the file holds them already: it is newer than the target only if they changed."""
    path, content = study.run_dir / WEIGHTS, (json.dumps(weights, indent=1, ensure_ascii=False) + "\n").encode()
    if not path.is_file() or path.read_bytes() != content:
        replace_file(path, content)
    get_logger().info("the weights are in %s", path)
