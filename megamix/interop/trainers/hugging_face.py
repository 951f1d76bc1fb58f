"""Adapter for Hugging Face's ``Trainer``, for continued pretraining and fine-tuning.

    args = TrainingArguments(max_steps=1000, train_sampling_strategy="sequential", ...)
    mix = MixCallback("mix.yaml", args)
    trainer = Trainer(model, args, train_dataset=mix.dataset, compute_loss_func=mix.loss, callbacks=[mix])
    trainer.train(resume_from_checkpoint=...)

Conforms to transformers 4.51 and later with accelerate. Before version 5 the Trainer has no
``train_sampling_strategy``, which is left out there: it shuffles its indices, and the data set passes over them. The
Trainer's arguments set steps, batches and seed. A label carries the domain of its token, as ``label + domain *
vocabulary``, so that the Trainer handles labels as usual. Every checkpoint holds the state of data and mixer in
``trainer_state.json``.

The Trainer reads one micro-batch ahead. At ``data.weight_lag: 1`` each step therefore waits for the mixer's answer to
the previous step; 2 hides the wait.

Legend: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.data.loader import IGNORED_LABEL, Batch
from megamix.engines.models.documents import attended
from megamix.interop.trainers.host import (
    HostRun,
    check_state,
    coded_labels,
    decoded_labels,
    host_plan,
    join_group_of_one,
    refuse_unlike,
)
from megamix.training.plan import DataPlan

HOST = "the Trainer"
FOLDER = "megamix"
"""Folder of weights.jsonl in ``output_dir``."""
ORDER = "train_sampling_strategy"
"""The Trainer's argument for the order of samples; before transformers 5 there is none, and they are shuffled."""


