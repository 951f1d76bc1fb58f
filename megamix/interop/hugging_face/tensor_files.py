"""Writer of safetensors files with one tensor in memory at a time.

The library's ``save_file`` needs all tensors of a file at once. A file is the length of the head (8 bytes,
little-endian), the head (JSON: type, shape and place of every tensor, padded with spaces), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megamix.engines.models.pretrained import INDEX, SINGLE

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorSpec:
    """Name and shape of a tensor to write."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def write_tensors(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterator[torch.Tensor],
    dtype: torch.dtype,
    max_bytes: int,
) -> None:
    """Writes ``model.safetensors``, or shards of at most ``max_bytes`` with their index, as transformers reads them.

    Args:
        tensors: in the order and shapes of ``specs``; each is converted to ``dtype``.
        max_bytes: limit of a shard; a larger tensor has its own shard.
    """
    shards = _cut(specs, dtype.itemsize, max_bytes)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        places = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.size for spec in specs) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, tensors, dtype)


def _cut(specs: Sequence[TensorSpec], itemsize: int, max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size * itemsize > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size * itemsize
    return shards


def _write(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[torch.Tensor], dtype: torch.dtype) -> None:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.size * dtype.itemsize
        head[spec.name] = {"dtype": _TYPES[dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(head).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            tensor = next(tensors)
            assert tuple(tensor.shape) == spec.shape, (spec, tensor.shape)
            # As bytes, because numpy has no bfloat16.
            file.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
