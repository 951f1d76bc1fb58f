"""``megamix train``: checks the plan, then runs as a rank of the job or starts the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megamix.core.config import load_config
from megamix.core.errors import EXIT_OK
from megamix.core.files import replace_file, writing
from megamix.core.log import get_logger
from megamix.core.packages import check_extra
from megamix.core.paths import argument
from megamix.data.tokens.stream import files_line
from megamix.engines.config import MegatronConfig
from megamix.training.alerts import check_alerts
from megamix.training.checkpoints import store
from megamix.training.checkpoints.resume import Resumed, agree_on_checkpoint, begun, open_checkpoint
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import data_checks, job_world_size, run_local
from megamix.training.job.lock import RunLock
from megamix.training.job.rank import run_rank, watched
from megamix.training.job.signals import heed_signals
from megamix.training.plan import Plan, make_plan
from megamix.training.records.sinks import check_sinks
from megamix.training.reference.cache import open_reference

_MANY_FILES = 256
"""Token files from which on a run says how many of them are open at a time."""


def train(config_path: Path, overrides: list[str]) -> int:
    """Runs the training job that a config describes; returns its exit code.

    Raises:
        MegamixError: any error that a user can fix; the command line prints it.
    """
    world_size = job_world_size()
    if world_size is not None:
        heed_signals()
    config = load_config(RunConfig, config_path, overrides)
    check_extra(config.engine.name, f"engine {config.engine.name}")
    check_sinks(config)
    check_alerts(config.alerts)
    if world_size is not None:
        plan = make_plan(config, world_size, begun=begun, **data_checks(world_size))
        run_rank(config.engine, lambda: train_rank(plan))
        return EXIT_OK
    plan = make_plan(config, begun=begun)
    log = get_logger()
    for warning in plan.warnings():
        log.warning("%s", warning)
    with RunLock(config.run_dir) as lock:
        resumed = open_checkpoint(plan)
        if resumed is not None:
            plan = resumed.adopted(plan)
            config = plan.config
        _open_sources(plan, resumed)
        if sum(domain.num_files for domain in plan.domains) > _MANY_FILES:
            log.info("token files: %s", files_line(plan.domains))
        if resumed is not None and resumed.step >= config.train.steps and not _needs_conversion(config, resumed):
            log.info(
                "%s is done: all its %d steps are. To train anew, choose another run_dir.",
                config.run_dir,
                config.train.steps,
            )
            return EXIT_OK
        _prepare_run_dir(config)
        arguments = ["train", argument(config_path), *overrides]
        return run_local(arguments, plan.world_size, config.engine.threads, lock.files, **lock.environment)


def train_rank(plan: Plan) -> None:
    """One rank of a run; the process group exists.

    Rank 0 checks everything first; an error ends the job before the others begin.

    Raises:
        Preempted: a rank was asked to stop; the run is saved.
        MegamixError: any error that a user can fix.
    """
    import torch.distributed as dist

    from megamix.training.trainer import Trainer

    is_main = dist.get_rank() == 0
    with watched(plan.config.watchdog, plan.config.run_dir) as watchdog:
        watchdog.progress(0, "loading")
        group: Any = dist.new_group(backend="gloo")
        resumed = agree_on_checkpoint(plan, group)
        plan = plan if resumed is None else resumed.adopted(plan)
        if is_main:
            _open_sources(plan, resumed)
            _prepare_run_dir(plan.config)
        # Nobody builds a model for a run that rank 0 refuses.
        dist.barrier(group)
        Trainer(plan, resumed, watchdog).run()


def _open_sources(plan: Plan, resumed: Resumed | None) -> None:
    """Checks the sources of a run beside its data, before its ranks start.

    A resumed run has its weights; the folder of the pretrained model may be gone.

    Raises:
        InputError: initial weights or reference losses that are not there or not of this run.
    """
    if resumed is None:
        plan.pretrained()
    open_reference(plan)


def _needs_conversion(config: RunConfig, resumed: Resumed) -> bool:
    """Whether the last checkpoint of a run that is done is of another format than ``engine.checkpoint_format``."""
    own = isinstance(config.engine, MegatronConfig) and config.engine.checkpoint_format == "dist"
    return own != (store.kind(resumed.path) != store.LAYERS)


def _prepare_run_dir(config: RunConfig) -> None:
    """Makes the run's directory and writes ``config.resolved.yaml``, the whole config with its defaults.

    Raises:
        InputError: it cannot be written.
    """
    with writing(f"to run_dir {config.run_dir}", "Choose another."):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        replace_file(config.run_dir / "config.resolved.yaml", resolved.encode())
