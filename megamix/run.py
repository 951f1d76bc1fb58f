"""``megamix train``: checks the plan, then is a rank of the job or starts the ranks."""

from __future__ import annotations

from pathlib import Path

import yaml

from megamix.checkpoint import read_state
from megamix.config import load_config
from megamix.errors import EXIT_OK, InputError
from megamix.launch import job_world_size, run_local
from megamix.log import get_logger
from megamix.plan import Plan, make_plan
from megamix.resume import check_same_run, find_checkpoint, fingerprints
from megamix.run_config import RunConfig
from megamix.sinks import check_sinks


def train(config_path: Path, overrides: list[str]) -> int:
    """Runs the training job that a config describes; returns its exit code.

    Raises:
        MegamixError: anything a user can mend; the command line prints it.
    """
    config = load_config(RunConfig, config_path, overrides)
    check_sinks(config)
    world_size = job_world_size()
    plan = make_plan(config, world_size)
    if world_size is not None:
        _run_rank(plan)
        return EXIT_OK
    log = get_logger()
    for warning in plan.warnings():
        log.warning("%s", warning)
    if _steps_done(plan) >= config.train.steps:
        log.info(
            "%s is done: all its %d steps are. To train anew, choose another run_dir.",
            config.run_dir,
            config.train.steps,
        )
        return EXIT_OK
    _prepare_run_dir(config)
    return run_local(["train", str(config_path), *overrides], plan.world_size, config.engine.threads)


def _run_rank(plan: Plan) -> None:
    import torch.distributed as dist

    from megamix.engines.deepspeed import start_distributed
    from megamix.train import Trainer

    start_distributed()
    if dist.get_rank() == 0:
        _steps_done(plan)
        _prepare_run_dir(plan.config)
    Trainer(plan).run()
    dist.barrier()
    dist.destroy_process_group()


def _steps_done(plan: Plan) -> int:
    """Steps in the checkpoint that the run will continue from; 0 without one.

    Raises:
        ResumeRefused: there is one, and it is not of this run.
    """
    path = find_checkpoint(plan.config)
    if path is None:
        return 0
    state = read_state(path)
    check_same_run(state["fingerprints"], fingerprints(plan), plan.config.checkpoint.accept_changed, path)
    return int(state["step"])


def _prepare_run_dir(config: RunConfig) -> None:
    """Makes the run's directory and writes ``config.resolved.yaml``, the whole config with its defaults.

    Raises:
        InputError: it cannot be written.
    """
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (config.run_dir / "config.resolved.yaml").write_text(resolved, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot write to run_dir {config.run_dir}: {error.strerror or error}. Choose another."
        ) from error
