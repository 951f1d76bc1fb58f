"""A stand-in for torchtitan 0.3.0: its base classes of dataloader and loss, and the parts of ``Trainer`` that use them.

It follows ``config/configurable.py``, ``components/dataloader.py``, ``components/loss.py`` and ``trainer.py``: the loss
is built before the dataloader; all micro-batches of a step are read before the first forward pass; gradients of ranks
are added up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard


class Configurable:
    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[type | None] = None

        def build(self, **given: Any) -> Any:
            assert self._owner is not None
            return self._owner(config=replace(self), **given)

    def __init_subclass__(cls, **_: Any) -> None:
        if "Config" in cls.__dict__:
            cls.Config._owner = cls


class BaseDataLoader(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        dataset: str = ""
        dataset_path: str | None = None


class BaseLoss(Configurable):
    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass


@contextmanager
def installed() -> Iterator[None]:
    """Context in which these can be imported as torchtitan's."""
    names = ("torchtitan", "torchtitan.components", "torchtitan.components.dataloader", "torchtitan.components.loss")
    modules = {name: ModuleType(name) for name in names}
    vars(modules[names[2]])["BaseDataLoader"] = BaseDataLoader
    vars(modules[names[3]])["BaseLoss"] = BaseLoss
    sys.modules.update(modules)
    yield
    for name in names:
        del sys.modules[name]


class TitanLoop:
    """``Trainer`` with a model of transformers and plain SGD.

    Args:
        batch: sizes of the global batch and of a micro-batch.

    Attributes:
        rows: domains and first labels of the rows of all micro-batches, in order.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        loss: Any,
        data_size: int,
        rank: int,
        *,
        batch: tuple[int, int],
        seq_len: int,
        lr: float,
    ) -> None:
        self.model, self.lr = model, lr
        self.loss_fn = loss.build(compile_config=None)
        self.dataloader = data.build(
            dp_world_size=data_size,
            dp_rank=rank,
            tokenizer=None,
            seq_len=seq_len,
            local_batch_size=batch[1],
            snapshot_every_n_steps=None,
        )
        self.micro_batches = batch[0] // (batch[1] * data_size)
        self.adds_up = data_size > 1
        self.columns: Any = None  # a mesh of ranks that share the logits' columns
        self.rows: list[Any] = []

    def train(self, steps: int, *, has_loss: bool = True) -> list[float]:
        """This rank's part of the loss of each step; a stage without the loss only reads."""
        data_iterator, losses = iter(self.dataloader), []
        for _ in range(steps):
            batches = [next(data_iterator) for _ in range(self.micro_batches)]
            for _, labels in batches:
                self.rows += [[int(row.max()) // 512, (row % 512)[:4].tolist()] for row in labels]
            if has_loss:
                losses.append(sum(self.forward(*batch) for batch in batches))
                self.update()
        return losses

    def forward(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> float:
        # The trainer makes the causal mask of the positions, and refuses to go without.
        logits = self.model(input_ids=inputs["input"], position_ids=inputs["positions"]).logits
        if self.columns is not None:
            own = logits.chunk(self.columns.size(), dim=-1)[self.columns.get_local_rank()]
            logits = DTensor.from_local(own.contiguous(), self.columns, (Shard(2),))
        loss, metrics = self.loss_fn(logits, labels, torch.tensor(1))
        assert metrics == {}
        loss.backward()
        return loss.item()

    def update(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if self.adds_up:
                    dist.all_reduce(parameter.grad)
                parameter -= self.lr * parameter.grad
                parameter.grad = None

    def close(self) -> None:
        self.dataloader.close()
