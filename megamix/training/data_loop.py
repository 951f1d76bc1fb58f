"""Data loop of one rank: batches out, loss sums in, new weights to the sampler.

    sampler -> loader -> batch --(any trainer)--> sums of the step -> exchange -> mixer on rank 0 -> all samplers

`megamix.training.trainer` uses it, and so do the adapters for other trainers (`megamix.interop.trainers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamix.core.errors import InputError, MegamixError
from megamix.core.log import get_logger
from megamix.core.text import listed, plural
from megamix.data.blend.blend import Blend
from megamix.data.loader import Batch, Loader
from megamix.data.sampler import Sampler
from megamix.engines.step_loss import Objective
from megamix.mixing.exchange import NO_REQUESTS, MixExchange, MixReport, Requests, checked_loss_weights
from megamix.mixing.mixers import Mixer, ScheduleConfig, evaluated, make_mixer, with_later_keys
from megamix.mixing.shadow import Shadow, shadow_names
from megamix.mixing.steering.journal import ANSWERS, JOURNAL, Journal
from megamix.mixing.steering.rule import RuleMaker
from megamix.mixing.steering.steering import Steering
from megamix.training.checkpoints.fingerprints import data_fingerprints
from megamix.training.checkpoints.resume import Resumed
from megamix.training.checkpoints.state import RunState
from megamix.training.guard import BadStep, Guard
from megamix.training.plan import DataPlan
from megamix.training.records.run_record import RunRecord
from megamix.training.reference.cache import open_reference, reference_folder


class MixedData:
    """Data loop of one rank; every rank of the job makes one.

    For each step: `next_batch`, `objective`, then `submit` once the step's losses are summed.

    Args:
        data_rank: which of the data-parallel slices of every global batch this rank reads.
        reads_data: False on a rank that needs no tokens, such as a pipeline stage in the middle.
        device: of the model; batches stay on the CPU, pinned where it is a GPU.
        resumed: the checkpoint to continue from, as rank 0 sees it; None starts anew.
        evaluates: whether the trainer submits sums of evaluations where the mixer wants them.
        keeps_previous: whether `previous_state` may be asked for.
        journal_dir: folder of the journal that steers the run; None where nobody can.

    Attributes:
        step: steps submitted.
        guard: judges the sums of every step.
        shadows: mixers that only log, on rank 0.
        change: the ``change`` of weights.jsonl after a resume that changed the blend; None where nothing changed.
    """

    def __init__(
        self,
        plan: DataPlan,
        *,
        data_rank: int,
        reads_data: bool,
        device: torch.device,
        resumed: Resumed | None = None,
        evaluates: bool = False,
        keeps_previous: bool = False,
        journal_dir: Path | None = None,
    ) -> None:
        config = evaluated(plan.config.mixer)
        if config is not None and not evaluates:
            raise InputError(
                f"mixer: {config.why_evaluated}, which only `megamix train` has. {config.without_evaluations}"
            )
        self.plan = plan
        self.step = 0 if resumed is None else resumed.step
        self._is_new = resumed is None
        self._device = device
        self._fingerprints = data_fingerprints(plan)
        self._keeps_previous = keeps_previous
        self._previous: RunState | None = None
        self.guard = Guard.of(plan, data_rank, None if resumed is None else resumed.state.guard)
        blend, self.change = (plan.blend(), None) if resumed is None else resumed.blend(plan)
        if resumed is not None and self.change is not None and dist.get_rank() == 0:
            _log_change(plan, self.change, resumed, blend)
        mixer: Mixer | None = None
        self._steering: Steering | None = None
        self.shadows: tuple[Shadow, ...] = ()
        shared: list[Any] = [None]
        share = plan.share(data_rank)
        if dist.get_rank() == 0:
            weights = blend.segment_at(plan.config.batches.position(self.step)).weights
            left_out = plan.policy.left_out if resumed is None else resumed.left_out(plan)
            make = RuleMaker(plan.config.mixer, plan.domain_names, plan.objective_weights)
            if journal_dir is not None:
                self._steering = open_steering(plan, journal_dir, make, resumed)
            mixer = make.first(None if self._steering is None else self._steering.course, weights, left_out)
            if resumed is not None:
                resumed.set_mixer(mixer)
            self.shadows = open_shadows(plan, blend, self.step, resumed, left_out)
            shared = [({"blend": blend.state_dict()}, checked_loss_weights(mixer))]
        # Rank 0's, on every rank: machines may differ in the last bit of a quotient, and ranks must agree on the data.
        # Through a separate group: small objects must not need the accelerator.
        group: Any = dist.new_group(backend="gloo")
        dist.broadcast_object_list(shared, src=0, group=group)
        state, loss_weights = shared[0]
        self.sampler = Sampler.from_state_dict(state, share, plan.policy.constraints.limits, plan.policy.batches)
        self._reports: list[MixReport] = []
        self.exchange = MixExchange(
            mixer,
            self.sampler,
            plan.policy,
            first_step=self.step,
            loss_weights=loss_weights,
            has_reference=reference_folder(plan) is not None,
            rewards_evaluation=config is not None,
            judge=self._judge,
            on_report=self._report,
            steering=self._steering,
        )
        if self.sampler.rests and reference_folder(plan) is not None:
            raise InputError(
                f"mixer {plan.config.mixer.name} reads reference losses of whole samples, but data.seq_length was changed on resume and "
                "the rest of an epoch is cut anew. Use a mixer without a reference until every domain has begun its next epoch."
            )
        reader = plan.reader(plan.domains, open_reference(plan), self.sampler.rests) if reads_data else None
        self.loader = Loader(self.sampler, reader, device.type == "cuda")
        for _ in range(plan.config.data.weight_lag + 1):
            self.loader.request()

    @property
    def mixer(self) -> Mixer | None:
        """On rank 0; None elsewhere."""
        return self.exchange.mixer

    def next_batch(self) -> tuple[Batch | None, float]:
        """This rank's part of the next step (None on a rank that reads no data), and the seconds of waiting.

        The first call gives step ``step``; up to ``weight_lag`` steps may be taken ahead of it.

        Raises:
            DataExhausted: the step would read more of a domain than the run allows.
        """
        return self.loader.get()

    def objective(self, batch: Batch | None) -> Objective:
        """The objective of the step; meaningless on a rank that reads no data."""
        config = self.plan.config.mixer
        loss_weights = self.exchange.loss_weights(self.step)
        if batch is None:
            return Objective(1.0)
        if loss_weights is None or not isinstance(config, ScheduleConfig):
            # At least one: a batch with every label masked has a loss of 0, not of 0 / 0.
            return Objective(float(max(batch.num_tokens, 1)))
        weights, normaliser = config.loss_factors(loss_weights, batch.domain_tokens, self.sampler.weights_at(self.step))
        tensor = torch.tensor(weights, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        return Objective(normaliser, tensor.to(self._device, non_blocking=True))

    def num_micro_batches(self) -> int:
        """Micro-batches of this rank in step ``step``."""
        return self.sampler.share_of(self.step).num_micro_batches

    def requests(self) -> Requests:
        """Requests of any rank for the boundary before step ``step``, the same on all ranks; call once per step.

        A request arrives 1 + weight_lag steps after the step that it was submitted with.
        """
        return self.exchange.requests_at(self.step)

    def submit(
        self, sums_KC: torch.Tensor, evaluated_KC: torch.Tensor | None = None, requests: Requests = NO_REQUESTS
    ) -> None:
        """Ends step ``step`` with this rank's int64 [K, C] sums (zeros where it has no loss).

        Returns at once; the sums may be overwritten.

        Args:
            evaluated_KC: this rank's sums of the evaluation after the step; on all ranks or on none.
            requests: of this rank.
        """
        self.exchange.submit(self.step, sums_KC, evaluated_KC, requests)
        self.step += 1
        step = self.step
        # The step weight_lag ahead is sampled with the weights that follow from everything before this one.
        self.loader.request(lambda: self.exchange.settle(step))

    def settle(self) -> None:
        """Waits for the weights that follow from all submitted steps; then drops past weights."""
        self.exchange.settle(self.step)
        self.sampler.forget_before(self.step)

    def announce(self, record: RunRecord) -> None:
        """Logs the weights that the run starts with, or continues with after a change on resume or where none are on
        record; on rank 0."""
        if self.mixer is not None and (self._is_new or self.change is not None or not record.has_weights):
            batches = self.plan.config.batches
            segments = [(batches.step(segment.start), segment) for segment in self.sampler.segments_from(self.step)]
            # A stretch of before a resume goes on: the change begins here.
            begin = 0 if self.change is None else batches.position(self.step)
            names = self.plan.domain_names
            rests = {names[domain]: rest.to_json() for domain, rest in self.sampler.rests.items()}
            extra = {"rests": rests} if rests else {}
            record.announce(self.step, segments, {**self.mixer.record(), **extra}, self.change, begin)

    def take_reports(self) -> list[MixReport]:
        """Reports of the steps since the last call, on rank 0."""
        taken = []
        while self._reports:
            taken.append(self._reports.pop(0))
        return taken

    def _report(self, report: MixReport) -> None:
        """On the mixing thread of rank 0, once the weights of the step are sent."""
        changes = [change for shadow in self.shadows for change in shadow.update(report.stats, report.step)]
        self._reports.append(replace(report, shadows=tuple(changes)))

    def state(self) -> RunState:
        """The state before step ``step``."""
        self.exchange.settle(self.step)
        return self._state(self.step)

    def previous_state(self) -> RunState:
        """The state before the last submitted step, whatever the guard says of that step; on rank 0."""
        with suppress(BadStep):
            self.exchange.settle(self.step)
        if self._previous is None or self._previous.step != self.step - 1:
            raise MegamixError(
                f"the state before step {self.step} is not there: no step was taken, or it was not kept."
            )
        return self._previous

    def _judge(self, step: int, sums_KC: torch.Tensor, evaluated_KC: torch.Tensor, group: Any) -> None:
        """On the mixing thread, before the mixer sees the sums of ``step``."""
        if self._keeps_previous and self.mixer is not None:
            self._previous = self._state(step)
        self.guard.judge(step, sums_KC, evaluated_KC, group)

    def _state(self, step: int) -> RunState:
        """The state before ``step``, once the steps before it are mixed."""
        return RunState(
            step=step,
            fingerprints=self._fingerprints,
            sampler=self.sampler.state_dict(step),
            mixer=self.mixer.state_dict() if self.mixer is not None else None,
            steering=None if self._steering is None else self._steering.state_dict(),
            shadow={shadow.name: shadow.state(step) for shadow in self.shadows},
            guard=self.guard.state(),
            total_samples=self.plan.total_samples,
            manifest=str(self.plan.config.data.manifest.absolute()),
        )

    def close(self) -> None:
        """Cancels pending work, without waiting for it."""
        self.loader.close()
        self.exchange.close()


def _log_change(plan: DataPlan, change: Mapping[str, Any], resumed: Resumed, blend: Blend) -> None:
    """Says what a resume changed, with the weights before and after."""
    before = Blend.from_state_dict(resumed.state.sampler["blend"])
    names = resumed.domains.before if resumed.domains is not None else plan.domain_names
    was = dict(zip(names, before.weights.tolist(), strict=True))
    moved = [
        f"{name} {was.get(name, 0.0):.4f} -> {weight:.4f}"
        for name, weight in zip(plan.domain_names, blend.weights.tolist(), strict=True)
        if weight != was.get(name, 0.0)
    ]
    parts = [
        f"the run's length from {change['length']['before']} to {change['length']['now']} samples"
        if part == "length"
        else part
        for part in (*change["parts"], *(["domains"] if change["domains"] else []))
    ]
    weights = f"weights from here on: {listed(moved)}" if moved else "the weights stay"
    get_logger().warning("changed since step %d: %s; %s", resumed.step, ", ".join(parts), weights)


def open_steering(plan: DataPlan, folder: Path, make: RuleMaker, resumed: Resumed | None) -> Steering:
    """The steering of a run, before its first step or as its checkpoint had it."""
    journal, length = Journal(folder), plan.config.data.seq_length
    if resumed is None:
        if commands := journal.read():
            get_logger().warning(
                "%s holds %s: %s. They have their effect again, where they had it; to begin without them, stop and move that "
                "file and %s away",
                folder / JOURNAL, plural(len(commands), "command"),
                listed(f"{each.id} ({each.describe()})" for each in commands), ANSWERS,
            )  # fmt: skip
        return Steering(plan.policy, journal, make, length)
    steering = Steering(plan.policy, journal, make, length, resumed.state.steering)
    steering.adopt(resumed.changed, other_domains=resumed.domains is not None)
    return steering


def open_shadows(
    plan: DataPlan, blend: Blend, step: int, resumed: Resumed | None, left_out: tuple[str, ...]
) -> tuple[Shadow, ...]:
    """The shadows of a run, before ``step``.

    Each continues from its part of the checkpoint. A new one, or one with another config, begins here.

    Args:
        blend, left_out: of the run.
    """
    saved = {} if resumed is None else resumed.state.shadow
    shadows = []
    for name, config in zip(shadow_names(plan.config.shadow), plan.config.shadow, strict=True):
        own, identity = saved.get(name), plan.mixer_fingerprint(config)
        if resumed is not None and own is not None and _saved_identity(own.config) in (identity, identity["mixer"]):
            part = replace(resumed, state=replace(resumed.state, mixer=own.mixer, sampler=own.sampler))
            its_blend, change = part.blend(plan)
            out = part.left_out(plan)
        else:
            out = left_out
            part, its_blend = None, Blend.from_state_dict(blend.state_dict())
            change = None if step == 0 else {"parts": ["shadow"], "domains": None}
        weights = its_blend.segment_at(plan.config.batches.position(step)).weights
        mixer = make_mixer(config, plan.domain_names, weights, plan.objective_weights, left_out=out)
        if part is not None:
            part.set_mixer(mixer)
        shadows.append(
            Shadow(
                name,
                mixer,
                its_blend,
                plan.policy,
                first_step=step,
                change=change,
                announce=part is None or change is not None,
                identity=identity,
            )
        )
    return tuple(shadows)


def _saved_identity(config: dict[str, Any] | None) -> dict[str, Any]:
    """The identity of a saved shadow; before there was an objective, that was its config alone."""
    if config is None:
        return {}
    return {**config, "mixer": with_later_keys(config["mixer"])} if "mixer" in config else with_later_keys(config)
