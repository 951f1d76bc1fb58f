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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from megamix.config import Config, apply_overrides, merge, read_yaml, validate
from megamix.errors import EXIT_OK, InputError
from megamix.files import replace_file
from megamix.launch import job_world_size
from megamix.log import get_logger
from megamix.mixers import normalise_weights
from megamix.plan import Plan, make_plan
from megamix.run import train
from megamix.run_config import RunConfig
from megamix.run_lock import RunLock
from megamix.swarm.collect import CONFIG, METRICS, RATIOS, collect
from megamix.swarm.generate import Sampler, sample
from megamix.swarm.job_config import SwarmSteps
from megamix.swarm.members import FOLDER, members_of, write_members
from megamix.swarm.priors import FILE as PRIORS
from megamix.swarm.priors import Priors
from megamix.swarm.proposal_file import read_proposal
from megamix.swarm.question import read_amounts
from megamix.swarm.reuse import UPDATE_FILE, UpdatePlan, default_members, plan_update
from megamix.swarm.run import LOGS, default_at_once, run_members
from megamix.swarm.sampler import Floats
from megamix.swarm.tables import write_ratios

Step = Literal["priors", "generate", "run", "collect", "fit", "propose", "target"]
MIXTURES = "swarm.csv"
STAMPS = "steps.json"
"""What fit and mixture were made from, as hashes."""
SETTLED = {"proxy": ("run_dir", "mixer", "mixture"), "target": ("run_dir", "mixture")}
"""Keys of the runs that are not for a config to say."""


