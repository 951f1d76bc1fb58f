"""Step statistics: ``RUN/statistics``, the sums of every step as the mixer saw them; `megamix replay` reads them.

A file ``from_STEP.bin`` begins with one line of JSON (``first_step``, ``domain_names``, ``columns``, ``rows``) and goes
on with a row a step, of numbers of eight bytes, little-endian: ``nats`` and ``excess_nats`` are floats, ``tokens``
integers. A row of all domains has K numbers for each column. Of more than `MOST_IN_TEXT` domains, most are absent from
a step, and a row is of those that are present (``rows: present``):

    number of domains i64 = n | their places int64 [n] | for each column n numbers

A new file begins where the domains, the columns or the form of rows change. Which weights the tokens were drawn with is
in ``weights.jsonl``. Steps count from 1.

Legend: K domains, T steps.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.config import first_problem
from megamix.core.errors import InputError, given_twice
from megamix.core.files import AppendFile, parse_json, remove, replace_file, write_failed
from megamix.mixing.mixers import DomainStats
from megamix.training.records.wide_lines import MOST_IN_TEXT

FOLDER = "statistics"
_KINDS = {"nats": "<f8", "tokens": "<i8", "excess_nats": "<f8"}
_COUNT = np.dtype("<i8")
Rows = NDArray[Any]
Ints = NDArray[np.int64]


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    first_step: Annotated[int, pydantic.Field(ge=1, le=2**53)]
    domain_names: Annotated[list[str], pydantic.Field(min_length=1)]
    columns: list[str]
    rows: Literal["all", "present"] = "all"

    @pydantic.model_validator(mode="after")
    def _can_be_told_apart(self) -> _Header:
        if self.columns not in ([*_KINDS][:2], [*_KINDS]):
            raise ValueError(f"its columns are {self.columns}, expected {', '.join(_KINDS)}")
        if doubled := given_twice(self.domain_names):
            raise ValueError(f"it names the domain '{doubled[0]}' twice")
        return self


@dataclass(frozen=True)
class Layout:
    """Form of the rows of a file.

    Attributes:
        num_domains: K.
        columns: nats, tokens and, where losses were summed against a reference, excess_nats.
        is_sparse: whether a row is of the domains that are present.
    """

    num_domains: int
    columns: tuple[str, ...]
    is_sparse: bool

    @cached_property
    def whole(self) -> np.dtype[Any]:
        """A row of all domains."""
        return np.dtype([(name, _KINDS[name], (self.num_domains,)) for name in self.columns])

    def row(self, stats: DomainStats) -> bytes:
        """The row of a step."""
        if not self.is_sparse:
            row = np.zeros((), self.whole)
            for name in self.columns:
                row[name] = getattr(stats, name)
            return row.tobytes()
        columns = [np.asarray(getattr(stats, name), _KINDS[name]) for name in self.columns]
        places = np.flatnonzero(np.any([column != 0 for column in columns], axis=0)).astype(_COUNT)
        parts = [np.array(places.size, _COUNT), places, *(column[places] for column in columns)]
        return b"".join(part.tobytes() for part in parts)

    def fill(self, row: Any, data: bytes) -> None:
        """Reads a row of present domains into one of all, zeros.

        Raises:
            IndexError: a place that there is none of.
        """
        number = (len(data) // _COUNT.itemsize - 1) // (1 + len(self.columns))
        places = np.frombuffer(data, _COUNT, number, offset=_COUNT.itemsize)
        for index, name in enumerate(self.columns, start=1):
            values = np.frombuffer(data, _KINDS[name], number, offset=(1 + index * number) * _COUNT.itemsize)
            row[name][places] = values

    def offsets(self, file: BinaryIO, start: int, size: int) -> Ints:
        """See `StatisticsFile`.

        Raises:
            ValueError: a row says that it is of more domains than there are.
        """
        if not self.is_sparse:
            row = self.whole.itemsize
            return start + row * np.arange((size - start) // row + 1, dtype=np.int64)
        found = [start]
        while (at := found[-1]) + _COUNT.itemsize <= size:
            file.seek(at)
            number = int.from_bytes(file.read(_COUNT.itemsize), "little", signed=True)
            if not 0 <= number <= self.num_domains:
                raise ValueError(f"its row at byte {at} is of {number} of {self.num_domains} domains")
            end = at + _COUNT.itemsize * (1 + number * (1 + len(self.columns)))
            if end > size:
                break
            found.append(end)
        return np.array(found, np.int64)


@dataclass(frozen=True)
class StatisticsFile:
    """One file of the folder.

    Attributes:
        first_step: the step of the first row.
        layout: the form of its rows.
        offsets: int64 [T + 1], the bytes at which its complete rows begin, and the last one ends; a row that was cut
            off does not count.
    """

    path: Path
    first_step: int
    domain_names: tuple[str, ...]
    layout: Layout
    offsets: Ints

    @classmethod
    def open(cls, path: Path) -> StatisticsFile:
        """Reads the first line.

        Raises:
            InputError: it is damaged, or the file cannot be read.
        """
        try:
            with path.open("rb") as file:
                line = file.readline()
                header = _Header.model_validate(parse_json(line))
                names = tuple(header.domain_names)
                layout = Layout(len(names), tuple(header.columns), header.rows == "present")
                offsets = layout.offsets(file, len(line), os.fstat(file.fileno()).st_size)
            return cls(path, header.first_step, names, layout, offsets)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
        except ValueError as error:
            raise InputError(
                f"{path} is damaged: it is not what a run writes ({first_problem(error)}). Remove it; the steps in it cannot be "
                "replayed then."
            ) from error

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.offsets) - 1

    @property
    def end(self) -> int:
        """The step after the last one."""
        return self.first_step + self.num_rows

    def rows(self) -> Rows:
        """The structured array [T], one field [K] a column.

        Raises:
            InputError: a row names a domain that there is none of.
        """
        layout = self.layout
        if not layout.is_sparse:
            return np.fromfile(self.path, layout.whole, self.num_rows, offset=int(self.offsets[0]))
        found = np.zeros(self.num_rows, layout.whole)
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[0]))
            for row, size in zip(found, np.diff(self.offsets).tolist(), strict=True):
                try:
                    layout.fill(row, file.read(size))
                except (IndexError, ValueError) as error:
                    raise InputError(
                        f"{self.path} is damaged: {error}. Remove it; its steps cannot be replayed."
                    ) from error
        return found


class StatisticsWriter:
    """Appends rows; on resume, rows past the checkpoint are dropped first.

    Args:
        resumed_step: steps taken; None starts anew.
    """

    def __init__(self, run_dir: Path, domains: tuple[str, ...], resumed_step: int | None) -> None:
        self._folder = run_dir / FOLDER
        self._domains = domains
        self._file: AppendFile | None = None
        self._layout: Layout | None = None
        self._next_step = 0
        last = None
        for path in _paths(run_dir):
            last = _keep_until(path, resumed_step or 0) or last
        if last is not None and last.domain_names == domains:
            self._file, self._layout, self._next_step = AppendFile(last.path), last.layout, last.end

    def write(self, step: int, stats: DomainStats) -> None:
        """The row of ``step``, which counts from 1."""
        columns = tuple(name for name in _KINDS if getattr(stats, name) is not None)
        layout = Layout(len(self._domains), columns, len(self._domains) > MOST_IN_TEXT)
        if self._file is None or layout != self._layout or step != self._next_step:
            self.close()
            self._file, self._layout = self._start(step, layout), layout
        self._file.write(layout.row(stats))
        self._next_step = step + 1

    def flush(self) -> None:
        """Makes every row so far safe on disk."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Closes the file; a later row would begin a new one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self, step: int, layout: Layout) -> AppendFile:
        path = self._folder / f"from_{step:09d}.bin"
        header = {"first_step": step, "domain_names": list(self._domains), "columns": list(layout.columns)}
        header |= {"rows": "present"} if layout.is_sparse else {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, (json.dumps(header) + "\n").encode())
        except OSError as error:
            raise write_failed(path, error) from error
        return AppendFile(path)


