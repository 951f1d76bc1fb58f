"""Lines of a run of many domains: what has a number for each domain lies in a binary file beside them.

A list of 40,000 numbers is 0.7 MB of text, and most of them are what they were a step ago. So where a run has more than
`MOST_IN_TEXT` domains, a line of ``NAME.jsonl`` keeps its numbers, and says under ``arrays`` at which byte of
``NAME.bin`` each of its arrays begins, by key (``segment.counts``: ``counts`` of ``segment``):

    kind u8 | dtype u8 | 6 zero bytes | number of values i64 = n | byte of the base i64
    | n places int32, where the kind has such | n values

of kind 0: all values; 1: values at places, 0 elsewhere; 2: values at places, those of the base elsewhere; 3: n bytes of
JSON, the names. All numbers are little-endian. A chain of bases ends after `CHAIN`, so that reading one array reads few
others. Lines of runs with fewer domains are as they ever were.
"""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.files import AppendFile, parse_json, remove, write_failed

MOST_IN_TEXT = 256
CHAIN = 64
ARRAYS = "arrays"
_HEADER = struct.Struct("<BB6xqq")
_WHOLE, _SPARSE, _CHANGED, _NAMES = range(4)
_DTYPES = (np.dtype("<f8"), np.dtype("<i8"))
_PLACE = np.dtype("<i4")
Array = NDArray[Any]


def side_path(path: Path) -> Path:
    """The binary file of a .jsonl record."""
    return path.with_suffix(".bin")