@dataclass(frozen=True)
class Job:
    """What a config asks for.

    Attributes:
        base: the run's config without the key ``swarm``, not validated.
        source: where it came from, for messages.
    """

    base: dict[str, Any]
    steps: SwarmSteps
    run_dir: Path
    source: str

    @cached_property
    def proxy(self) -> dict[str, Any]:
        """What the configs of all members have in common."""
        shared = merge(self.base, self.steps.proxy)
        return {**shared, "mixture": "natural", "mixer": {"name": "static"}}

    @cached_property
    def plan(self) -> Plan:
        """That of a proxy, with another mixture."""
        return make_plan(validate(RunConfig, self.proxy, f"{self.source}, proxy run"))

    @cached_property
    def target(self) -> dict[str, Any] | None:
        """The config of the target run; None where there is none."""
        if self.steps.target is None:
            return None
        run = merge({**self.base, "mixer": {"name": "static"}}, self.steps.target)
        mixer = self.steps.target.get("mixer", {"name": "static"})
        return {
            **run,
            "mixer": mixer,
            "mixture": {"from_swarm": str(self.run_dir)},
            "run_dir": str(self.run_dir / "target"),
        }

    @cached_property
    def target_tokens(self) -> int | None:
        """Tokens of the target run."""
        if self.target is None:
            return None
        config = validate(RunConfig, self.target, f"{self.source}, target run")
        return tokens_of(config)

    @cached_property
    def update(self) -> UpdatePlan | None:
        """What becomes of the mixture that the job brings up to date; None where it makes a new one."""
        asked = self.steps.update
        return None if asked is None else plan_update(asked, read_proposal(asked.previous), self.token_counts)

    @cached_property
    def token_counts(self) -> dict[str, int]:
        """{domain: training tokens}."""
        return {entry.name: entry.train.tokens for entry in self.plan.entries}

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The K domains whose weights are to be found: of an update the virtual ones."""
        return tuple(self.token_counts) if self.update is None else self.update.virtual

    @cached_property
    def sampler(self) -> Sampler:
        """What draws the members."""
        generate = self.steps.generate
        tokens = {name: float(count) for name, count in self.token_counts.items()}
        bounds = tokens if self.update is None else self.update.caps(tokens)
        of_run: dict[object, float | None] = {"member": tokens_of(self.plan.config), "target": self.target_tokens}
        repeated = of_run.get(generate.repetition_tokens, generate.repetition_tokens)
        if repeated is None:
            raise InputError(
                f"{self.source}: swarm.generate.repetition_tokens is target, but there is no target run. Set swarm.target, or "
                "give a number of tokens."
            )
        return Sampler(self.domains, self._prior(), generate, bounds, float(repeated))

    @cached_property
    def num_members(self) -> int:
        """How many mixtures are to be tried."""
        return self.steps.generate.members or default_members(len(self.domains))

    def _prior(self) -> Floats:
        """float64 [K]."""
        given = self.steps.priors
        if given == "natural":
            shares = self.token_counts if self.update is None else self.update.prior
            return normalise_weights(shares, self.domains, "the natural shares")
        shares = read_amounts(given).shares if isinstance(given, Path) else given
        source = f"{self.source}: swarm.priors{f', file {given}' if isinstance(given, Path) else ''}"
        if self.update is not None and shares.keys() == set(self.update.domains):
            shares = self.update.contract_prior(shares)
        return normalise_weights(shares, self.domains, source)


def tokens_of(config: RunConfig) -> int:
    """Tokens that a run trains on."""
    return config.train.steps * config.train.global_batch * config.data.seq_length


def read_job(config_path: Path, overrides: list[str]) -> Job:
    """Reads a config and checks what it makes of the steps before the first of them begins; writes DIR/swarm.yaml.

    Raises:
        InputError: a key or value that cannot be used, named with its step.
    """
    data = apply_overrides(read_yaml(config_path), overrides)
    section = data.pop("swarm", None)
    source = str(config_path)
    steps = validate(SwarmSteps, {} if section is None else section, f"{source}, swarm")
    for step, keys in SETTLED.items():
        for key in keys:
            if key in (getattr(steps, step) or {}):
                raise InputError(
                    f"{source}: swarm.{step}.{key} cannot be set: a swarm settles the mixtures of its runs, where they are, and "
                    "that the proxies' mixer is static. Remove the key."
                )
    run_dir = validate(RunConfig, {**data, "mixture": "natural"}, source).run_dir
    job = Job(data, steps, run_dir, source)
    job.sampler.check()
    content = {**job.base, "swarm": steps.model_dump(mode="json")}
    _write(run_dir / CONFIG, yaml.safe_dump(content, sort_keys=False).encode())
    return job


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
        if only is not None:
            return steps[only]()
        needless: set[Step] = {"generate", "run", "collect", "fit"} if _is_settled(job) else set()
        needless |= {"target"} if job.target is None else set()
        for step, take in steps.items():
            code = EXIT_OK if step in needless else take()
            if code != EXIT_OK:
                return code
    return EXIT_OK


def _is_settled(job: Job) -> bool:
    return job.update is not None and job.update.settled


def _priors(job: Job) -> int:
    """Writes the shares that a proposal is compared with, of all real domains."""
    centre = dict(zip(job.domains, job.sampler.centre.tolist(), strict=True))
    if job.update is not None:
        shares = job.update.expand(job.sampler.centre)
        centre = dict(zip(job.update.domains, shares.tolist(), strict=True))
    priors = Priors(job.token_counts, centre)
    priors.write(job.run_dir / PRIORS)
    for line in priors.table().text().splitlines():
        get_logger().info("%s", line)
    return EXIT_OK


def _generate(job: Job) -> int:
    if job.update is None:
        (job.run_dir / UPDATE_FILE).unlink(missing_ok=True)
    else:
        job.update.save(job.run_dir)
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
    from megamix.swarm.fit import fit

    made_from = _hash(job.steps.fit, job.run_dir / RATIOS, job.run_dir / METRICS)
    if again or not _is_made(job, "fit", made_from):
        fit(job.run_dir / RATIOS, job.run_dir / METRICS, job.run_dir, job.steps.fit)
        _stamp(job, "fit", made_from)
    return EXIT_OK


def _propose(job: Job, *, again: bool) -> int:
    raise NotImplementedError


def _hash(config: Config, *paths: Path) -> str:
    """Of what a result follows from."""
    found = hashlib.sha256(config.model_dump_json().encode())
    for path in paths:
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def _is_made(job: Job, step: str, made_from: str) -> bool:
    path = job.run_dir / STAMPS
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get(step) == made_from


def _stamp(job: Job, step: str, made_from: str) -> None:
    path = job.run_dir / STAMPS
    stamps = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    replace_file(path, (json.dumps({**stamps, step: made_from}, indent=1) + "\n").encode())


def _target(job: Job) -> int:
    if job.target is None:
        raise InputError(f"{job.source}: swarm.target is null, so there is no target run. Set it to {{}} or to keys.")
    config = validate(RunConfig, job.target, f"{job.source}, target run")
    path = job.run_dir / "target.yaml"
    _write(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    return train(path, [])


def _tell_cost(job: Job) -> None:
    """Says what will be run before anything is."""
    log, tokens, number = get_logger(), tokens_of(job.plan.config), job.num_members
    if _is_settled(job):
        number = 0
    log.info("%d proxy runs of %s tokens, %s together", number, f"{tokens:,}", f"{number * tokens:,}")
    if job.update is not None:
        full = job.steps.generate.members or default_members(len(job.token_counts))
        log.info(
            "%d domains are free; to find the weights of all %d anew would take %d runs",
            len(job.domains),
            len(job.token_counts),
            full,
        )
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


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}. Choose another run_dir.") from error
