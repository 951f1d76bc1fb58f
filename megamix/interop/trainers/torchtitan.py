"""Adapter for torchtitan: a dataloader and a loss for its ``Trainer.Config``.

    Trainer.Config(
        dataloader=MixDataLoader.Config(mix="mix.yaml", steps=1000, global_batch_size=64, seed=1234),
        loss=MixLoss.Config(),
        training=TrainingConfig(steps=1000, global_batch_size=64, disable_cuda_graphs=True, ...),
        ...
    )

Conforms to torchtitan 0.3.0 (``components/dataloader.py``, ``components/loss.py``, ``trainer.py``). Data, loss and
state are those of `MixBatches`. The trainer reads all micro-batches of a step before its first forward pass, so the
first one begins the step. A rank whose loss is not called in a step (an earlier pipeline stage) submits zeros when the
next step begins or a checkpoint is written.

Legend: B samples, S tokens, V vocabulary.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components.dataloader import BaseDataLoader  # pyright: ignore[reportMissingImports]
from torchtitan.components.loss import BaseLoss  # pyright: ignore[reportMissingImports]

from megamix.core.errors import InputError
from megamix.interop.trainers.stateful import MixBatches

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
        self.batches: MixBatches | None = None
        _losses[:] = [self]

    def __call__(
        self, pred: torch.Tensor, labels: torch.Tensor, global_valid_tokens: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, which in training is divided by the step's tokens already, and no metrics.

        Args:
            pred: logits [B, S, V], whole on every rank or, under tensor parallelism, divided by columns.
            labels: int64 [B, S], as `MixDataLoader` gives them.
        """
        group = None
        if type(pred) is not torch.Tensor:
            pred, group = _own_columns(pred)
        if self.batches is None:
            raise InputError("the loss was called outside of training. Give MixDataLoader.Config to the trainer too.")
        divisor = 1.0 if global_valid_tokens is None else global_valid_tokens
        return self.batches.loss(pred, labels, divisor, group), {}


def _own_columns(pred: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """This rank's columns of logits that tensor-parallel ranks share, and the group of these ranks; without gradients,
    in validation, all columns, and None.

    Raises:
        InputError: they are divided in another way, or the ranks' parts differ in size.
    """
    shape = ""
    if isinstance(pred, DTensor):
        if pred.placements == (Shard(pred.ndim - 1),) and pred.shape[-1] % pred.device_mesh.size() == 0:
            return (
                (pred.to_local(), pred.device_mesh.get_group())
                if torch.is_grad_enabled()
                else (pred.full_tensor(), None)
            )
        shape = f" of {pred.placements} and {pred.shape[-1]} columns"
    raise InputError(
        f"{HOST}'s logits are a {type(pred).__name__}{shape}; expected a tensor, or columns that are divided equally over "
        "the tensor-parallel ranks. Set parallelism.tensor_parallel_degree to a divisor of the vocabulary size, or to 1, and "
        "spmd_backend to its default."
    )


class MixDataLoader(BaseDataLoader):
    """Micro-batches of this rank's part of every global batch, and the state of data and mixer.

    Args:
        dp_world_size, dp_rank, seq_len, local_batch_size: the trainer's.

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
        self._batches = _losses[0].batches = MixBatches(
            config.mix,
            steps=config.steps,
            global_batch=config.global_batch_size,
            micro_batch=local_batch_size,
            seed=config.seed,
            data_rank=dp_rank,
            data_size=dp_world_size,
            has_loss=None,
            overrides=config.overrides,
            record=config.record or None,
            loss_implementation=_losses[0].implementation,
            host=HOST,
            parts_documents=True,
        )
        length = self._batches.plan.config.data.seq_length
        if length != seq_len:
            raise InputError(f"{HOST}'s seq_len is {seq_len}, but data.seq_length is {length}. Make them the same.")

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        atexit.register(self.close)  # the trainer closes no dataloader
        return iter(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """State for the trainer's checkpoint, the same on all ranks; every rank calls it."""
        return self._batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict``, under any number of ranks; an empty one begins anew.

        Raises:
            ResumeRefused: it is of another run.
        """
        self._batches.load_state_dict(state_dict)

    def close(self) -> None:
        """Stops the background threads and closes the record."""
        atexit.unregister(self.close)
        self._batches.close()
