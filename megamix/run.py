"""``megamix train``: checks the plan, then is a rank of the job or starts the ranks."""

from __future__ import annotations

from pathlib import Path

from megamix.checkpoint import read_state
from megamix.config import load_config
from megamix.errors import EXIT_OK
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
    if world_size is None:
        return _start(plan, config_path, overrides)
    _run_rank(plan)
    return EXIT_OK


def _start(plan: Plan, config_path: Path, overrides: list[str]) -> int:
    """Says what will be refused before any rank is started, then starts them."""
    log = get_logger()
    for warning in plan.warnings():
        log.warning("%s", warning)
    path = find_checkpoint(plan.config)
    if path is not None:
        state = read_state(path)
        check_same_run(state["fingerprints"], fingerprints(plan), plan.config.checkpoint.accept_changed, path)
        if state["step"] >= plan.config.train.steps:
            log.info(
                "%s is done: %s is its last step. To train anew, choose another run_dir.", plan.config.run_dir, path
            )
            return EXIT_OK
    return run_local(["train", str(config_path), *overrides], plan.world_size, plan.config.engine.threads)


def _run_rank(plan: Plan) -> None:
    import torch.distributed as dist

    from megamix.engines.deepspeed import start_distributed
    from megamix.train import Trainer

    start_distributed()
    Trainer(plan).run()
    dist.barrier()
    dist.destroy_process_group()
