"""``megamix swarm all``: from one config to a mixture that was proposed by a swarm, and to a model trained with it.

    DIR/swarm.yaml          the config, resolved
    DIR/priors.json         tokens and shares of the domains
    DIR/update.json         of an update: what of the old mixture is frozen
    DIR/swarm.csv           the mixtures of the members
    DIR/members/NNNN.yaml   a run's config for each
    DIR/runs/NNNN, logs     these runs, and what they said
    DIR/ratios.csv, metrics.csv    what they were trained on, and what came of it
    DIR/fit.json, mixture.json     the law, and the mixture that follows
    DIR/target              a run with that mixture, where one is asked for

DIR is the config's run_dir. A step is taken where its result is not there, or what that follows from has changed.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megamix.core.config import Config, read_yaml, validate
from megamix.core.errors import EXIT_OK, InputError
from megamix.core.files import replace_file
from megamix.core.log import get_logger
from megamix.core.text import ABSENT, Report, Table, number, plural
from megamix.mixing.weight_files import SWARM_MIXTURE
from megamix.studies.swarm.fit.fitted import JSON as FIT
from megamix.studies.swarm.fit.tables import write_ratios
from megamix.studies.swarm.generate.levels import Floats
from megamix.studies.swarm.generate.mixtures import sample
from megamix.studies.swarm.job import Job, read_job, tokens_of, write_config
from megamix.studies.swarm.priors import FILE as PRIORS
from megamix.studies.swarm.priors import Priors, priors_of
from megamix.studies.swarm.propose.config import UpdateConfig
from megamix.studies.swarm.propose.proposal import read_proposal
from megamix.studies.swarm.propose.propose import propose_settled
from megamix.studies.swarm.propose.question import read_amounts
from megamix.studies.swarm.propose.update import EXISTING, UPDATE_FILE, UpdatePlan, default_members, plan_update
from megamix.studies.swarm.run.collect import METRICS, RATIOS, collect
from megamix.studies.swarm.run.local_pool import LOGS, default_at_once, run_members
from megamix.studies.swarm.run.members import FOLDER, members_of, write_members
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import job_world_size
from megamix.training.job.lock import RunLock
from megamix.training.run import train

Step = Literal["priors", "generate", "run", "collect", "fit", "propose", "target"]
MIXTURES = "swarm.csv"
STAMPS = "steps.json"
"""Hashes of fit.json and mixture.json, and of what they were made from."""


def swarm(config_path: Path, overrides: list[str], only: Step | None = None, *, at_once: int | None = None) -> int:
    """Takes all steps that are not done, or one; returns the exit code.

    Args:
        only: this step alone.
        at_once: members that run at a time, in the place of ``swarm.run.at_once``.

    Raises:
        MegamixError: anything a user can mend.
    """
    if job_world_size() is not None:
        raise InputError(
            "megamix swarm starts its own ranks. Outside of torchrun and srun, take `megamix swarm generate CONFIG`; then run "
            "the members (`megamix swarm run CONFIG --slurm`); then `megamix swarm all CONFIG` for what follows."
        )
    job = read_job(config_path, overrides)
    with RunLock(job.run_dir):
        if only is None:
            _tell_cost(job)
        steps: dict[Step, Callable[[], int]] = {
            "priors": lambda: _priors(job),
            "generate": lambda: _generate(job),
            "run": lambda: _run(job, at_once),
            "collect": lambda: _collect(job),
            "fit": lambda: _fit(job, again=only == "fit"),
            "propose": lambda: _propose(job, again=only == "propose"),
            "target": lambda: _target(job),
        }
        for step in _wanted(job) if only is None else ("priors", "generate") if only == "generate" else (only,):
            code = steps[step]()
            if code != EXIT_OK:
                return code
    return EXIT_OK


def _wanted(job: Job) -> list[Step]:
    """The steps of a job, in their order."""
    settled = job.update is not None and job.update.settled
    found: list[Step] = ["priors", "propose"] if settled else ["priors", "generate", "run", "collect", "fit", "propose"]
    return found if job.target is None else [*found, "target"]


def _priors(job: Job) -> int:
    """Writes the shares that a proposal is compared with, of all real domains, and what an update freezes."""
    priors = Priors(job.token_counts, job.centre)
    priors.write(job.run_dir / PRIORS)
    if job.update is None:
        (job.run_dir / UPDATE_FILE).unlink(missing_ok=True)
    else:
        job.update.save(job.run_dir)
    for line in priors.table().text().splitlines():
        get_logger().info("%s", line)
    return EXIT_OK


def _generate(job: Job) -> int:
    if not job.num_members:
        raise InputError(
            f"{job.source}: this update leaves no weight to be found, so there is no swarm. `megamix swarm all` writes its mixture."
        )
    path = job.steps.generate.existing_mix_file
    existing = None if path is None else _read_mixtures(path, job.domains)
    weights = sample(job.sampler, job.num_members, existing)
    real = weights if job.update is None else job.update.expand(weights)
    write_members(job.run_dir, job.proxy, tuple(job.token_counts), real, f"{job.source}, proxy run")
    names = [f"{number:04}" for number in range(len(weights))]
    write_ratios(job.run_dir / MIXTURES, names, job.domains, weights)
    get_logger().info("the configs of %d members are in %s", len(weights), job.run_dir / FOLDER)
    return EXIT_OK


def _run(job: Job, at_once: int | None) -> int:
    members = members_of(job.run_dir / FOLDER, [])
    number = at_once or job.steps.run.at_once or default_at_once(members[0])
    return run_members(members, [], number, job.run_dir / LOGS)


def _collect(job: Job) -> int:
    collect(job.run_dir / FOLDER, [], job.steps.metrics)
    return EXIT_OK


def _fit(job: Job, *, again: bool) -> int:
    """Fits the law, unless tables and options are those of the fit that is there."""
    from megamix.studies.swarm.fit.fit import fit, report

    tables = job.run_dir / RATIOS, job.run_dir / METRICS
    made_from = _hash(job.steps.fit, *tables)
    if not again and _is_made(job, FIT, made_from):
        get_logger().info("the fit in %s is that of these runs", job.run_dir)
        return EXIT_OK
    report(fit(*tables, job.run_dir, job.steps.fit), job.run_dir).show()
    _stamp(job, FIT, made_from)
    return EXIT_OK


def _propose(job: Job, *, again: bool) -> int:
    """Proposes a mixture, unless all that it follows from is as it was."""
    from megamix.studies.swarm.propose.propose import OPTIONS_FILE, propose_in, propose_settled
    from megamix.studies.swarm.propose.report import report

    options = job.steps.propose
    if options.target_tokens is None and job.target_tokens is not None:
        options = options.model_copy(update={"target_tokens": float(job.target_tokens)})
    made_from = _hash(options, *(job.run_dir / name for name in (FIT, PRIORS, UPDATE_FILE)))
    if not again and _is_made(job, SWARM_MIXTURE, made_from):
        get_logger().info("the mixture in %s is that of this fit", job.run_dir)
        return EXIT_OK
    if job.update is not None and job.update.settled:
        _, path = propose_settled(job.run_dir, job.update)
        get_logger().info("nothing is to be found: the old weights, scaled to sum 1, are in %s", path)
    else:
        # What `megamix swarm propose DIR` goes by, too.
        content = json.dumps(options.model_dump(mode="json", exclude_defaults=True), indent=1)
        replace_file(job.run_dir / OPTIONS_FILE, (content + "\n").encode())
        report(*propose_in(job.run_dir, options)).show()
    _stamp(job, SWARM_MIXTURE, made_from)
    return EXIT_OK


def _hash(config: Config, *paths: Path) -> str:
    """Of what a result follows from."""
    found = hashlib.sha256(config.model_dump_json().encode())
    for path in paths:
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def _is_made(job: Job, result: str, made_from: str) -> bool:
    """Whether a result is there, of this, and as it was written."""
    path = job.run_dir / result
    return path.is_file() and _stamps(job).get(result) == [made_from, _digest(path)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _stamp(job: Job, result: str, made_from: str) -> None:
    content = {**_stamps(job), result: [made_from, _digest(job.run_dir / result)]}
    replace_file(job.run_dir / STAMPS, (json.dumps(content, indent=1) + "\n").encode())


def _stamps(job: Job) -> dict[str, list[str]]:
    path = job.run_dir / STAMPS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _target(job: Job) -> int:
    if job.target is None:
        raise InputError(f"{job.source}: swarm.target is null, so there is no target run. Set it to {{}} or to keys.")
    config = validate(RunConfig, job.target, f"{job.source}, target run")
    path = job.run_dir / "target.yaml"
    write_config(path, config.model_dump(mode="json"))
    return train(path, [])


def _tell_cost(job: Job) -> None:
    """Says what will be run before anything is."""

    log, tokens, number = get_logger(), tokens_of(job.plan.config), job.num_members
    log.info("%d proxy runs of %s tokens, %s together", number, f"{tokens:,}", f"{number * tokens:,}")
    if job.update is not None:
        for line in cost(job.update, tokens, number).text().splitlines():
            log.info("%s", line)
    if job.target_tokens is not None:
        log.info("and a target run of %s tokens", f"{job.target_tokens:,}")


def _read_mixtures(path: Path, domains: tuple[str, ...]) -> Floats:
    """float64 [rows, K]: the rows of a ratios.csv that have all their weight on these domains.

    Raises:
        InputError: it cannot be read, or has no such domains.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[float(row.get(name) or 0.0) for name in domains] for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise InputError(f"swarm.generate.existing_mix_file: cannot read {path}: {error}. Check the path.") from error
    return np.array([row for row in rows if abs(sum(row) - 1) < 1e-3], np.float64).reshape(-1, len(domains))


