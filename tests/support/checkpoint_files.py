"""Checkpoints of a model of a few numbers, written and read by the trainer's own functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megamix.engines.base import ParameterState
from megamix.training.checkpoints.saving import CheckpointWriter, load_engine
from megamix.training.config import CheckpointConfig

SIZE = 50
FILES = ["layers/00000.safetensors", "layers/00001.safetensors", "layers/00002.safetensors", "state.json"]


class TinyEngine:
    """Three layers of one parameter each, all of whose numbers follow from `step`; ``own`` names those of this rank."""

    def __init__(self, own: tuple[int, ...] = (0, 1, 2), size: int = SIZE) -> None:
        self.place = SimpleNamespace(data_rank=0, is_first_copy=True)
        self.optimizer_steps = 0
        self._own = own
        self.held = {layer: {part: torch.zeros(size) for part in ("weight", "exp_avg", "exp_avg_sq")} for layer in own}

    def go_to(self, step: int) -> None:
        """Changes the numbers in place, as an optimizer does."""
        for layer, parts in self.held.items():
            for number, tensor in enumerate(parts.values()):
                tensor.copy_(torch.arange(len(tensor)) + 1000 * step + 100 * layer + 0.25 * number)

    def layers(self) -> list[int]:
        return list(self._own)

    layers_to_load = layers

    def layer_state(self, layer: int) -> Iterator[tuple[str, ParameterState]]:
        yield f"h.{layer}", ParameterState(**self.held[layer])

    def load_layer_state(self, layer: int, state: dict[str, ParameterState]) -> None:
        self.held[layer] = {part: getattr(state[f"h.{layer}"], part) for part in self.held[layer]}

    def equals(self, other: TinyEngine) -> bool:
        pairs = [(self.held[layer][part], other.held[layer][part]) for layer in self._own for part in self.held[layer]]
        return all(torch.equal(one, two) for one, two in pairs)


def engine_at(step: int, **how: Any) -> Any:
    engine = TinyEngine(**how)
    engine.go_to(step)
    return engine


def loads(path: Path, step: int, size: int = SIZE, value: int | None = None) -> bool:
    """Whether a checkpoint, all hashes checked, is that of ``step``, with the numbers of step ``value`` if given."""
    engine: Any = TinyEngine()
    load_engine(path, engine, step)
    return engine.equals(engine_at(step if value is None else value, size=size)) and engine.optimizer_steps == step


@contextmanager
def job(folder: Path, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
    """A job of this process, or of several that name the same folder; gives its group."""
    store = f"file://{(folder / 'store').absolute()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        (folder / "store").unlink(missing_ok=True)


def write(folder: Path, steps: list[int], group: Any, state: dict[str, Any] | None = None, **config: Any) -> None:
    """The checkpoints of some steps, in this order; a job of one rank."""
    writer = CheckpointWriter(folder, engine_at(0), CheckpointConfig(**{"keep": 100, **config}), group)
    with writer:
        for step in steps:
            writer._engine = engine_at(step)
            writer.save(step, state or {})


def flip(path: Path, bit: int | None = None) -> None:
    """Changes one bit, of the middle if not said otherwise."""
    bit = 8 * (path.stat().st_size // 2) if bit is None else bit
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (before,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([before ^ 1 << bit % 8]))
