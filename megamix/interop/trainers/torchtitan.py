"""Adapter for torchtitan: a dataloader and a loss for its ``Trainer.Config``.

    Trainer.Config(
        dataloader=MixDataLoader.Config(mix="mix.yaml", steps=1000, global_batch_size=64, seed=1234),
        loss=MixLoss.Config(),
        training=TrainingConfig(steps=1000, global_batch_size=64, disable_cuda_graphs=True, ...),
        ...
    )

Conforms to torchtitan 0.3.0 (``components/dataloader.py``, ``components/loss.py``, ``trainer.py``). The trainer reads
all micro-batches of a step before its first forward pass, so the first one begins the step. A label carries the domain
of its token, as ``label + domain * vocabulary``. A rank whose loss is not called in a step (an earlier pipeline stage)
submits zeros when the next step begins or a checkpoint is written. The state in the checkpoint is rank 0's, the same
under any number of ranks.

Legend: B samples, S tokens, V vocabulary, N labels.
"""

from __future__ import annotations

import atexit
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchtitan.components.dataloader import BaseDataLoader  # pyright: ignore[reportMissingImports]
from torchtitan.components.loss import BaseLoss  # pyright: ignore[reportMissingImports]

from megamix.core.errors import InputError
from megamix.data.loader import IGNORED_LABEL
from megamix.engines.base import local_device
from megamix.interop.trainers.host import HostRun, check_state, host_plan
from megamix.training.checkpoints.resume import Resumed

HOST = "torchtitan"
_losses: list[MixLoss] = []
"""The loss of this process, if the trainer was given one."""


class MixLoss(BaseLoss):
    """Loss of a micro-batch; after the last one of a step the sums go to the mixer."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Settings of the loss.

        Attributes:
            implementation: ``auto``, ``triton`` or ``torch``.
        """

        implementation: str = "auto"

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.implementation = config.implementation
        self.calls = 0
        self.run: HostRun | None = None
        _losses[:] = [self]

    def __call__(
        self, pred: torch.Tensor, labels: torch.Tensor, global_valid_tokens: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, which in training is divided by the step's tokens already, and no metrics.

        Args:
            pred: logits [B, S, V], whole on every rank.
            labels: int64 [B, S], as `MixDataLoader` gives them.
        """
        if type(pred) is not torch.Tensor:
            raise InputError(
                f"{HOST}'s logits are a {type(pred).__name__}, divided over ranks; that is not supported here. Set "
                "parallelism.tensor_parallel_degree to 1 and spmd_backend to its default."
            )
        run = self.run
        if run is None:
            raise InputError("the loss was called outside of training. Give MixDataLoader.Config to the trainer too.")
        vocabulary = run.plan.vocab_size
        counted_BS = labels >= 0
        label_BS = torch.where(counted_BS, labels % vocabulary, IGNORED_LABEL)
        if torch.is_grad_enabled():
            self.calls += 1
            return run.loss(pred, (label_BS, torch.where(counted_BS, labels // vocabulary, 0))), {}
        logits_NV = pred[..., :vocabulary].flatten(0, 1).float()
        loss = F.cross_entropy(logits_NV, label_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


class MixDataLoader(BaseDataLoader):
    """Micro-batches of this rank's part of every global batch, and the state of data and mixer.

    Args:
        dp_world_size, dp_rank, seq_length, local_batch_size: the trainer's.

    Raises:
        InputError: the config does not fit the trainer or the data, or the loss is another.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Settings of the data.

        Attributes:
            mix: YAML with the sections data, mixture and mixer.
            overrides: ``key.path=value`` over it.
            steps, global_batch_size, seed: as in the trainer's ``training`` and ``debug``.
            record: folder of ``weights.jsonl``; empty for none.
        """

        mix: str = "mix.yaml"
        overrides: tuple[str, ...] = ()
        steps: int = 0
        global_batch_size: int = 0
        seed: int = 0
        record: str = "outputs/megamix"

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        **_: Any,
    ) -> None:
        if not _losses:
            raise InputError(f"{HOST}'s loss cannot read the labels of MixDataLoader. Give loss=MixLoss.Config().")
        self._loss, self._rank = _losses[0], dp_rank
        train = {
            "steps": config.steps,
            "global_batch": config.global_batch_size,
            "micro_batch": local_batch_size,
            "seed": config.seed,
        }
        self._plan = host_plan(config.mix, config.overrides, train, dp_world_size, HOST)
        length = self._plan.config.data.seq_length
        if length != seq_len:
            raise InputError(f"{HOST}'s seq_len is {seq_len}, but data.seq_length is {length}. Make them the same.")
        self._record = Path(config.record) if config.record else None
        self._resumed: Resumed | None = None
        self._run: HostRun | None = None

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        run = self._open()
        while run.begun < self._plan.config.train.steps:
            self._finish_step(run)
            batch = run.next_batch()
            assert batch is not None
            if batch.reference is not None:
                raise InputError(f"a reference model's losses cannot travel through {HOST}. Use a mixer without one.")
            self._loss.calls = 0
            run.begin_step(batch.to(local_device()), divided_by=1.0)
            for m in range(run.num_micro_batches):
                labels_BS = batch.labels[m]
                coded_BS = torch.where(labels_BS >= 0, labels_BS + batch.domains[m] * self._plan.vocab_size, labels_BS)
                inputs = {"input": batch.tokens[m]}
                if batch.positions is not None:
                    inputs["positions"] = batch.positions[m]
                yield inputs, coded_BS

    def state_dict(self) -> dict[str, Any]:
        """State for the trainer's checkpoint, the same on all ranks; every rank calls it."""
        if self._run is None:
            return {"mix": ""}
        self._finish_step(self._run)
        state: list[Any] = [None]
        mine = self._run.state()
        if dist.get_rank() == 0:
            state = [json.dumps(mine.to_json(), allow_nan=False)]
        group: Any = dist.new_group(backend="gloo")
        dist.broadcast_object_list(state, src=0, group=group)
        return {"mix": state[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict``, under any number of ranks; an empty one begins anew.

        Raises:
            ResumeRefused: it is of another run.
        """
        if state_dict.get("mix"):
            saved = json.loads(state_dict["mix"])
            self._resumed = check_state(saved, self._plan, Path(f"{HOST}'s checkpoint"), saved["step"])

    def close(self) -> None:
        """Stops the background threads and closes the record."""
        atexit.unregister(self.close)
        if self._run is not None:
            self._run.close()
            self._run = None

    def _open(self) -> HostRun:
        if self._run is None:
            self._run = self._loss.run = HostRun(
                self._plan,
                data_rank=self._rank,
                reads_data=True,
                has_loss=True,
                device=local_device(),
                record_dir=self._record,
                resumed=self._resumed,
                loss_implementation=self._loss.implementation,
            )
            atexit.register(self.close)  # the trainer closes no dataloader
        return self._run

    def _finish_step(self, run: HostRun) -> None:
        """Submits zeros for the step in progress where this rank's loss was not called."""
        if run.step != run.begun and self._loss.calls == 0:
            run.submit_nothing()