class WideWriter:
    """Moves the arrays of lines to the binary file of their record, opened with the first of them.

    Args:
        path: the .jsonl record.
        kept: the lines that the record holds; without any it begins anew.
    """

    def __init__(self, path: Path, kept: Sequence[Mapping[str, Any]] = ()) -> None:
        self._path = side_path(path)
        self._file: AppendFile | None = None
        self._names: tuple[list[str], int] | None = None
        self._last: dict[str, tuple[Array, int, int]] = {}  # by key: the array, its byte, and the length of its chain
        if kept:
            _keep_places(self._path, kept)
        else:
            remove(self._path)

    def packed(self, line: Mapping[str, Any]) -> Mapping[str, Any]:
        """The line to write."""
        names = line["domain_names"]
        if len(names) <= MOST_IN_TEXT:
            return line
        if self._file is None:
            self._file = AppendFile(self._path)
        if self._names is None or self._names[0] != names:
            self._names = list(names), self._write(_NAMES, 0, json.dumps(list(names)).encode())
        arrays = {"domain_names": self._names[1]}
        rest = self._strip(line, "", len(names), arrays)
        return {**rest, ARRAYS: arrays}

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _strip(self, part: Mapping[str, Any], prefix: str, number: int, arrays: dict[str, int]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in part.items():
            if isinstance(value, Mapping):
                kept[key] = self._strip(value, f"{prefix}{key}.", number, arrays)
            elif key == "domain_names":
                continue
            elif (array := _numbers(value, number)) is not None:
                arrays[prefix + key] = self._array(prefix + key, array)
            else:
                kept[key] = value
        return kept

    def _array(self, key: str, array: Array) -> int:
        before = self._last.get(key)
        base, chain, kind = 0, 0, _WHOLE
        places = np.flatnonzero(array)
        if before is not None and before[0].dtype == array.dtype and before[2] < CHAIN:
            changed = np.flatnonzero(array.view(np.int64) != before[0].view(np.int64))
            if 2 * changed.size < array.size and changed.size < places.size:
                places, base, chain, kind = changed, before[1], before[2] + 1, _CHANGED
        if kind == _WHOLE and 2 * places.size < array.size:
            kind = _SPARSE
        values = array if kind == _WHOLE else array[places]
        body = b"" if kind == _WHOLE else places.astype(_PLACE).tobytes()
        at = self._write(kind, base, body + values.tobytes(), _DTYPES.index(array.dtype), values.size)
        self._last[key] = array, at, chain
        return at

    def _write(self, kind: int, base: int, body: bytes, dtype: int = 0, number: int | None = None) -> int:
        assert self._file is not None
        at = self._file.size
        self._file.write(_HEADER.pack(kind, dtype, len(body) if number is None else number, base) + body)
        return at


def _keep_places(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Fills up a file that was cut, so that no array to come begins where a line looks for one that is lost.

    Raises:
        MegamixError: it cannot be written.
    """
    arrays = (line.get(ARRAYS) for line in lines)
    named = {
        at for each in arrays if isinstance(each, Mapping) for at in each.values() if isinstance(at, int) and at >= 0
    }
    if not named:
        return
    last = max(named)
    try:
        size = path.stat().st_size if path.exists() else 0
        if _end_of(path, last, size) <= size:
            return
        with path.open("ab") as file:
            # The array that the cut goes through is made unreadable as well: its end would be other bytes.
            cut = max((at for at in named if at < size), default=0)
            if _end_of(path, cut, size) > size:
                file.truncate(cut)
            file.truncate(max(last + _HEADER.size, size))
    except OSError as error:
        raise write_failed(path, error) from error


def _end_of(path: Path, at: int, size: int) -> int:
    """The byte after the array at byte ``at``, by its header; beyond ``size`` where that is not there."""
    if at + _HEADER.size > size:
        return at + _HEADER.size
    with path.open("rb") as file:
        file.seek(at)
        kind, _, number, _ = _HEADER.unpack(file.read(_HEADER.size))
    return at + _HEADER.size + number * {_WHOLE: 8, _NAMES: 1}.get(kind, 4 + 8)


def _numbers(value: Any, number: int) -> Array | None:
    """Values of a line with a number for each domain, NaN for None; None where they are something else."""
    if not isinstance(value, list | np.ndarray) or len(value) != number:
        return None
    array = np.asarray(value)
    if array.dtype.kind == "O" and all(each is None or isinstance(each, int | float) for each in array.tolist()):
        return array.astype(_DTYPES[0])
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        return None
    return array.astype(_DTYPES[0] if array.dtype.kind == "f" else _DTYPES[1])


class WideReader:
    """Arrays of a binary file, by the byte they begin at; those read last are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[int, list[str]] = {}
        self._kept: OrderedDict[tuple[int, int], Array] = OrderedDict()

    def names(self, at: int) -> list[str]:
        """The names at byte ``at``.

        Raises:
            InputError: see `array`.
        """
        if at not in self._names:
            with self._said(at):
                self._names[at] = self._read_names(at)
        return self._names[at]

    def array(self, at: int, num_domains: int) -> Array:
        """The array [K] at byte ``at``; not to be written to.

        Raises:
            InputError: the file is missing or cut off, or holds something else there.
        """
        key = at, num_domains
        if key not in self._kept:
            with self._said(at):
                self._kept[key] = self._read(at, num_domains)
            if len(self._kept) > 4 * CHAIN:
                self._kept.popitem(last=False)
        return self._kept[key]

    @contextmanager
    def _said(self, at: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot read {self._path}: {error.strerror or error}. It belongs to the record beside it: copy both."
            ) from error
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise InputError(
                f"{self._path} is damaged at byte {at} ({error}). Put it back as the run wrote it, or resume the run from "
                "a checkpoint before it."
            ) from error

    def _read_names(self, at: int) -> list[str]:
        with self._path.open("rb") as file:
            file.seek(at)
            kind, _, number, _ = _HEADER.unpack(file.read(_HEADER.size))
            names = parse_json(file.read(number)) if kind == _NAMES and number >= 0 else None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("there are no names")
        if len(set(names)) < len(names):
            raise ValueError("a name is given twice")
        return names

    def _read(self, at: int, num_domains: int) -> Array:
        with self._path.open("rb") as file:
            file.seek(at)
            kind, dtype, number, base = _HEADER.unpack(file.read(_HEADER.size))
            if not 0 <= number <= num_domains or kind > _CHANGED or (kind == _WHOLE and number != num_domains):
                raise ValueError(f"{number} values of kind {kind} for {num_domains} domains")
            places = np.fromfile(file, _PLACE, number) if kind != _WHOLE else None
            values = np.fromfile(file, _DTYPES[dtype], number)
        if len(values) != number or (places is not None and len(places) != number):
            raise ValueError("it is cut off")
        if places is None:
            array = values
        else:
            if kind == _CHANGED and not 0 <= base < at:
                raise ValueError(f"its base is byte {base}")
            array = self.array(base, num_domains).copy() if kind == _CHANGED else np.zeros(num_domains, values.dtype)
            array[places] = values
        array.setflags(write=False)
        return array


class WideLine(dict[str, Any]):
    """A line, or a mapping in one, whose arrays are read when they are asked for; a list in an old line is an array."""

    def __init__(self, plain: Mapping[str, Any], reader: WideReader, arrays: Mapping[str, int], number: int) -> None:
        super().__init__(plain)
        self._reader, self._number = reader, number
        self._arrays = {key: at for key, at in arrays.items() if "." not in key}
        for key, value in plain.items():
            inner = {name.removeprefix(f"{key}."): at for name, at in arrays.items() if name.startswith(f"{key}.")}
            if isinstance(value, dict) and inner:
                self[key] = WideLine(value, reader, inner, number)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self._arrays

    def __missing__(self, key: str) -> Any:
        if key not in self._arrays:
            raise KeyError(key)
        at = self._arrays[key]
        return self._reader.names(at) if key == "domain_names" else self._reader.array(at, self._number)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - dict.get does not ask __missing__
