"""``megamix reference``: a trained model's loss of every training label, computed once for DoReMi's proxy.

The job runs like ``train``, on the layout of the reference run's config or on another. Ranks divide the samples, and
each writes its rows. Killed at any moment, the job continues from the last safe point.

Legend: M micro-batches, B samples in one, S tokens in a sample, n samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import load_config
from megamix.core.errors import EXIT_OK, InputError, Preempted
from megamix.core.log import get_logger
from megamix.core.paths import argument
from megamix.data.reference_losses import (
    CacheInfo,
    ReferenceWriter,
    Selection,
    finish,
    open_progress,
    save_progress,
)
from megamix.data.verify_losses import hash_losses
from megamix.training.checkpoints import store
from megamix.training.checkpoints.state import read_state
from megamix.training.checkpoints.store import LISTING, describe
from megamix.training.config import RunConfig
from megamix.training.job.local_ranks import data_checks, job_world_size, run_local
from megamix.training.job.rank import run_rank, watched
from megamix.training.job.signals import asked_to_stop, heed_signals
from megamix.training.plan import Plan, make_plan
from megamix.training.reference.cache import cache_key, samples_read, whole_domains

if TYPE_CHECKING:
    from megamix.data.loader import Batch
    from megamix.engines.base import Engine
    from megamix.training.job.watchdog import Watchdog

Ints = NDArray[np.int64]
SAVE_EVERY = 2**20  # tokens
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class ReferenceJob:
    """Reference job.

    Attributes:
        plan: of the reference run, with the domains whose losses are wanted.
        path: the checkpoint.
        info: the contents of reference.json.
        selection: the windows to compute.
    """

    plan: Plan
    path: Path
    info: CacheInfo
    selection: Selection


def reference(
    source: Path, out: Path, overrides: list[str], proxy: Path | None = None, save_every: int | None = None
) -> int:
    """Computes the reference losses of a model; returns the exit code.

    Args:
        source: a run directory, or a checkpoint in one.
        out: the folder of the losses.
        overrides: ``key=value`` changes to the reference run's config: other data, another layout.
        proxy: the config of the only run that will read the losses; other samples are not computed.
        save_every: tokens a data-parallel rank computes between safe points; None: `SAVE_EVERY`.

    Raises:
        MegamixError: any error that a user can fix.
    """
    world_size = job_world_size()
    if world_size is not None:
        heed_signals()
        job = plan_job(source, overrides, proxy, world_size)
        run_rank(job.plan.config.engine, lambda: fill_cache(job, out, save_every or SAVE_EVERY))
        return EXIT_OK
    job = plan_job(source, overrides, proxy, None)
    if open_progress(out, job.info) is None:
        get_logger().info("%s is done: it holds the losses of %d samples.", out, job.selection.total)
        return EXIT_OK
    arguments = ["reference", argument(source), "--out", argument(out)]
    if save_every is not None:
        arguments += ["--save-every", str(save_every)]
    if proxy is not None:
        arguments += ["--for", argument(proxy)]
    return run_local([*arguments, *overrides], job.plan.world_size, job.plan.config.engine.threads)


def plan_job(source: Path, overrides: list[str], proxy: Path | None, world_size: int | None) -> ReferenceJob:
    """Resolves and checks a reference job.

    Raises:
        InputError: no checkpoint, another model or tokenizer than it has, or a proxy of other data.
        ResumeRefused: the checkpoint is damaged.
    """
    run_dir, path = _find_checkpoint(source)
    config = load_config(RunConfig, run_dir / "config.resolved.yaml", overrides)
    plan = make_plan(config, world_size, **data_checks(world_size))
    state = read_state(path)
    _check_model(state.fingerprints, plan, path)
    if state.step < config.train.steps and job_world_size() is None:
        get_logger().warning("%s is of step %d of %d: the run is not done", path, state.step, config.train.steps)
    key = cache_key(plan)
    selection = whole_domains(plan) if proxy is None else _samples_of(proxy, plan)
    info = CacheInfo(
        seq_length=key.seq_length,
        reset_position_ids=key.reset_position_ids,
        attention=key.attention,
        tokenizer=key.tokenizer,
        domains=selection.describe(key),
        checkpoint=str(path.absolute()),
        checkpoint_sha256=describe(path / LISTING, sync=False)["sha256"],
    )
    return ReferenceJob(plan, path, info, selection)


def _find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(run directory, checkpoint) of a run or a checkpoint of one."""
    if (source / LISTING).is_file():
        source = source.absolute()
        return source.parent.parent, source
    path = store.newest(source / "checkpoints")
    if path is None:
        raise InputError(
            f"{source} is no run with a complete checkpoint. Give the run_dir of a trained reference model, or a "
            "RUN/checkpoints/step_N directory."
        )
    return source, path


