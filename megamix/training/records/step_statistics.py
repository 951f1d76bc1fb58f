"""Step statistics: ``RUN/statistics``, the sums of every step as the mixer saw them; `megamix replay` reads them.

A file ``from_STEP.bin`` begins with one line of JSON (``first_step``, ``domain_names``, ``columns``) and goes on with a
row a step: for each column K numbers of eight bytes, little-endian, ``nats`` and ``excess_nats`` as floats and
``tokens`` as integers. A new file begins where the domains or the columns change. Which weights the tokens were drawn
with is in ``weights.jsonl``. Steps count from 1.

Legend: K domains, T steps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.files import AppendFile, parse_json, replace_file, write_failed
from megamix.mixing.mixers import DomainStats

FOLDER = "statistics"
_KINDS = {"nats": "<f8", "tokens": "<i8", "excess_nats": "<f8"}
Rows = NDArray[Any]


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    first_step: Annotated[int, pydantic.Field(ge=1, le=2**53)]
    domain_names: Annotated[list[str], pydantic.Field(min_length=1)]
    columns: Annotated[list[Literal["nats", "tokens", "excess_nats"]], pydantic.Field(min_length=2)]


@dataclass(frozen=True)
class StatisticsFile:
    """One file of the folder.

    Attributes:
        first_step: the step of the first row.
        columns: nats, tokens and, where losses were summed against a reference, excess_nats.
        start: bytes before the first row.
        num_rows: complete rows; a cut-off one does not count.
    """

    path: Path
    first_step: int
    domain_names: tuple[str, ...]
    columns: tuple[str, ...]
    start: int
    num_rows: int

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
                names, columns = tuple(header.domain_names), tuple(header.columns)
                size = os.fstat(file.fileno()).st_size
            row = _row_type(names, columns).itemsize
            return cls(path, header.first_step, names, columns, len(line), (size - len(line)) // row)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
        except ValueError as error:
            raise InputError(
                f"{path} is damaged: its first line is not what a run writes ({_in_short(error)}). Remove it; "
                "the steps in it cannot be replayed then."
            ) from error

    @property
    def end(self) -> int:
        """The step after the last one."""
        return self.first_step + self.num_rows

    @property
    def row_type(self) -> np.dtype[Any]:
        """The layout of a row."""
        return _row_type(self.domain_names, self.columns)

    def rows(self) -> Rows:
        """The structured array [T], one field a column."""
        return np.fromfile(self.path, self.row_type, self.num_rows, offset=self.start)


class StatisticsWriter:
    """Appends rows; on resume, rows past the checkpoint are dropped first.

    Args:
        resumed_step: steps taken; None starts anew.
    """

    def __init__(self, run_dir: Path, domains: tuple[str, ...], resumed_step: int | None) -> None:
        self._folder = run_dir / FOLDER
        self._domains = domains
        self._file: AppendFile | None = None
        self._layout: tuple[str, ...] = ()
        self._next_step = 0
        last = None
        for path in _paths(run_dir):
            last = _keep_until(path, resumed_step or 0) or last
        if last is not None and last.domain_names == domains:
            self._file, self._layout, self._next_step = AppendFile(last.path), last.columns, last.end

    def write(self, step: int, stats: DomainStats) -> None:
        """The row of ``step``, which counts from 1."""
        columns = tuple(name for name in _KINDS if getattr(stats, name) is not None)
        if self._file is None or columns != self._layout or step != self._next_step:
            self.close()
            self._file, self._layout = self._start(step, columns), columns
        row = np.zeros((), _row_type(self._domains, columns))
        for name in columns:
            row[name] = getattr(stats, name)
        self._file.write(row.tobytes())
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

    def _start(self, step: int, columns: tuple[str, ...]) -> AppendFile:
        path = self._folder / f"from_{step:09d}.bin"
        header = {"first_step": step, "domain_names": list(self._domains), "columns": list(columns)}
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
    whole = all("excess_nats" in file.columns for file in files)
    excess = np.concatenate([part["excess_nats"] for part in parts]) if whole else None
    return RecordedStatistics(
        files[0].domain_names,
        np.concatenate([part["nats"] for part in parts]),
        np.concatenate([part["tokens"] for part in parts]),
        excess,
    )


def _in_short(error: ValueError) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _paths(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("from_*.bin"))


def _row_type(domains: Sequence[str], columns: Sequence[str]) -> np.dtype[Any]:
    return np.dtype([(name, _KINDS[name], (len(domains),)) for name in columns])


def _keep_until(path: Path, step: int) -> StatisticsFile | None:
    """Drops rows past ``step`` and a cut-off one; returns the rest, None where nothing is left."""
    file = StatisticsFile.open(path)
    kept = min(file.num_rows, max(step + 1 - file.first_step, 0))
    if kept == 0:
        path.unlink()
        return None
    os.truncate(path, file.start + kept * file.row_type.itemsize)
    return StatisticsFile.open(path)