class MixCallback(TrainerCallback, ExportableState):
    """Data set, loss and callback of the Trainer, with their common state.

    Args:
        config: YAML with the sections data, mixture and mixer.
        overrides: ``key.path=value`` over the config.
        loss_implementation: ``auto``, ``triton`` or ``torch``.

    Attributes:
        dataset: for ``train_dataset``: all samples of the run, in order.

    Raises:
        InputError: the arguments do not fit the config or the callback.
    """

    def __init__(
        self,
        config: str | Path,
        args: TrainingArguments,
        overrides: Sequence[str] = (),
        *,
        loss_implementation: str = "auto",
    ) -> None:
        _check_args(args)
        micro_batch = args.per_device_train_batch_size
        train = {
            "steps": args.max_steps,
            "global_batch": micro_batch * args.gradient_accumulation_steps * args.world_size,
            "micro_batch": micro_batch,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        self._plan = host_plan(config, overrides, train, args.world_size, HOST)
        self._loss_implementation = loss_implementation
        # The Trainer takes the mean of a step's losses over ranks, unless it undoes that by itself.
        self._divided_by = 1.0 if args.average_tokens_across_devices else float(args.world_size)
        self._num_ranks = args.world_size
        self._folder = Path(args.output_dir or ".")
        self._run: HostRun | None = None
        self._made_group = False
        self._label_check: Any = None
        self.dataset = MixDataset(self._plan, args.process_index, in_order=hasattr(args, ORDER))

    def validation(self, samples: int | None = None) -> dict[str, Dataset[dict[str, torch.Tensor]]]:
        """For ``eval_dataset``: validation samples by domain name, at most ``samples`` of each; without
        domains that have none."""
        names = self._plan.domain_names
        return {names[index]: _ValidationDataset(self._plan, index, samples) for index in self._plan.evaluated}

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """For ``compute_loss_func``: loss of a micro-batch. After the last one of a step the sums go to the mixer.

        Args:
            outputs: of the model, with ``logits`` [B, S, V], which predict the next token without a shift.
            labels: int64 [B, S], as in `MixDataset`.
        """
        vocabulary = self._plan.vocab_size
        label_BS, domain_BS = decoded_labels(labels, vocabulary)
        if torch.is_grad_enabled():
            if self._run is None:
                raise MegamixError("the loss was called outside of training. Give the MixCallback to the Trainer too.")
            return self._run.loss(outputs.logits, (label_BS, domain_BS))
        logits_NV = outputs.logits[..., :vocabulary].flatten(0, 1).float()
        loss = F.cross_entropy(logits_NV, label_BS.flatten(), ignore_index=IGNORED_LABEL)
        return loss * self._divided_by / self._num_ranks

    # Called by the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the data, at the position of the checkpoint if the Trainer continues from one."""
        model = kwargs.get("model")
        _check_model(model, self._plan)
        if isinstance(model, torch.nn.Module):
            self._label_check = model.register_forward_pre_hook(_refuse_labels, with_kwargs=True)
        resumed = None
        if state.global_step > 0:
            saved: Any = state.stateful_callbacks or {}
            mix = saved.get(type(self).__name__, {}).get("attributes", {}).get("mix")
            if mix is None:
                raise ResumeRefused(
                    f"the checkpoint of step {state.global_step} was saved without this callback, so where the data stood "
                    "is not known. Continue from one that was saved with it, or begin anew."
                )
            resumed = check_state(mix, self._plan, self._folder, state.global_step)
        self._made_group = join_group_of_one()
        self._run = HostRun(
            self._plan,
            data_rank=args.process_index,
            reads_data=True,
            has_loss=True,
            device=args.device,
            record_dir=self._folder / FOLDER,
            resumed=resumed,
            loss_implementation=self._loss_implementation,
        )
        self.dataset.open(self._run)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._run is not None
        batch = self.dataset.batch(self._run.begun)
        if batch.reference is not None:
            raise InputError(
                f"a reference model's losses cannot travel through {HOST}. Use a mixer without a reference."
            )
        self._run.begin_step(batch, self._divided_by)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._label_check is not None:
            self._label_check.remove()
            self._label_check = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._run is not None
        self._run.close()
        self._run = None
        if self._made_group:
            dist.destroy_process_group()
            self._made_group = False

    def state(self) -> dict[str, Any]:
        """Entry of ``trainer_state.json``; called on the rank that writes it."""
        return {"args": {}, "attributes": {"mix": None if self._run is None else self._run.state().to_json()}}


class MixDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples of a run in the Trainer's order: micro-batch i goes to rank i mod R of R.

    The sample of an index is known only when its step is due. So the indices must be read in order; or, where the
    Trainer has no order but a shuffled one, they mean nothing, and every call has this rank's next sample.
    """

    def __init__(self, plan: DataPlan, rank: int, *, in_order: bool) -> None:
        self._plan = plan
        self._rank = rank
        self._in_order = in_order
        self._num_read = 0  # samples of this rank
        self._run: HostRun | None = None
        self._batches: deque[Batch] = deque()
        self._first = 0  # step of the first of these batches

    def open(self, run: HostRun) -> None:
        """Reads from ``run`` from now on."""
        self._run, self._first = run, run.step
        self._batches.clear()
        self._num_read = run.step * run.num_micro_batches * self._plan.config.train.micro_batch

    def batch(self, step: int) -> Batch:
        """This rank's part of a step; drops the steps before it.

        Raises:
            MegamixError: the step is not due yet, or was dropped.
        """
        while step > self._first and self._batches:
            self._batches.popleft()
            self._first += 1
        return self._at(step)

    def __len__(self) -> int:
        return self._plan.total_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        micro_batch = self._plan.config.train.micro_batch
        if self._in_order:
            number, row = divmod(index, micro_batch)
            own, rank = divmod(number, self._plan.data_size)
        else:
            rank, (own, row) = self._rank, divmod(self._num_read, micro_batch)
            self._num_read += 1
        if rank != self._rank:
            raise MegamixError(
                f"sample {index} was asked for on rank {self._rank}, but it is rank {rank}'s: micro-batches must go round "
                "the ranks. Leave the sampler and the accelerator's settings for data as they are."
            )
        step, m = divmod(own, self._plan.share(rank).num_micro_batches)
        batch = self._at(step)
        return _sample(batch, (m, row), self._plan)

    def _at(self, step: int) -> Batch:
        if self._run is None:
            raise MegamixError("samples are asked for before training. Give the MixCallback to the Trainer too.")
        # One step is read ahead of the one in progress; which samples come after that is not known yet.
        if not self._first <= step <= self._run.begun + 1:
            raise MegamixError(
                f"samples of step {step + 1} are asked for while step {self._run.begun} is in progress. Leave the order of "
                "the samples as it is."
            )
        while step >= self._first + len(self._batches):
            batch = self._run.next_batch()
            assert batch is not None
            self._batches.append(batch)
        return self._batches[step - self._first]


class _ValidationDataset(Dataset[dict[str, torch.Tensor]]):
    """Validation samples of one domain."""

    def __init__(self, plan: DataPlan, index: int, samples: int | None) -> None:
        self._index, self._plan = index, plan
        available = plan.validation[index].num_windows(plan.config.data.seq_length)
        self._num_samples = available if samples is None else min(samples, available)
        self._reader = plan.reader(plan.validation)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._num_samples:
            raise IndexError(index)
        domain, sample, row = np.array([[self._index], [index], [0]])
        batch = self._reader.batch(domain, sample, row, (1, 1))
        return _sample(batch, (0, 0), self._plan)


def _sample(batch: Batch, place: tuple[int, int], plan: DataPlan) -> dict[str, torch.Tensor]:
    """One row of a batch, in the form that the Trainer's collators take."""
    coded_S = coded_labels(batch.labels[place], batch.domains[place], plan.vocab_size)
    sample = {"input_ids": batch.tokens[place], "labels": coded_S}
    if batch.positions is None:
        return sample
    positions_S = batch.positions[place]
    # Without a mask, transformers keeps documents apart where positions restart, or does not, by version and settings.
    mask = attended(positions_S[None]) if plan.config.data.within_documents else torch.ones_like(positions_S)
    return {**sample, "position_ids": positions_S, "attention_mask": mask}


def _check_args(args: TrainingArguments) -> None:
    """Refuses arguments that would change the order of the samples or skip the callback."""
    if args.max_steps <= 0:
        raise InputError(
            f"{HOST}'s max_steps is {args.max_steps}, expected the steps of the run: an online mixture has no epochs."
        )
    accelerator: Any = args.accelerator_config
    order = (ORDER, "sequential") if hasattr(args, ORDER) else ("group_by_length", False)
    for option, seen, wanted, remedy in (
        (order[0], getattr(args, order[0]), order[1], "The blend has shuffled already."),
        ("dataloader_num_workers", args.dataloader_num_workers, 0, "Samples are read in the background as it is."),
        ("ignore_data_skip", args.ignore_data_skip, False, "A resumed run goes on in the data."),
        ("auto_find_batch_size", args.auto_find_batch_size, False, "A step is one global batch, always of one size."),
        ("restore_callback_states_from_checkpoint", args.restore_callback_states_from_checkpoint, False,
         "The callback restores itself."),
        ("label_smoothing_factor", args.label_smoothing_factor, 0.0, "The mixer's loss is the plain cross-entropy."),
        ("n_gpu", max(args.n_gpu, 1), 1, "Start one process per GPU, with torchrun."),
        ("accelerator_config.split_batches", accelerator.split_batches, False, "Leave it out."),
        ("accelerator_config.dispatch_batches", accelerator.dispatch_batches or False, False, "Every rank reads."),
    ):  # fmt: skip
        refuse_unlike(HOST, option, seen, wanted, remedy)
    if getattr(args, "parallelism_config", None) is not None:
        raise InputError(f"{HOST}'s parallelism_config is set; only data parallelism is supported here. Leave it out.")


def _refuse_labels(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises InputError where labels reach the model; the Trainer withholds them where it has a loss function."""
    if kwargs.get("labels") is not None:
        raise InputError(
            f"the labels reached the model, which would take a domain for a token: {HOST} has no loss function. Give it "
            "compute_loss_func=mix.loss."
        )


def _check_model(model: Any, plan: DataPlan) -> None:
    config = getattr(model, "config", None)
    entries = getattr(config, "vocab_size", None)
    if entries is not None and entries < plan.vocab_size:
        raise InputError(
            f"the model has {entries} tokens, but the data's tokenizer knows {plan.vocab_size} ids. Prepare the data with "
            "the model's tokenizer (megamix prepare --tokenizer hf:NAME)."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < plan.config.data.seq_length:
        raise InputError(
            f"data.seq_length is {plan.config.data.seq_length}, but the model has {positions} positions. Lower it."
        )
    if plan.config.data.within_documents:
        _check_takes_masks(config, plan.config.data.seq_length)


def _check_takes_masks(config: Any, seq_length: int) -> None:
    """Refuses models that would not take a mask of [S, S] for every sample, or would drop their own for it."""
    attention = getattr(config, "_attn_implementation", None)
    if attention != "sdpa":
        raise InputError(
            f"data.attention is document, and the model's attn_implementation is {attention!r}, expected 'sdpa', which takes the "
            "masks of documents as they are. Load it with attn_implementation='sdpa', or leave data.attention out."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < seq_length:
        raise InputError(
            f"data.attention is document, but the model's own attention ends after {window} tokens (sliding_window), fewer than "
            f"data.seq_length {seq_length}, and masks of documents would take its place. Leave data.attention out."
        )