def _check_model(saved: dict[str, Any], plan: Plan, path: Path) -> None:
    seen, wanted = saved["model"], plan.model.identity()
    differing = sorted(key for key in seen.keys() | wanted.keys() if seen.get(key) != wanted.get(key))
    if differing:
        key = differing[0]
        raise InputError(
            f"the checkpoint {path} is of a model with {key} {seen.get(key)!r}, the config says {wanted.get(key)!r}. "
            "Leave the model's keys as they were in the run."
        )
    tokenizer = plan.manifest.tokenizer.sha256
    if saved["tokenizer"]["sha256"] != tokenizer:
        raise InputError(
            f"the checkpoint {path} was trained with the tokenizer {saved['tokenizer']['sha256'][:12]}, the data has "
            f"{tokenizer[:12]}. Use data of the same tokenizer."
        )


def check_same_data(proxy: Plan, plan: Plan, where: str) -> None:
    """Checks that reference losses of ``plan``'s data can be read by the run of ``proxy``.

    Raises:
        InputError: they cannot; ``where`` names the proxy.
    """
    wanted, given = cache_key(proxy), cache_key(plan)
    if wanted != given:
        field = next(name for name in type(wanted).model_fields if getattr(wanted, name) != getattr(given, name))
        raise InputError(
            f"{where}: its data is not the reference run's, {field} differs. Give both the same data.manifest, "
            "data.domains, data.seq_length, data.reset_position_ids and data.attention."
        )


def _samples_of(proxy: Path, plan: Plan) -> Selection:
    """The samples of the plan's data that the run of ``proxy`` reads."""
    other = make_plan(load_config(RunConfig, proxy), verify=False)
    check_same_data(other, plan, f"--for {proxy}")
    return samples_read(other)


def fill_cache(job: ReferenceJob, out: Path, save_every: int = SAVE_EVERY) -> None:
    """Computes the missing rows of a cache; every rank of a started process group calls it.

    Raises:
        Preempted: a rank was asked to stop; the computed rows are safe.
    """
    import torch.distributed as dist

    from megamix.engines.choose import make_engine
    from megamix.training.checkpoints.saving import load_engine

    config = job.plan.config
    with watched(config.watchdog, out) as watchdog:
        # Rank 0 finds out how far the cache has come.
        shared: list[int | None] = [open_progress(out, job.info) if dist.get_rank() == 0 else None]
        control: Any = dist.new_group(backend="gloo")
        dist.broadcast_object_list(shared, src=0, group=control)
        if shared[0] is not None:
            engine = make_engine(
                config.engine,
                job.plan.model,
                config.train,
                seq_length=config.data.seq_length,
                num_domains=len(job.plan.domains),
                vocab_size=job.plan.softmax_size,
                loss_implementation=config.loss.implementation,
                reset_position_ids=config.data.positions_restart,
                within_documents=config.data.within_documents,
            )
            load_engine(job.path, engine, 0)
            _Filler(job, engine, out, control, save_every).run(shared[0], watchdog)
        dist.barrier(control)


