"""Trainer: the run of one rank, in the order in which the data flows.

plan -> engine -> data -> [ batch -> train step -> sums -> mixer -> weights -> data ] ... -> record, checkpoints
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megamix.core.errors import MegamixError, Preempted
from megamix.core.log import get_logger
from megamix.data.blend.permute import hash_words
from megamix.data.loader import Batch
from megamix.data.sampler import DataExhausted
from megamix.engines.choose import make_engine
from megamix.engines.step_loss import Objective
from megamix.mixing.exchange import Requests
from megamix.training.alerts import Alert, Alerts
from megamix.training.checkpoints import saving, store
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import Resumed
from megamix.training.config import RunConfig
from megamix.training.console import Console
from megamix.training.data_loop import MixedData
from megamix.training.evaluate import RewardEvaluation, Validation
from megamix.training.job.signals import asked_to_stop
from megamix.training.job.watchdog import Watchdog
from megamix.training.plan import Plan
from megamix.training.records.events import Event
from megamix.training.records.lines import MetricsLine, read_lines
from megamix.training.records.recorded_run import METRICS
from megamix.training.records.run_record import IntervalLog, RunRecord, SampleLog
from megamix.training.records.sinks import make_sinks
from megamix.training.records.wholeness import measure_record, missing_from_record
from megamix.training.step_clock import StepClock


class Trainer:
    """One rank of a run; every rank builds one and calls `run`."""

    def __init__(self, plan: Plan, resumed: Resumed | None, watchdog: Watchdog) -> None:
        """
        Args:
            resumed: the checkpoint that the ranks agreed on, its files checked; None starts anew.
            watchdog: told of this rank's progress.
        """
        self.plan = plan
        self.config: RunConfig = plan.config
        self._batches = plan.config.batches
        self.is_main = dist.get_rank() == 0
        # Gathering small objects must not need the accelerator.
        self._control: Any = dist.new_group(backend="gloo")
        self._watchdog = watchdog
        self.engine = make_engine(
            self.config.engine,
            plan.model,
            self.config.train,
            seq_length=self.config.data.seq_length,
            num_domains=len(plan.domains),
            vocab_size=plan.softmax_size,
            loss_implementation=self.config.loss.implementation,
            skip_non_finite=self.config.guard.non_finite == "skip",
            reset_position_ids=self.config.data.positions_restart,
            within_documents=self.config.data.within_documents,
        )
        self.place = self.engine.place
        if resumed is not None:
            saving.load_engine(resumed.path, self.engine, resumed.state.optimizer_steps, verified=True)
            if self.engine.loss_scale is not None and resumed.state.loss_scale is not None:
                self.engine.loss_scale.load_state_dict(resumed.state.loss_scale)
        elif (pretrained := plan.pretrained()) is not None:
            saving.load_weights(pretrained, self.engine)
        left_out = plan.policy.left_out if resumed is None else resumed.left_out(plan)
        self._rewards = RewardEvaluation.of(plan, self.engine, left_out)
        self.data = MixedData(
            plan,
            data_rank=self.place.data_rank,
            reads_data=self.place.reads_data,
            device=self.place.device,
            resumed=resumed,
            evaluates=self._rewards is not None,
            journal_dir=self.config.run_dir,
        )
        self.guard = self.data.guard
        self._first_step = self.step
        self._saved_at = time.monotonic()
        self._is_in_other_format = resumed is not None and store.kind(resumed.path) != saving.format_of(self.engine)
        self._writer = saving.CheckpointWriter(
            self.config.run_dir / "checkpoints", self.engine, self.config.checkpoint, self._control
        )
        self._clock = StepClock(self.place.device)
        self.validation = Validation(plan, self.engine)
        self._log = IntervalLog(plan.domain_names, resumed.state.interval if resumed else None)
        self.record = None
        if self.is_main:
            missing = None if resumed is None else self._missing_record(resumed)
            sinks = make_sinks(self.config, self.step + 1)
            change = None if resumed is None else resumed.said_changes(self.config)
            self.record = RunRecord(
                self.config.run_dir, plan.domain_names, self.step if resumed else None, sinks, change or ""
            )
            if change is not None:
                get_logger().warning("%s", change)
            if missing is not None:
                get_logger().warning("%s", missing)
                self._note("incomplete", missing)
            self.data.announce(self.record)
        self._alerts = self._make_alerts()
        self._console = Console(plan, self.place.device, self.data.sampler.weights_at(self.step))
        self._sample_log = self._open_sample_log()
        if resumed is not None:
            get_logger().info("resuming from %s", resumed.path)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.data.step

    def run(self) -> None:
        """Trains to the last step (or to ``train.stop_after``), evaluating and saving on the way.

        Raises:
            Preempted: a rank was asked to stop; the run is saved.
            MegamixError: the guard ended the run, or something could not be written.
        """
        try:
            with self._writer:
                self._run()
            self._note("ended")
            if self.is_main:
                self._console.end(self.step)
        except MegamixError as error:
            self._note("preempted" if isinstance(error, Preempted) else "failed", str(error))
            raise
        finally:
            self.data.close()
            if self.record is not None:
                self.record.close()
            if self._sample_log is not None:
                self._sample_log.close()

    def _run(self) -> None:
        config = self.config
        if self.is_main:
            self._console.begin(self.step)
        if self.step == 0:
            self.evaluate()
        stop = min(config.train.steps, config.train.stop_after or config.train.steps)
        if self.step >= stop and self._is_in_other_format:
            self.save()
        while self.step < stop:
            self._grant_requests()
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

    def _grant_requests(self) -> None:
        """At a boundary: saves, or saves and ends the run, where any rank has requested it.

        Raises:
            Preempted: a rank was asked to stop.
        """
        with self._clock.mixing():
            requests = self.data.requests()
        if (requests.stop or requests.save) and self.step not in (self._first_step, self._writer.last_step):
            self.save()
        if requests.stop:
            raise Preempted(
                f"asked to stop: {self.config.run_dir} stands at step {self.step} of {self.config.train.steps}, saved. The same "
                "command goes on from there."
            )

    def _requests(self) -> Requests:
        """This rank's requests, submitted with a step."""
        minutes = self.config.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        return Requests(stop=asked_to_stop(), save=late and self.is_main)

    def train_step(self) -> None:
        """Step ``self.step``: read ahead, train, and hand the sums to the mixer."""
        self._watchdog.progress(self.step, "training")
        self._writer.check()
        with self._clock.step():
            with self._clock.data():
                batch, _ = self.data.next_batch()
            if self._sample_log is not None and batch is not None and batch.samples is not None:
                self._sample_log.write(batch.samples)
            self._seed_step(self.step)
            lr = self.config.train.lr_at(self.step, self._batches)
            with self._clock.mixing():
                objective = self.data.objective(batch)
            is_finite = self._engine_step(None if batch is None else self._on_device(batch), objective, lr)
        self._judge(self.step - 1, is_finite)
        if _every(self.step, self.config.log.every) or self.step == self.config.train.steps:
            self._log_interval(lr)

    def _engine_step(self, batch: Batch | None, objective: Objective, lr: float) -> bool:
        """Trains and submits the step's sums; returns whether the step was finite, as far as the engine knows."""
        evaluates = self._rewards is not None and self._rewards.due_after(self.step)
        kept: list[torch.Tensor] = []

        def on_statistics(sums: torch.Tensor) -> None:
            self.guard.keep(self.step, None if batch is None else batch.samples, self.engine.non_finite_counts())
            if evaluates:
                kept.append(sums.clone())
            else:
                self.data.submit(sums, requests=self._requests())

        with self._clock.engine():
            is_finite = self.engine.train_step(
                batch, objective, lr, self._clock.as_mixing(on_statistics), self.data.num_micro_batches()
            )
        if evaluates:
            assert self._rewards is not None
            # The mixer gets the step and the evaluation that follows it at once.
            with self._clock.mixing():
                self.data.submit(kept[0], self._rewards.sums(), self._requests())
        return is_finite

    def _judge(self, step: int, is_finite: bool) -> None:
        """Tells the guard whether ``step``, which is over, was finite, as far as the engine knows."""
        if is_finite:
            self.guard.took()
            return
        self.data.settle()
        scaled = self.guard.scaled(step, self.engine.scaling)
        text = scaled or self.guard.left_out(step)
        if self.record is not None:
            get_logger().warning("%s", text)
            self._note("skipped", text)
            if self._alerts is not None and scaled is None:
                self._alerts.skipped(step, text)

    def evaluate(self) -> None:
        """Validation loss of every domain, into the record and the log."""
        self._watchdog.progress(self.step, "evaluating")
        line = self.validation.run(self.engine)
        if self.record is not None:
            self.record.evaluate({"step": self.step, "tokens": self._tokens(), **line})
            self._console.evaluation(self.step, line)
            if self._alerts is not None:
                self._alerts.evaluation(self.step, line)

    def save(self) -> None:
        """Takes a checkpoint before step ``self.step``; with checkpoint.asynchronous it is on disk later."""
        self._watchdog.progress(self.step, "saving")
        self._saved_at = time.monotonic()
        state = self.data.state()
        if self.record is not None:
            self._collect_reports()
            self.record.flush()
            state = replace(state, **measure_record(self.config.run_dir))
        state = replace(
            state,
            fingerprints=fingerprints(self.plan),
            seed=self.config.train.seed,
            interval=self._log.state_dict(),
            loss_scale=None if self.engine.loss_scale is None else self.engine.loss_scale.state_dict(),
        )
        self._writer.save(self.step, state.to_json())

    def _missing_record(self, resumed: Resumed) -> str | None:
        """What the record has lost of the steps before, in words; a run that continues another's has none of them."""
        run_dir, state = self.config.run_dir, resumed.state
        # Not the folder above it: checkpoints may be a link to another disk.
        if state.record is None or resumed.path.parent.resolve() != (run_dir / "checkpoints").resolve():
            return None
        return missing_from_record(run_dir, state.record, resumed.step, state.record_ends)

    def _make_alerts(self) -> Alerts | None:
        """On rank 0; of a resumed run they know the evaluations before."""
        if self.record is None:
            return None
        config = self.config
        before = read_lines(config.run_dir / METRICS, MetricsLine) if self.step else []
        return Alerts(
            config.alerts,
            self.plan.policy.constraints,
            tell=self._tell,
            evaluations=[line for line in before if line["event"] == "evaluate"],
            weights=self.data.sampler.segments_from(self.step)[-1].weights,
        )

    def _tell(self, alert: Alert, step: int) -> None:
        assert self.record is not None
        get_logger().warning("alert, step %d: %s", step, alert.text)
        self.record.alert(alert, step)

    def _note(self, event: Event, text: str = "") -> None:
        if self.record is not None:
            self.record.note(event, self.step, text)

    def _stop_exhausted(self, end: DataExhausted) -> None:
        """Ends the run before a step that would read a domain too often (``data.on_exhausted: stop``)."""
        if self.step > self._first_step:  # else it had ended here before
            self.evaluate()
            self.save()
        name, epochs = self.plan.domain_names[end.domain], self.plan.policy.constraints.max_epochs[end.domain]
        get_logger().warning(
            "domain '%s' is used up after step %d of %d (data.max_epochs %g x %d samples): the run ends here, as "
            "data.on_exhausted is stop",
            name, self.step, self.config.train.steps, epochs, self.plan.num_samples[end.domain],
        )  # fmt: skip

    def _open_sample_log(self) -> SampleLog | None:
        """One per data-parallel rank, kept by its first stage."""
        if not self.config.log.samples:
            return None
        if self.is_main:
            SampleLog.drop_after(self.config.run_dir, self.step)
        dist.barrier(self._control)
        keeps = self.place.stage == 0 and self.place.is_first_copy
        return SampleLog(self.config.run_dir, self.place.data_rank) if keeps else None

    def _log_interval(self, lr: float) -> None:
        with self._clock.device():
            grad_norm = self.engine.grad_norm()
        with self._clock.mixing():
            self.data.settle()
        times = self._clock.take()
        if self.record is None:
            self._log.reset()
            return
        self._collect_reports()
        taken = self._tokens() - self._batches.tokens(self.step - times.steps)
        line = self._log.line(self.step, self._tokens(), lr, grad_norm, times, taken)
        if line is not None:
            line |= self._console.machine(line["tokens_per_second"])
            self.record.train(line)
            self._console.progress(line)
            if self._alerts is not None:
                self._alerts.interval(self.step, line)

    def _collect_reports(self) -> None:
        assert self.record is not None
        for report in self.data.take_reports():
            self._log.add_stats(report.stats)
            self.record.step(report)
            self._console.weights(report)
            if self._alerts is not None:
                self._alerts.weights(report)

    def _on_device(self, batch: Batch) -> Batch:
        return batch if self.place.device.type == "cpu" else batch.to(self.place.device)

    def _seed_step(self, step: int) -> None:
        """Makes dropout a function of seed, step and rank, so that no generator's state needs saving."""
        torch.manual_seed(int(hash_words(self.config.train.seed, step, self.place.rank)) % 2**63)

    def _tokens(self) -> int:
        return self._batches.tokens(self.step)


def _every(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