def read_update(path: Path, data: Path, domains: Sequence[str] | None = None) -> UpdatePlan:
    """Works out the update in a YAML file.

    Args:
        path: keys of `UpdateConfig`.
        data: a data set (its manifest or folder), or a file of priors with token counts.
        domains: some of the data set's, in this order; None: all.

    Raises:
        InputError: either cannot be read, or they do not fit together or the old mixture (`plan_update`).
    """
    update = validate(UpdateConfig, read_yaml(path), str(path))
    if data.is_dir() or data.name == "manifest.json":
        tokens = {name: float(count) for name, count in priors_of(data, domains).token_counts.items()}
    elif domains is not None:
        raise InputError(f"domains are chosen from a data set, and {data} is none. Name its folder, or leave them out.")
    else:
        tokens = read_amounts(data).tokens
        if not tokens:
            raise InputError(f"{data} has no token_counts. Write it with `megamix swarm priors`, or name the data set.")
    return plan_update(update, read_proposal(update.previous), tokens)


def start_update(plan: UpdatePlan, out: Path) -> Path | None:
    """Writes OUT/update.json, and OUT/mixture.json where nothing is to be found; its path then.

    Raises:
        InputError: they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        plan.save(out)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}. Choose another directory.") from error
    return propose_settled(out, plan)[1] if plan.settled else None


def report(plan: UpdatePlan, tokens_per_run: float | None = None) -> Report:
    """The domains to find weights for, what is frozen, and the cost."""
    rows = [
        (name, number(plan.prior[name]), plural(len(plan.inner), "domain") if name == EXISTING else "free")
        for name in plan.virtual
    ]
    parts: list[str | Table] = [Table(("domain", "prior", "stands for"), rows, left=frozenset(["stands for"]))]
    if plan.inner:
        parts.append(Table((f"in {EXISTING}", "ratio"), [(name, number(ratio)) for name, ratio in plan.inner.items()]))
    return Report([*parts, cost(plan, tokens_per_run)])


def cost(plan: UpdatePlan, tokens_per_run: float | None = None, members: int | None = None) -> Table:
    """Proxy runs and tokens of the update, and of finding all weights anew.

    Args:
        members: runs of the update, if not by `default_members`.
    """
    update = default_members(len(plan.virtual)) if members is None or plan.settled else members
    full = default_members(len(plan.domains))

    def row(what: str, domains: int, runs: int) -> tuple[str, ...]:
        tokens = ABSENT if tokens_per_run is None else f"{runs * tokens_per_run:,.0f}"
        return what, str(domains), str(runs), tokens, f"{runs / full:.0%}" if full else ABSENT

    rows = [
        row(f"this update (reuse: {plan.reuse})", len(plan.virtual), update),
        row("full recomputation", len(plan.domains), full),
    ]
    return Table(("", "domains to weigh", "proxy runs", "tokens", "of the full cost"), rows)
