"""Data, loss and mixing for one rank of a host trainer.

    next_batch -> begin_step -> loss, once a micro-batch -> (the sums go to the mixer) -> save_state, load_state

The host sets steps, batches and seed. A YAML file sets data, mixture and mixer (and ``checkpoint``, where a resume
changes the domains).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamix.core.config import validate
from megamix.core.config_files import apply_overrides, read_yaml
from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.core.files import parse_json, replace_file
from megamix.core.log import get_logger
from megamix.core.paths import expand
from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.data.sampler import StepSamples
from megamix.engines.step_loss import Objective, StepLoss
from megamix.training.checkpoints.batch_change import saved_batches
from megamix.training.checkpoints.fingerprints import data_fingerprints
from megamix.training.checkpoints.resume import Resumed, resume_from
from megamix.training.checkpoints.state import RunState
from megamix.training.checkpoints.state_parts import check_parts
from megamix.training.config import KINDS, MixConfig
from megamix.training.data_loop import MixedData
from megamix.training.plan import DataPlan, make_data_plan
from megamix.training.records.recorded_run import write_mix
from megamix.training.records.run_record import RunRecord
from megamix.training.records.wholeness import measure_record, missing_from_record

SETTLE_EVERY = 100
"""Steps between two calls of `MixedData.settle`, at which the training thread waits for the mixer."""


def host_plan(
    config: str | Path, overrides: Sequence[str], train: Mapping[str, int], data_size: int, host: str
) -> DataPlan:
    """Resolved data plan for the host's steps and batches.

    Args:
        config: YAML with the sections data, mixture and mixer.
        train: the host's ``steps``, ``global_batch``, ``micro_batch`` and ``seed``.
        host: name for messages.

    Raises:
        InputError: the config is wrong, or does not fit the host or the data.
    """
    sections = apply_overrides(
        read_yaml(Path(expand(config) if isinstance(config, str) else config), KINDS), list(overrides), KINDS
    )
    if "train" in sections:
        raise InputError(f"{config}: steps, batches and seed are {host}'s here. Leave the section 'train' out.")
    checked = validate(MixConfig, {**sections, "train": dict(train)}, str(config))
    if checked.data.on_exhausted == "stop":
        raise InputError(
            f"{config}: data.on_exhausted is stop, but {host} decides when the run ends. Use cap or repeat."
        )
    share = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return make_data_plan(checked, data_size, verify=share[0] == 0, share=share)


def refuse_unlike(host: str, option: str, seen: object, wanted: object, remedy: str) -> None:
    """Raises InputError unless an option of the host has the value that the adapter needs."""
    if seen != wanted:
        raise InputError(f"{host}'s {option} is {seen!r}, expected {wanted!r}. {remedy}")


def coded_labels(labels: torch.Tensor, domains: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Labels that carry the domain of their token, as ``label + domain * vocab_size``; those that do not count stay."""
    return torch.where(labels >= 0, labels + domains.long() * vocab_size, labels)


