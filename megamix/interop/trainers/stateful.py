"""Micro-batches as an iterable data set with the state protocol of loaders, and the loss that belongs to them.

    mix = MixBatches("mix.yaml", steps=1000, global_batch=64, micro_batch=8, seed=1234)
    loader = StatefulDataLoader(mix, batch_size=None)       # torchdata's: its state holds that of data and mixer
    for inputs, labels in loader:
        mix.loss(model(inputs["input"]), labels).backward()

Conforms to torchdata 0.11 (``stateful_dataloader``). The first micro-batch of a step begins it, the loss of the last
one ends it, so no micro-batch may be read ahead of the losses of the step before. A label carries the domain of its
token, as ``label + domain * vocabulary``. The state is rank 0's, the same under any number of ranks.

Legend: B samples, S tokens, V vocabulary, N labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import IterableDataset, get_worker_info

from megamix.core.errors import InputError, MegamixError, ResumeRefused
from megamix.core.files import parse_json
from megamix.data.loader import IGNORED_LABEL
from megamix.engines.base import local_device
from megamix.interop.trainers.host import (
    HostRun,
    check_state,
    coded_labels,
    decoded_labels,
    host_plan,
    join_group_of_one,
)
from megamix.training.checkpoints.resume import Resumed
from megamix.training.config import DataConfig


class MixBatches(IterableDataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Micro-batches of this rank's part of every global batch, the loss, and the state of data and mixer.

    Args:
        config: YAML with the sections data, mixture and mixer.
        steps, global_batch, micro_batch, seed: of the run.
        data_rank, data_size: number of this rank's slice of every global batch, and of slices.
        divided_by: divisor that the training loop applies to the sum of the losses over micro-batches and ranks: the
            ranks, where DistributedDataParallel takes their mean.
        has_loss: whether this rank calls `loss`; None: not known before the first step.
        overrides: ``key.path=value`` over the config.
        record: folder of ``weights.jsonl``; None: none.
        loss_implementation: ``auto``, ``triton`` or ``torch``.
        host: name of the training loop, for messages.
        parts_documents: whether the loop's attention keeps to a document, which begins where positions are 0.

    Attributes:
        plan: resolved data plan.
        num_micro_batches: micro-batches of this rank in every step.

    Raises:
        InputError: the config is wrong, or does not fit the batches or the data.
    """

    def __init__(
        self,
        config: str | Path,
        *,
        steps: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        divided_by: float = 1.0,
        has_loss: bool | None = True,
        overrides: Sequence[str] = (),
        record: str | Path | None = None,
        loss_implementation: str = "auto",
        host: str = "the training loop",
        parts_documents: bool = False,
    ) -> None:
        train = {"steps": steps, "global_batch": global_batch, "micro_batch": micro_batch, "seed": seed}
        self.plan = host_plan(config, overrides, train, data_size, host)
        _check_attention(self.plan.config.data, host, parts_documents)
        self.num_micro_batches = self.plan.share(data_rank).num_micro_batches
        self._data_rank, self._divided_by, self._has_loss = data_rank, divided_by, has_loss
        self._record = None if record is None else Path(record)
        self._loss_implementation, self._host = loss_implementation, host
        self._run: HostRun | None = None
        self._loaded: dict[str, Any] | None = {"mix": ""}  # None: closed
        self._resumed: Resumed | None = None
        self._calls = 0  # of the loss, in the step in progress
        self._made_group = False
        self._group: Any = None

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Micro-batches from the next step on: int64 [B, S] ``input`` and ``positions``, and the labels [B, S]."""
        if get_worker_info() is not None:
            raise InputError(
                "the samples were asked for in a worker process, where the losses do not arrive. Leave the loader's "
                "num_workers at 0: samples are read in the background as it is."
            )
        run = self._open()
        while run.begun < self.plan.config.train.steps:
            self._finish_step(run)
            batch = run.next_batch()
            assert batch is not None
            if batch.reference is not None:
                raise InputError(
                    f"a reference model's losses cannot travel through {self._host}. Use a mixer without one."
                )
            self._calls = 0
            run.begin_step(batch.to(local_device()), self._divided_by)
            for m in range(run.num_micro_batches):
                tokens_BS = batch.tokens[m]
                # torchtitan makes its causal mask of them, so they are there where they only count, too.
                positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).repeat(tokens_BS.shape[0], 1)
                inputs = {
                    "input": tokens_BS,
                    "positions": positions_BS if batch.positions is None else batch.positions[m],
                }
                yield inputs, coded_labels(batch.labels[m], batch.domains[m], self.plan.vocab_size)

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        tokens: torch.Tensor | float | None = None,
        process_group: Any = None,
    ) -> torch.Tensor:
        """Loss of a micro-batch, divided by the tokens of the global batch; after the last one of a step its sums go to
        the mixer.

        Args:
            logits: [B, S, V], whole on every rank, which predict the next token without a shift.
            labels: int64 [B, S], as the data set gives them.
            tokens: without gradients, in validation, divisor of the sum of losses; None: the labels that count.
            process_group: in training, ranks that share the vocabulary; the logits are then [B, S, V / T] on each of
                its T ranks. None: the logits hold all of it.
        """
        if self._run is None:
            raise MegamixError("the loss was called before the first sample was read, or after the end of the run.")
        label_BS, domain_BS = decoded_labels(labels, self.plan.vocab_size)
        if torch.is_grad_enabled():
            self._calls += 1
            self._run.loss.share_vocabulary(process_group)
            return self._run.loss(logits, (label_BS, domain_BS))
        logits_NV = logits[..., : self.plan.vocab_size].flatten(0, 1).float()
        loss = F.cross_entropy(logits_NV, label_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        return loss / ((label_BS != IGNORED_LABEL).sum() if tokens is None else tokens)

    def state_dict(self) -> dict[str, Any]:
        """State after the last whole step, the same on all ranks; every rank calls it.

        Raises:
            MegamixError: a step is in progress.
        """
        if self._run is None:
            return dict(self._from())
        self._finish_step(self._run)
        if self._run.step != self._run.begun:
            raise MegamixError(
                f"a state was asked for in the middle of step {self._run.begun}, when {self._calls} of its "
                f"{self.num_micro_batches} losses were there. Ask for it between two steps."
            )
        state: list[Any] = [None]
        mine = self._run.state()
        if dist.get_rank() == 0:
            state = [json.dumps(mine.to_json(), allow_nan=False)]
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        dist.broadcast_object_list(state, src=0, group=self._group)
        return {"mix": state[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict``, under any number of ranks; an empty one begins anew.

        Raises:
            ResumeRefused: it is of another run.
        """
        self.close()
        self._resumed, self._loaded = None, dict(state_dict)
        if state_dict.get("mix"):
            where = Path(f"{self._host}'s checkpoint")
            try:
                saved = parse_json(state_dict["mix"])
                step = saved["step"]
            except (ValueError, TypeError, KeyError) as error:
                raise ResumeRefused(
                    f"{where} holds no state of the data ({type(error).__name__}: {error}). Continue from another "
                    "checkpoint, or begin anew."
                ) from error
            self._resumed = check_state(saved, self.plan, where, step)

    def close(self) -> None:
        """Stops the background threads and closes the record; ask for the last state before."""
        if self._run is not None:
            self._run.close()
            self._run = self._loaded = None
            if self._made_group:
                dist.destroy_process_group()
            self._group, self._made_group = None, False

    def _open(self) -> HostRun:
        if self._run is None:
            self._from()
            self._made_group = join_group_of_one()
            self._run = HostRun(
                self.plan,
                data_rank=self._data_rank,
                reads_data=True,
                has_loss=self._has_loss is not False,
                device=local_device(),
                record_dir=self._record,
                resumed=self._resumed,
                loss_implementation=self._loss_implementation,
            )
        return self._run

    def _from(self) -> dict[str, Any]:
        """The state that the run begins with."""
        if self._loaded is None:
            raise MegamixError("the data is closed. Load a state, or make another MixBatches.")
        return self._loaded

    def _finish_step(self, run: HostRun) -> None:
        """Submits zeros for the step in progress where this rank may be one without a loss, and none was called for."""
        if self._has_loss is None and run.step != run.begun and self._calls == 0:
            run.submit_nothing()


def _check_attention(data: DataConfig, host: str, parts_documents: bool) -> None:
    """Refuses an attention that the loop's model does not have."""
    if data.within_documents and not parts_documents:
        raise InputError(
            f"data.attention is document, which is for the model of {host} to do: a document begins where `positions` are 0. "
            "Where it does, give parts_documents=True; else leave data.attention out."
        )
    if parts_documents and data.positions_restart and not data.within_documents:
        raise InputError(
            f"data.reset_position_ids is true and data.attention is sample, but {host} keeps attention within documents where "
            "positions restart. Set data.attention to document, or leave both out."
        )
