"""The training run of one rank, in the order in which the data flows.

plan -> engine -> sampler -> loader -> [ train step -> sums -> mixer -> weights -> sampler ] ... -> record, checkpoints
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megamix import saving
from megamix.data.loader import Batch, Loader, WindowReader
from megamix.data.permute import hash_words
from megamix.data.sampler import DataExhausted, Sampler
from megamix.engines.base import Engine
from megamix.engines.deepspeed import DeepSpeedEngine
from megamix.evaluate import Validation
from megamix.exchange import MixExchange, MixReport
from megamix.log import get_logger, show_progress
from megamix.mixers import make_mixer
from megamix.plan import Plan
from megamix.resume import Resumed, fingerprints
from megamix.run_config import RunConfig
from megamix.sinks import make_sinks
from megamix.tracking import IntervalLog, RunRecord, SampleLog


def make_engine(plan: Plan) -> Engine:
    """The engine that the config names, with the initial weights of the run's seed."""
    config = plan.config
    return DeepSpeedEngine(
        config.engine,
        plan.model,
        config.train,
        seq_length=config.data.seq_length,
        num_domains=len(plan.domains),
        vocab_size=plan.vocab_size,
        loss_implementation=config.loss.implementation,
    )


class Trainer:
    """One rank of a run; every rank builds one and calls `run`."""

    def __init__(self, plan: Plan, resumed: Resumed | None) -> None:
        """
        Args:
            resumed: what rank 0 found to continue from; None starts anew. All ranks are given the same: they may see
                the file system at different moments.
        """
        self.plan = plan
        self.config: RunConfig = plan.config
        self.is_main = dist.get_rank() == 0
        # Gathering small objects must not need the accelerator.
        self._control: Any = dist.new_group(backend="gloo")
        self._checkpoints = self.config.run_dir / "checkpoints"
        self.engine = make_engine(plan)
        self.place = self.engine.place
        self.step = self._first_step = 0 if resumed is None else resumed.step
        if resumed is not None:
            saving.load_engine(resumed.path, self.engine, self.step)
        change = self._start_sampling(resumed)
        self._start_mixing(resumed)
        self._start_loading()
        self.validation = Validation(plan, self.place)
        self._log = IntervalLog(plan.domain_names, resumed.state["interval"] if resumed else None)
        self.record = None
        if self.is_main:
            sinks = make_sinks(self.config, self.step + 1)
            self.record = RunRecord(self.config.run_dir, plan.domain_names, self.step if resumed else None, sinks)
            if resumed is None or change is not None:
                self._announce_weights(change)
        self._sample_log = self._open_sample_log()
        if resumed is not None:
            get_logger().info("resuming from %s", resumed.path)

    def run(self) -> None:
        """Trains to the last step (or to ``train.stop_after``), evaluating and saving on the way."""
        config = self.config
        if self.step == 0:
            self.evaluate()
        stop = min(config.train.steps, config.train.stop_after or config.train.steps)
        try:
            while self.step < stop:
                try:
                    self.train_step()
                except DataExhausted as end:
                    self._stop_exhausted(end)
                    break
                # Not where the run is only interrupted: the record must not depend on where that was.
                if self.step == config.train.steps or _every(self.step, config.evaluate.every):
                    self.evaluate()
                if self.step == stop or _every(self.step, config.checkpoint.every):
                    self.save()
        finally:
            self.loader.close()
            self.exchange.close()
            if self.record is not None:
                self.record.close()
            if self._sample_log is not None:
                self._sample_log.close()

    def train_step(self) -> None:
        """Step ``self.step``: read ahead, train, and hand the sums to the mixer."""
        started = time.perf_counter()
        step = self.step
        # The step weight_lag ahead is sampled with the weights that follow from everything before this step.
        self.loader.request(lambda: self.exchange.settle(step))
        batch, waited = self.loader.get()
        if self._sample_log is not None and batch is not None and batch.samples is not None:
            self._sample_log.write(batch.samples)
        self._seed_step(step)
        lr = self.config.train.lr_at(step)
        self.engine.train_step(
            None if batch is None else self._on_device(batch),
            lr,
            lambda sums: self.exchange.submit(step, sums),
        )
        self.step += 1
        self._log.add_step(time.perf_counter() - started, waited)
        if _every(self.step, self.config.log.every) or self.step == self.config.train.steps:
            self._log_interval(lr)

    def evaluate(self) -> None:
        """Validation loss of every domain, into the record and the log."""
        line = self.validation.run(self.engine)
        if self.record is not None:
            self.record.evaluate({"step": self.step, "tokens": self._tokens(), **line})
            macro, worst = line["macro_loss"], line["worst_domain"]
            get_logger().info("step %d: validation loss %.4f (mean over domains), worst %s", self.step, macro, worst)

    def save(self) -> None:
        """A checkpoint of the run as it stands before step ``self.step``."""
        self.exchange.settle(self.step)
        if self.record is not None:
            self._collect_reports()
            self.record.flush()
        state: dict[str, Any] = {
            "fingerprints": fingerprints(self.plan),
            "sampler": self.sampler.state_dict(self.step),
            "mixer": self._mixer.state_dict() if self._mixer is not None else None,
            "interval": self._log.state_dict(),
            "seed": self.config.train.seed,
            "manifest": str(self.config.data.manifest.absolute()),
        }
        path = saving.save(self._checkpoints, self.step, self.engine, state, self.config.checkpoint.keep, self._control)
        get_logger().info("step %d: saved %s", self.step, path)

    def _start_sampling(self, resumed: Resumed | None) -> dict[str, Any] | None:
        """Opens the blend; returns what weights.jsonl is to say of a resume that changed it."""
        plan = self.plan
        blend, change = (plan.blend(), None) if resumed is None else resumed.blend(plan)
        # Rank 0's, on every rank: machines may differ in the last bit of a quotient, and ranks must agree on the data.
        shared = [{"blend": blend.state_dict()}]
        dist.broadcast_object_list(shared, src=0, group=self._control)
        share = plan.share(self.place.data_rank)
        self.sampler = Sampler.from_state_dict(shared[0], share, plan.constraints.limits)
        return change

    def _start_mixing(self, resumed: Resumed | None) -> None:
        config, plan = self.config, self.plan
        self._mixer = None
        self._reports: list[MixReport] = []
        if self.is_main:
            self._mixer = make_mixer(config.mixer, plan.domain_names, self.sampler.weights_at(self.step))
            if resumed is not None:
                resumed.set_mixer(self._mixer)
        batch = config.train.global_batch
        self.exchange = MixExchange(
            self._mixer,
            self.sampler,
            plan.schedule,
            weight_lag=config.data.weight_lag,
            first_step=self.step,
            constrain=lambda weights, step: plan.constraints.apply(weights, self.sampler.counts_at(step), step * batch),
            on_report=self._reports.append,
        )

    def _announce_weights(self, change: dict[str, Any] | None) -> None:
        """The weights that the run starts with, or goes on with after a change on resume."""
        assert self.record is not None
        assert self._mixer is not None
        batch = self.config.train.global_batch
        segments = [(segment.start // batch, segment) for segment in self.sampler.segments_from(self.step)]
        self.record.announce(self.step, segments, self._mixer.record(), change)

    def _stop_exhausted(self, end: DataExhausted) -> None:
        """Ends the run before a step that would read a domain too often (``data.on_exhausted: stop``)."""
        if self.step > self._first_step:  # else it had ended here before
            self.evaluate()
            self.save()
        name, epochs = self.plan.domain_names[end.domain], self.plan.constraints.max_epochs[end.domain]
        get_logger().warning(
            "domain '%s' is used up after step %d of %d (data.max_epochs %g x %d samples): the run ends here, as "
            "data.on_exhausted is stop",
            name, self.step, self.config.train.steps, epochs, self.plan.num_samples[end.domain],
        )  # fmt: skip

    def _start_loading(self) -> None:
        data = self.config.data
        reader = WindowReader(
            self.plan.domains,
            data.seq_length,
            self.plan.vocab_size,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
        )
        cuda = self.place.device.type == "cuda"
        self.loader = Loader(self.sampler, reader if self.place.reads_data else None, cuda)
        for _ in range(self.config.data.weight_lag):
            self.loader.request()

    def _open_sample_log(self) -> SampleLog | None:
        """One per data-parallel rank, kept by its first stage."""
        if not self.config.log.samples:
            return None
        if self.is_main:
            SampleLog.drop_after(self.config.run_dir, self.step)
        dist.barrier(self._control)
        return SampleLog(self.config.run_dir, self.place.data_rank) if self.place.stage == 0 else None

    def _log_interval(self, lr: float) -> None:
        grad_norm = self.engine.grad_norm()
        self.exchange.settle(self.step)
        self.sampler.forget_before(self.step)
        if self.record is None:
            self._log.reset()
            return
        self._collect_reports()
        line = self._log.line(
            self.step, self._tokens(), lr, grad_norm, self.config.train.global_batch * self.config.data.seq_length
        )
        self.record.train(line)
        show_progress(self.step, self.config.train.steps, line)

    def _collect_reports(self) -> None:
        assert self.record is not None
        while self._reports:
            report = self._reports.pop(0)
            self._log.add_stats(report.stats)
            if report.updated:
                self.record.weights(report, report.effective_step * self.config.train.global_batch)

    def _on_device(self, batch: Batch) -> Batch:
        return batch if self.place.device.type == "cpu" else batch.to(self.place.device)

    def _seed_step(self, step: int) -> None:
        """Makes what is random in a step (dropout) a function of seed, step and rank, so that no generator's state
        needs saving."""
        torch.manual_seed(int(hash_words(self.config.train.seed, step, self.place.rank)) % 2**63)

    def _tokens(self) -> int:
        return self.step * self.config.train.global_batch * self.config.data.seq_length


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