def decoded_labels(coded: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels and domains in the result of `coded_labels`; domain 0 where a label does not count."""
    counted = coded >= 0
    return torch.where(counted, coded % vocab_size, IGNORED_LABEL), torch.where(counted, coded // vocab_size, 0)


def join_group_of_one() -> bool:
    """Makes the process group of a process that has none, for the exchange of losses and weights; whether it did."""
    if dist.is_initialized():
        return False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    return True


class HostRun:
    """Data and loss of one rank. Every rank of the job makes one, after the process group.

    Args:
        data_rank: number of the data-parallel slice that this rank reads of every global batch.
        reads_data: False on a rank that needs no tokens.
        has_loss: whether this rank calls `loss`, once per micro-batch of every step.
        record_dir: folder in which rank 0 writes ``weights.jsonl`` and ``mix.json``; None for no record.
        resumed: state to continue from (see `load_state`); None for a new run.
        process_group: ranks that share the vocabulary; None where the logits hold all of it.
        keeps_previous: whether the host may save the state before the last step.

    Attributes:
        num_micro_batches: micro-batches of this rank in every step.
        loss: maps the logits [B, S, V] and the targets of one micro-batch to the scalar to differentiate.
        begun: number of steps begun.
    """

    def __init__(
        self,
        plan: DataPlan,
        *,
        data_rank: int,
        reads_data: bool,
        has_loss: bool,
        device: torch.device,
        record_dir: Path | None,
        resumed: Resumed | None,
        loss_implementation: str = "auto",
        process_group: Any = None,
        keeps_previous: bool = False,
    ) -> None:
        self.plan, self.data_rank, self.reads_data = plan, data_rank, reads_data
        self.num_micro_batches = plan.share(data_rank).num_micro_batches
        self.loss = StepLoss(len(plan.domain_names), plan.vocab_size, device, loss_implementation, process_group)
        self._has_loss = has_loss
        self.begun = 0 if resumed is None else resumed.step
        self._keeps_previous = keeps_previous
        self.data = MixedData(
            plan,
            data_rank=data_rank,
            reads_data=reads_data,
            device=device,
            resumed=resumed,
            keeps_previous=keeps_previous,
            journal_dir=record_dir,
        )
        self._record, self._record_dir = None, record_dir or Path()
        if record_dir is not None and dist.get_rank() == 0:
            self._record = self._open_record(record_dir, resumed)

    @property
    def step(self) -> int:
        """Number of steps whose sums have gone to the mixer."""
        return self.data.step

    def next_batch(self) -> Batch | None:
        """This rank's part of the next step, on the CPU; None on a rank that reads no data.

        At most ``data.weight_lag`` steps ahead of the last one submitted.
        """
        return self.data.next_batch()[0]

    def begin_step(self, batch: Batch | None, divided_by: float) -> None:
        """Prepares `loss` for the micro-batches of ``batch``; a rank without a loss submits its zeros here.

        Args:
            divided_by: divisor that the host applies to the sum of losses over micro-batches and data-parallel ranks.

        Raises:
            MegamixError: a loss of the previous step is missing.
        """
        if self.data.step != self.begun:
            raise MegamixError(
                f"step {self.begun + 1} begins, but the losses of step {self.data.step + 1} are not complete: the loss "
                f"must be called once for each of its {self.num_micro_batches} micro-batches. Use the adapter's loss."
            )
        self.begun += 1
        self._write_reports()
        if self.data.step % SETTLE_EVERY == 0:
            self.data.settle()
        if not self._has_loss:
            self.submit_nothing()
            return
        objective = self.data.objective(batch)
        objective = Objective(objective.normaliser / divided_by, objective.loss_weights)
        submit = functools.partial(self._submit, None if batch is None else batch.samples)
        self.loss.start_step(self.num_micro_batches, objective, None, submit)

    def submit_nothing(self) -> None:
        """Ends the step in progress on a rank without a loss."""
        self.data.submit(torch.zeros_like(self.loss.evaluation_sums))

    def _submit(self, samples: StepSamples | None, sums_KC: torch.Tensor) -> None:
        """Submits the sums of the step, and keeps its samples so that the guard can name one with a bad loss."""
        self.data.guard.keep(self.data.step, samples, self.loss.non_finite_counts)
        self.data.submit(sums_KC)

    def state(self, step: int | None = None) -> RunState:
        """State for the host's checkpoint of ``step``; complete on rank 0 only.

        Args:
            step: default: `step`; with ``keeps_previous`` also the one before.

        Raises:
            MegamixError: another step.
        """
        if step is not None and step != self.step:
            if not (self._keeps_previous and step == self.step - 1):
                raise MegamixError(
                    f"a checkpoint of iteration {step} cannot be saved: the data stands after {self.step} steps."
                )
            return self.data.previous_state()
        self.data.settle()
        if self._record is not None:
            self._write_reports()
            self._record.flush()
            write_mix(self._record_dir, self.plan.config, self.step)
        state = self.data.state()
        return state if self._record is None else replace(state, **measure_record(self._record_dir))

    def close(self) -> None:
        """Stops the background threads and closes the record."""
        self.data.close()
        if self._record is not None:
            self._write_reports()
            self._record.close()
            write_mix(self._record_dir, self.plan.config, self.step)

    def _open_record(self, folder: Path, resumed: Resumed | None) -> RunRecord:
        folder.mkdir(parents=True, exist_ok=True)
        state = None if resumed is None else resumed.state
        if state is not None and state.record is not None:
            missing = missing_from_record(folder, state.record, state.step, state.record_ends)
            if missing is not None:
                get_logger().warning("%s", missing)
        record = RunRecord(folder, self.plan.domain_names, None if resumed is None else resumed.step)
        self.data.announce(record)
        write_mix(folder, self.plan.config, self.begun)
        return record

    def _write_reports(self) -> None:
        """Writes the reports of the steps so far; without a record they are dropped, so that memory does not grow."""
        for report in self.data.take_reports():
            if self._record is not None:
                self._record.step(report)


def save_state(path: Path, state: RunState) -> None:
    """Writes the result of `HostRun.state`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(state.to_json(), allow_nan=False) + "\n").encode())


def load_state(path: Path, plan: DataPlan, step: int, anew: str = "begin the data anew") -> Resumed:
    """State to continue from, read by rank 0 for all ranks. Every rank calls it.

    Args:
        step: step of the host's checkpoint.
        anew: what to do without a state, for messages.

    Raises:
        ResumeRefused: the state is missing, unreadable, or of another run or step.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [parse_json(path.read_bytes())]
        except (OSError, ValueError) as error:
            found = [f"{type(error).__name__}: {error}"]
    group: Any = dist.new_group(backend="gloo")
    dist.broadcast_object_list(found, src=0, group=group)
    if not isinstance(found[0], dict):
        raise ResumeRefused(
            f"{path} cannot be read ({found[0]}), so where the data stood is not known. Continue from a checkpoint that "
            f"was saved through the adapter, or {anew}."
        )
    return check_state(found[0], plan, path, step)


def check_state(saved: Mapping[str, Any], plan: DataPlan, path: Path, step: int) -> Resumed:
    """Checked form of the JSON of a state; see `load_state`."""
    state = RunState.from_json(saved, path)
    if state.step != step:
        raise ResumeRefused(
            f"{path} holds the data's state after step {state.step}, but the checkpoint is of step {step}. Continue "
            "from a checkpoint whose parts belong together."
        )
    check_parts(state, path)
    before, now = saved_batches(state.fingerprints), plan.config.batches
    if before.seq_length != now.seq_length:
        raise ResumeRefused(
            f"{path} is of a run with data.seq_length {before.seq_length}, now it is {now.seq_length}. Only `megamix train` goes on with "
            "another length; keep the one that the run was started with."
        )
    if before != now:
        raise ResumeRefused(
            f"{path} is of a run with a global batch of {before.describe()}, now it is {now.describe()}. Only `megamix train` "
            "goes on with another batch; keep the one that the run was started with."
        )
    return resume_from(state, plan, path, data_fingerprints(plan))
