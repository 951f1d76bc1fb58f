"""Token columns of MosaicML streaming's MDS folders: ``index.json`` and shards.

    shard    samples u32 = S | S + 1 offsets u32 | the writer's columns, JSON | S samples
    sample   sizes u32 of the columns of variable size | the columns' bytes

Source: ``streaming/base/format/mds`` of mosaicml-streaming 0.13. Its own reader opens the shard anew for each sample,
decodes all columns, pickled ones too, and needs torch and the clients of three clouds; this one reads the token column
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.files import read_json
from megamix.prepare.kinds import DAMAGED, decompressed

INDEX = "index.json"
COLUMNS = ("tokens", "input_ids")
_ENDINGS = {"zstd": ".zst", "gz": ".gz", "bz2": ".bz2"}
_MOST_BYTES = 1 << 32  # offsets have 32 bits
_VALUE_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_SHAPE_TYPES = ("u1", "<u2", "<u4", "<u8")
_OF_BYTES = "int64"  # what llm-foundry writes under the encoding "bytes", and reads by default


@dataclass(frozen=True)
class _Shard:
    path: Path
    packed: str | None
    num_bytes: int
    num_samples: int
    sizes: tuple[int | None, ...]
    """Bytes of each column; None for one of variable size."""
    column: int
    encoding: str


@dataclass(frozen=True)
class MdsFolder:
    """A folder of MDS shards."""

    path: Path
    shards: tuple[_Shard, ...]
    dtype: str | None
    """Type of the ids in a column of bytes."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards, not compressed."""
        return sum(shard.num_bytes for shard in self.shards)

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each shard, and how many each of its samples has, int64 [samples].

        Raises:
            InputError: a shard is damaged.
        """
        for shard in self.shards:
            tokens = [_decoded(shard, number, data, self.dtype) for number, data in _samples(shard)]
            if tokens:
                yield np.concatenate(tokens), np.array([len(each) for each in tokens], np.int64)


def is_mds(folder: Path) -> bool:
    """Whether a folder has the index of MDS shards."""
    return (folder / INDEX).is_file()


def open_mds(folder: Path, dtype: str | None) -> MdsFolder:
    """Opens a folder.

    Args:
        dtype: type of the ids in a column of bytes; None for llm-foundry's.

    Raises:
        InputError: a missing shard, no column of tokens, or a format or compression that is not read.
    """
    index = read_json(folder / INDEX, "the index of MDS shards", damaged="Copy the folder again.")
    try:
        shards = tuple(_shard(folder, info) for info in index["shards"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX} is no index of MDS shards ({error!r}). Check the path.") from error
    return MdsFolder(folder, shards, dtype)


def _shard(folder: Path, info: Mapping[str, Any]) -> _Shard:
    if info["format"] != "mds" or info["version"] != 2:
        raise InputError(
            f"{folder / INDEX} has shards of format {info['format']}, version {info['version']}, expected mds, version 2."
        )
    names, encodings = info["column_names"], info["column_encodings"]
    found = [number for number, name in enumerate(names) if name in COLUMNS]
    if len(found) != 1:
        raise InputError(
            f"{folder} has the columns {', '.join(names)}, expected one of token ids: {' or '.join(COLUMNS)}. Text is for"
            " `megamix prepare`, from .jsonl or .parquet."
        )
    encoding = encodings[found[0]]
    if encoding.partition(":")[0] not in ("bytes", "ndarray"):
        raise InputError(f"{folder}: the column '{names[found[0]]}' is of {encoding}, expected bytes or ndarray.")
    raw, packed = info["raw_data"], None
    path = folder / raw["basename"]
    if not path.is_file() and info["zip_data"]:
        packed = info["compression"].partition(":")[0]
        path = folder / info["zip_data"]["basename"]
        if packed not in _ENDINGS:
            raise InputError(
                f"{path} is compressed by {packed}, expected {', '.join(_ENDINGS)}. Unpack the shards beside it first."
            )
    if not path.is_file():
        raise InputError(f"{path}, named in {INDEX}, is missing. Copy the folder again.")
    if raw["bytes"] > _MOST_BYTES or (packed is None and path.stat().st_size != raw["bytes"]):
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, expected {raw['bytes']:,}. Copy the folder again.")
    return _Shard(path, packed, raw["bytes"], info["samples"], tuple(info["column_sizes"]), found[0], encoding)


def _samples(shard: _Shard) -> Iterator[tuple[int, memoryview]]:
    """Number and token column of each sample."""
    data = _contents(shard)
    starts = 4 + 4 * (shard.num_samples + 1)
    offsets = np.frombuffer(data[4:starts], "<u4").astype(np.int64) if len(data) >= starts else np.empty(0, np.int64)
    count = int.from_bytes(data[:4], "little")
    if (
        count != shard.num_samples
        or len(offsets) != count + 1
        or offsets[0] < starts
        or offsets[-1] != len(data)
        or (np.diff(offsets) < 0).any()
    ):
        raise InputError(f"{shard.path} is damaged: its offsets do not fit {shard.num_samples} samples. Copy it again.")
    variable = [number for number, size in enumerate(shard.sizes) if not size]
    fixed = [size or 0 for size in shard.sizes]
    for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        body = start + 4 * len(variable)
        sizes = list(fixed)
        for place, size in zip(variable, np.frombuffer(data[start:body], "<u4").tolist(), strict=False):
            sizes[place] = size
        if body + sum(sizes) != end:
            raise InputError(
                f"{shard.path} is damaged: sample {number} has {end - start} bytes, its columns {sum(sizes)}. Copy it again."
            )
        at = body + sum(sizes[: shard.column])
        yield number, data[at : at + sizes[shard.column]]


def _contents(shard: _Shard) -> memoryview:
    """The bytes of a shard; never more than the index says."""
    if shard.packed is None:
        return np.memmap(shard.path, np.uint8, "r").data
    data = bytearray()
    try:
        with open(shard.path, "rb") as file:
            for piece in decompressed(file, "shard" + _ENDINGS[shard.packed]):
                data += piece
                if len(data) > shard.num_bytes:
                    break
    except DAMAGED as error:
        raise InputError(f"{shard.path} is damaged or cut short ({error}). Copy it again.") from error
    if len(data) != shard.num_bytes:
        raise InputError(f"{shard.path} has another size than {INDEX} says, {shard.num_bytes:,} bytes. Copy it again.")
    return memoryview(data)


def _decoded(shard: _Shard, number: int, data: memoryview, dtype: str | None) -> np.ndarray:
    kind, *given = shard.encoding.split(":")
    try:
        if kind == "bytes":
            return np.frombuffer(data, np.dtype(dtype or _OF_BYTES).newbyteorder("<"))
        at = 0
        if given:
            found = np.dtype(given[0]).newbyteorder("<")
        else:
            found, at = np.dtype(_VALUE_TYPES[data[0]]), 1
        if len(given) < 2:
            num_dimensions, shape_type = data[at] >> 2, _SHAPE_TYPES[data[at] % 4]
            end = at + 1 + num_dimensions * np.dtype(shape_type).itemsize
            shape, at = np.frombuffer(data[at + 1 : end], shape_type).tolist(), end
        else:
            shape = list(map(int, given[1].split(",")))
        tokens = np.frombuffer(data[at:], found)
        if found.kind not in "iu" or len(tokens) != math.prod(shape):
            raise ValueError(f"{len(tokens)} values of {found.name}, expected {shape} integers")
        return tokens
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{shard.path}, sample {number}: its {len(data)} bytes are no token ids of {shard.encoding} ({error})."
            + (" Name the type of the ids with --dtype." if kind == "bytes" else " Copy it again.")
        ) from error
