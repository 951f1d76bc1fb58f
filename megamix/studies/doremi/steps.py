"""``megamix doremi``: from one config to DoReMi's weights, and on to a model trained with them.

    RUN/reference   a run with the reference weights (``mixture``)
    RUN/cache       its loss of every label that the proxy reads
    RUN/proxy       a run whose weights rise where its loss is above the reference's
    RUN/weights.json   the mean of those weights over the proxy's steps, also as ``mixture: {file: RUN/weights.json}``
    RUN/target      a run with these weights, where one is asked for

Source: Xie et al., arXiv 2305.10429. Iterated rounds are theirs too: the result becomes the reference weights of the
next round, in RUN/round_N, until no weight changes by more than a tolerance.

Each step is a run, or a job, like those of ``megamix train`` and ``megamix reference``, from a config that is written
to RUN/STEP.yaml: done ones are passed over, an interrupted one goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from megamix.core.config import apply_overrides, merge, read_yaml, validate
from megamix.core.errors import EXIT_OK, InputError
from megamix.core.files import read_json_lines, replace_file
from megamix.core.log import get_logger
from megamix.core.text import Table
from megamix.core.text import number as number_text
from megamix.studies.doremi.config import DoremiSteps
from megamix.training.checkpoints import store
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import job_world_size
from megamix.training.plan import make_plan
from megamix.training.records.recorded_run import WEIGHTS as LEDGER
from megamix.training.reference.run import check_same_data, reference
from megamix.training.run import train

Step = Literal["configs", "reference", "cache", "proxy", "weights", "target"]
WEIGHTS = "weights.json"
Weights = dict[str, float]
NOISY = 0.03
"""A change from step to step above which weights are noise: on the mini-pile eta 1 made 0.094, 0.1 made 0.009."""


@dataclass(frozen=True)
class Job:
    """What a config asks for.

    Attributes:
        base: the run's config without the key ``doremi``, not validated.
        source: where it came from, for messages.
    """

    base: dict[str, Any]
    steps: DoremiSteps
    run_dir: Path
    source: str

    @property
    def needs_reference(self) -> bool:
        """Whether the reference losses are to be made: the proxy's config names none, and does not do without."""
        return "reference" not in self._mixer_keys()

    def folder(self, number: int) -> Path:
        """Where the runs of a round are; rounds count from 1."""
        return self.run_dir if number == 1 else self.run_dir / f"round_{number}"

    def reference_run(self, number: int, weights: Weights | None) -> dict[str, Any]:
        """The reference run of a round; ``weights`` are the result of the round before."""
        changes = {"mixer": {"name": "static"}, "run_dir": str(self.folder(number) / "reference")}
        if weights is not None:
            changes["mixture"] = weights
        return _with(_with(self.base, self.steps.reference), changes)

    def proxy_run(self, number: int) -> dict[str, Any]:
        """The proxy run of a round."""
        folder = self.folder(number)
        mixer = {"name": "doremi", "reference": str(folder / "cache"), **self._mixer_keys()}
        changes = {"mixer": mixer, "run_dir": str(folder / "proxy")}
        return _with(_with(self.base, {"mixture": "uniform", **self.steps.proxy}), changes)

    def target_run(self) -> dict[str, Any]:
        """The target run."""
        changes = {"mixture": {"file": str(self.run_dir / WEIGHTS)}, "run_dir": str(self.run_dir / "target")}
        own = {"mixer": {"name": "static"}, **(self.steps.target or {})}
        return _with(_with(self.base, own), changes)

    def _mixer_keys(self) -> dict[str, Any]:
        """Those of the base, where its mixer is doremi, under those of the proxy."""
        base, proxy = self.base.get("mixer"), self.steps.proxy.get("mixer", {})
        if not isinstance(proxy, dict) or proxy.get("name", "doremi") != "doremi":
            raise InputError(
                f"{self.source}: the proxy run's mixer is {proxy!r}, expected keys of doremi, for example {{eta: 1.0}}."
            )
        return {**(base if isinstance(base, dict) and base.get("name") == "doremi" else {}), **proxy}


def doremi(config_path: Path, overrides: list[str], only: Step | None) -> int:
    """Takes all steps that are not done, or one; returns the exit code.

    Args:
        only: this step alone, of the last round that was begun; ``configs`` writes the configs of the runs.

    Raises:
        MegamixError: anything a user can mend.
    """
    if job_world_size() is not None:
        raise InputError(
            "megamix doremi starts its own ranks. Under torchrun or srun, take the steps one by one: first, outside of "
            "them, `megamix doremi CONFIG --only configs`; then `megamix train RUN/reference.yaml`, `megamix reference "
            "RUN/reference --out RUN/cache --for RUN/proxy.yaml`, `megamix train RUN/proxy.yaml`; then, outside again, "
            "`megamix doremi CONFIG --only weights`."
        )
    job = read_job(config_path, overrides)
    if only is not None:
        return _one_step(job, only)
    weights: Weights | None = None
    for number in range(1, job.steps.rounds + 1):
        if weights is not None:
            _write_round(job, number, weights)
        for step in ("reference", "cache", "proxy") if job.needs_reference else ("proxy",):
            code = _run_step(job, number, step)
            if code != EXIT_OK:
                return code
        weights, change = _result(job, number)
        if change < job.steps.tolerance:
            break
    assert weights is not None
    _save_weights(job, weights)
    return EXIT_OK if job.steps.target is None else _run_step(job, 1, "target")