class _Filler:
    """Computes rows in rounds: one forward pass of the pipeline on every data-parallel rank.

    A round takes the next samples of the selection, one stretch a rank. Past the end it repeats the last sample, whose
    losses are not written.
    """

    def __init__(self, job: ReferenceJob, engine: Engine, out: Path, control: Any, save_every: int) -> None:
        from megamix.data.loader import WindowReader

        self._job, self._engine, self._out, self._control = job, engine, out, control
        config, place = job.plan.config, engine.place
        self._micro_batch, multiple = config.train.micro_batch, engine.micro_batch_multiple
        rounds = -(-job.plan.share(place.data_rank).num_micro_batches // multiple)
        self._num_micro_batches = rounds * multiple
        self._per_rank = self._num_micro_batches * self._micro_batch
        self._rounds_per_save = max(1, save_every // (self._per_rank * config.data.seq_length))
        self._reader = None
        if place.reads_data:
            self._reader = WindowReader(
                job.plan.domains,
                config.data.seq_length,
                job.plan.vocab_size,
                reset_position_ids=config.data.positions_restart,
            )
        self._writer = ReferenceWriter(out, job.info) if place.has_loss and place.is_first_copy else None

    def run(self, done: int, watchdog: Watchdog) -> None:
        """Computes all rows from ``done`` on.

        Raises:
            Preempted: a rank was asked to stop.
        """
        total, step = self._job.selection.total, self._per_rank * self._engine.place.data_size
        log = get_logger()
        if done:
            log.info("going on after %d of %d samples", done, total)
        started, first, said = time.monotonic(), done, time.monotonic()
        for number, start in enumerate(range(done, total, step), start=1):
            watchdog.progress(number - 1, "computing losses")
            self._round(start)
            done = min(start + step, total)
            asked = done < total and self._is_any_asked_to_stop()
            if number % self._rounds_per_save == 0 or done == total or asked:
                self._save(done)
            if asked:
                raise Preempted(
                    f"asked to stop: {self._out} holds the losses of {done} of {total} samples. The same command goes on "
                    "from there."
                )
            if time.monotonic() - said > LOG_SECONDS or done == total:
                said = time.monotonic()
                tokens = (done - first) * self._job.info.seq_length / max(said - started, 1e-9)
                log.info("%d of %d samples, %s tokens/s", done, total, f"{tokens:,.0f}")
        if self._writer is not None:
            self._writer.close()
        blocks = self._hashes(watchdog)
        if self._engine.place.rank == 0:
            finish(self._out, self._job.info, blocks)
            log.info("the reference losses are in %s", self._out)

    def _hashes(self, watchdog: Watchdog) -> dict[str, str]:
        """Hashes of the blocks of every domain's file; each rank reads some of the files."""
        import torch.distributed as dist

        mine: dict[str, str] = {}
        for name in list(self._job.info.domains)[dist.get_rank() :: dist.get_world_size()]:
            watchdog.progress(0, "hashing losses")
            mine[name] = hash_losses(self._out, name)
        found: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=self._control)
        return {name: blocks for each in found for name, blocks in each.items()}

    def _round(self, start: int) -> None:
        place, total = self._engine.place, self._job.selection.total
        index_n = start + place.data_rank * self._per_rank + np.arange(self._per_rank)
        domain_n, sample_n = self._job.selection.at(np.minimum(index_n, total - 1))
        batch: Batch | None = None
        if self._reader is not None:
            shape = (self._num_micro_batches, self._micro_batch)
            batch = self._reader.batch(domain_n, sample_n, np.arange(self._per_rank), shape)
            batch = batch if place.device.type == "cpu" else batch.to(place.device)
        losses = self._engine.token_losses(batch, self._num_micro_batches)
        if self._writer is not None:
            assert losses is not None
            mine = index_n < total
            loss_nS = losses.flatten(0, 1).cpu().numpy()
            self._writer.write(domain_n[mine], sample_n[mine], loss_nS[mine])

    def _is_any_asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop, the same on all."""
        import torch
        import torch.distributed as dist

        asked = torch.tensor([asked_to_stop()], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._control)
        return bool(asked.item())

    def _save(self, done: int) -> None:
        import torch.distributed as dist

        if self._writer is not None:
            self._writer.sync()
        dist.barrier(self._control)
        if self._engine.place.rank == 0:
            save_progress(self._out, self._job.info, done)