@dataclass(frozen=True)
class RecordedStatistics:
    """The sums of the steps 1..T of a run.

    Attributes:
        nats: float64 [T, K].
        tokens: int64 [T, K].
        excess_nats: float64 [T, K]; None unless every step was summed against a reference.
    """

    domain_names: tuple[str, ...]
    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    excess_nats: NDArray[np.float64] | None

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.tokens)

    def step(self, step: int, weights: NDArray[np.float64]) -> DomainStats:
        """The mixer's statistics of ``step``, 1 to T; its tokens were drawn with ``weights`` (float64 [K])."""
        excess = None if self.excess_nats is None else self.excess_nats[step - 1]
        return DomainStats(self.nats[step - 1], self.tokens[step - 1], excess, weights)


def read_statistics(run_dir: Path) -> RecordedStatistics:
    """The sums of every step of a run.

    Raises:
        InputError: there are none, steps are missing, the domains changed, or a file is damaged.
    """
    files = [StatisticsFile.open(path) for path in _paths(run_dir)]
    files = [file for file in files if file.num_rows]
    if not files:
        raise InputError(
            f"{run_dir} has no sums of its steps ({FOLDER}/from_*.bin): it has not trained yet, or was made by a megamix that "
            "did not keep them. Train it anew."
        )
    expected = 1
    for file in files:
        if file.first_step != expected:
            raise InputError(
                f"{file.path} begins with step {file.first_step}, expected {expected}: the steps between are not on record. "
                "Only a run that kept them from its first step can be replayed."
            )
        if file.domain_names != files[0].domain_names:
            raise InputError(
                f"{run_dir} changed its domains before step {file.first_step}. A run with one set of domains is needed."
            )
        expected = file.end
    parts = [file.rows() for file in files]
    whole = all("excess_nats" in file.layout.columns for file in files)
    excess = np.concatenate([part["excess_nats"] for part in parts]) if whole else None
    return RecordedStatistics(
        files[0].domain_names,
        np.concatenate([part["nats"] for part in parts]),
        np.concatenate([part["tokens"] for part in parts]),
        excess,
    )


def _paths(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("from_*.bin"))


def _keep_until(path: Path, step: int) -> StatisticsFile | None:
    """Drops rows past ``step`` and a cut-off one; returns the rest, None where nothing is left."""
    file = StatisticsFile.open(path)
    kept = min(file.num_rows, max(step + 1 - file.first_step, 0))
    if kept == 0:
        remove(path)
        return None
    try:
        os.truncate(path, int(file.offsets[kept]))
    except OSError as error:
        raise write_failed(path, error) from error
    return replace(file, offsets=file.offsets[: kept + 1])