def read_job(config_path: Path, overrides: list[str]) -> Job:
    """Reads a config, checks what it makes of the steps before the first of them begins, and writes their configs.

    Raises:
        InputError: a key or value that cannot be used, named with its step; a reference run of other data.
    """
    data = apply_overrides(read_yaml(config_path), overrides)
    section = data.pop("doremi", None)
    steps = validate(DoremiSteps, {} if section is None else section, f"{config_path}, doremi")
    _refuse_settled(steps, str(config_path))
    job = Job(data, steps, validate(RunConfig, data, str(config_path)).run_dir, str(config_path))
    _write_round(job, 1, None)
    proxy = make_plan(_load(job.run_dir / "proxy.yaml"))
    if job.needs_reference:
        check_same_data(proxy, make_plan(_load(job.run_dir / "reference.yaml"), verify=False), "the proxy run")
    if steps.target is not None:
        _write(job.run_dir / "target.yaml", job.target_run(), f"{config_path}, target run")
    return job


SETTLED = {"reference": ("run_dir", "mixer"), "proxy": ("run_dir",), "target": ("run_dir", "mixture")}
"""Keys of each step that are not for a config to say."""


def _refuse_settled(steps: DoremiSteps, source: str) -> None:
    """Raises InputError for a key that would have no effect."""
    for step, keys in SETTLED.items():
        for key in keys:
            if key in (getattr(steps, step) or {}):
                raise InputError(
                    f"{source}: doremi.{step}.{key} cannot be set: DoReMi settles the reference run's mixer, the target's "
                    "mixture, and where each run is (RUN/STEP). Remove the key, or train that run with `megamix train`."
                )


def _one_step(job: Job, step: Step) -> int:
    number = max((n for n in range(1, job.steps.rounds + 1) if (job.folder(n) / "proxy.yaml").is_file()), default=1)
    if step == "target" and job.steps.target is None:
        raise InputError(f"{job.source}: doremi.target is null, so there is no target run. Set it to {{}} or to keys.")
    if step in ("reference", "cache") and not job.needs_reference:
        raise InputError(f"{job.source}: the proxy's mixer.reference is given, so there is no {step} step. Remove it.")
    if step == "weights":
        _save_weights(job, _result(job, number)[0])
    if step in ("configs", "weights"):
        return EXIT_OK
    return _run_step(job, 1 if step == "target" else number, step)


def _run_step(job: Job, number: int, step: str) -> int:
    """A run, or the cache, of a round; passed over where it is done."""
    folder = job.folder(number)
    if step != "cache":
        return train(folder / f"{step}.yaml", [])
    _finished(_load(folder / "reference.yaml"))
    return reference(folder / "reference", folder / "cache", [], folder / "proxy.yaml")


def _result(job: Job, number: int) -> tuple[Weights, float]:
    """The weights that a round has found, and by how much one of them differs from the reference weight at most."""
    folder = job.folder(number)
    plan = make_plan(_load(folder / "reference.yaml"), verify=False)
    before = dict(zip(plan.domain_names, plan.policy.stages.at(0).tolist(), strict=True))
    mixer = _finished(_load(folder / "proxy.yaml"))["mixer"]
    after = dict(zip(mixer["domains"], mixer["average_weights"], strict=True))
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
    """By how much the weights that DoReMi moves changed from one update to the next: total variation distance, mean
    over the run."""
    lines = read_json_lines(proxy / LEDGER, ("domain_names", "domain_weights"))
    names = lines[-1]["domain_names"] if lines else []
    rows = [line.get("loss_weights", line["domain_weights"]) for line in lines if line["domain_names"] == names]
    return 0.0 if len(rows) < 2 else float(np.abs(np.diff(rows, axis=0)).sum(axis=1).mean() / 2)


def _finished(config: RunConfig) -> dict[str, Any]:
    """The state in the last checkpoint of a run that is done.

    Raises:
        InputError: it is not.
    """
    state = store.newest_state(config.run_dir / "checkpoints")
    if state is None or state["step"] < config.train.steps:
        raise InputError(
            f"the run {config.run_dir} has taken {0 if state is None else state['step']} of its {config.train.steps} "
            "steps. Let it end first: `megamix doremi` without --only, and without train.stop_after."
        )
    return state


def _save_weights(job: Job, weights: Weights) -> None:
    path = job.run_dir / WEIGHTS
    replace_file(path, (json.dumps(weights, indent=1, ensure_ascii=False) + "\n").encode())
    get_logger().info("the weights are in %s", path)


def _write_round(job: Job, number: int, weights: Weights | None) -> None:
    """Writes the configs of a round's runs."""
    folder = job.folder(number)
    _write(folder / "reference.yaml", job.reference_run(number, weights), f"{job.source}, reference run")
    _write(folder / "proxy.yaml", job.proxy_run(number), f"{job.source}, proxy run")


def _with(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` merged over it, but a mixer or a mixture taken as a whole."""
    whole = {key: value for key, value in changes.items() if key in ("mixer", "mixture")}
    return {**merge(base, changes), **whole}


def _write(path: Path, config: dict[str, Any], source: str) -> None:
    """Writes the whole config of a step, once it is known to be one."""
    content = validate(RunConfig, config, source).model_dump(mode="json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, yaml.safe_dump(content, sort_keys=False).encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}. Choose another run_dir.") from error


def _load(path: Path) -> RunConfig:
    return validate(RunConfig, read_yaml(path), str(path))
