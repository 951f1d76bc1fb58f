"""A swarm's two tables, in Olmix's form: ratios.csv (mixture of each run) and metrics.csv (its results).

    run,name,index,web,code      run,name,index,loss_web,loss_code
    0000,0000,0,0.7,0.3          0000,0000,0,3.1,2.2

The runs are in a column ``run`` (or ``run_id``); ``name``, ``index`` and columns without a name are passed over, and
every other column is a domain, or a metric. The rows of the two files are joined on the run.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError, check_known, given_twice
from megamix.core.files import read_csv, replace_file
from megamix.core.log import get_logger
from megamix.core.text import listed, plural

Array = NDArray[np.float64]
Missing = Literal["refuse", "drop", "drop_any"]
SUM_TOLERANCE = 1e-3
"""How far from 1 the sum of a run's ratios may be; within it they are divided by their sum."""
_ID_COLUMNS = ("run", "run_id")
_OTHER_COLUMNS = ("name", "index")
_NO_VALUE = frozenset(("", "nan", "na", "n/a", "null", "none", "inf", "-inf", "infinity", "-infinity"))


@dataclass(frozen=True)
class SwarmTable:
    """R runs on mixtures of K domains, with J metrics each.

    Attributes:
        ratios_RK: float64 [R, K], every row sums to 1.
        values_RJ: float64 [R, J], finite; lower is better.
        dropped: runs of the files that lack a value and were left out.
    """

    runs: tuple[str, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    ratios_RK: Array
    values_RJ: Array
    dropped: tuple[str, ...] = ()


def read_table(
    ratios: Path,
    metrics: Path,
    *,
    missing: Missing = "refuse",
    only: Sequence[str] | None = None,
    drop: Sequence[str] = (),
) -> SwarmTable:
    """Reads and joins the two files of a swarm; the runs are in the order of ``ratios``.

    Args:
        missing: what becomes of a run that is in one file only or has no finite number for a metric: ``refuse`` is an
            error with their names, ``drop`` leaves them out and says which; ``drop_any`` asks for the numbers of
            ``drop``, too.
        only: the metrics to read; the others may lack values. None: all.
        drop: metrics not to read; warns of one that the file lacks.

    Raises:
        InputError: a file that cannot be read or is cut off, ratios that are no mixture, a missing value, an unknown
            metric, or no run in both files.
    """
    mixtures, results = _read_csv(Path(ratios), "domain"), _read_csv(Path(metrics), "metric")
    chosen = _chosen_metrics(results, only, drop)
    values = results.numbers(chosen)
    also = tuple(name for name in drop if name in results.columns) if missing == "drop_any" else ()
    wanted = np.concatenate([values, results.numbers(also)], axis=1) if also else values
    lacking = _lacking(mixtures, results, (*chosen, *also), wanted)
    if lacking and missing == "refuse":
        raise InputError(
            f"{plural(len(lacking), 'run')} cannot be used: {listed([f'{run} ({why})' for run, why in lacking.items()])}."
            " Collect what is missing, leave the metrics out (drop_metrics), or leave such runs out (missing: drop)."
        )
    kept = [run for run in mixtures.rows if run in results.rows and run not in lacking]
    if not kept:
        raise InputError(
            f"{ratios} ({plural(len(mixtures.rows), 'run')}, the first {next(iter(mixtures.rows))}) and {metrics}"
            f" ({plural(len(results.rows), 'run')}, the first {next(iter(results.rows))}) have no run in common that"
            " has all metrics. The column 'run' must hold the same names in both."
        )
    if lacking:
        get_logger().warning(
            "%s left out: %s", plural(len(lacking), "run"), listed([f"{run} ({why})" for run, why in lacking.items()])
        )
    places = list(results.rows)
    return SwarmTable(
        runs=tuple(kept),
        domains=mixtures.columns,
        metrics=chosen,
        ratios_RK=_mixtures(mixtures, kept),
        values_RJ=values[[places.index(run) for run in kept]],
        dropped=tuple(lacking),
    )


def metric_names(path: Path) -> tuple[str, ...]:
    """The metrics of metrics.csv.

    Raises:
        InputError: see `read_table`.
    """
    return _read_csv(Path(path), "metric").columns


def write_ratios(path: Path, runs: Sequence[str], domains: Sequence[str], ratios_RK: Array) -> None:
    """Writes ratios.csv, whole or not at all; numbers are written so that they are read back the same."""
    _write_csv(path, runs, domains, ratios_RK)


def write_metrics(path: Path, runs: Sequence[str], metrics: Sequence[str], values_RJ: Array) -> None:
    """Writes metrics.csv like `write_ratios`; a NaN becomes an empty field."""
    _write_csv(path, runs, metrics, values_RJ)


@dataclass(frozen=True)
class _Csv:
    """Fields of a CSV file as text.

    Attributes:
        kind: what a column is.
        rows: the fields of ``columns`` by run.
        lines: where each run stands.
    """

    path: Path
    kind: str
    columns: tuple[str, ...]
    rows: dict[str, list[str]]
    lines: dict[str, int]

    def numbers(self, columns: Sequence[str]) -> Array:
        """float64 [rows, columns]; NaN where there is no finite number."""
        places = [self.columns.index(name) for name in columns]
        return np.array([[self._number(run, place) for place in places] for run in self.rows], dtype=np.float64)

    def _number(self, run: str, place: int) -> float:
        text = self.rows[run][place].strip()
        if text.lower() in _NO_VALUE:
            return math.nan
        try:
            return float(text)
        except ValueError as error:
            raise InputError(
                f"{self.path}, line {self.lines[run]} (run {run}): {self.kind} '{self.columns[place]}' is {text!r},"
                " expected a number."
            ) from error


def _read_csv(path: Path, kind: str) -> _Csv:
    read = read_csv(path)
    header = [name.strip() for name in read[0][1]] if read else []
    run_column, places = _columns(header, path, kind)
    rows: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for line, fields in read[1:]:
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {line} has {plural(len(fields), 'field')}, the header {len(header)}: the file is cut off"
                " or damaged. Write it again."
            )
        run = fields[run_column].strip()
        if not run:
            raise InputError(f"{path}, line {line}: the run has no name.")
        if run in rows:
            raise InputError(f"{path} has the run '{run}' twice, on lines {lines[run]} and {line}. Keep one of them.")
        rows[run], lines[run] = [fields[place] for place in places], line
    if not rows:
        raise InputError(f"{path} has no runs below its header.")
    return _Csv(path, kind, tuple(header[place] for place in places), rows, lines)


def _columns(header: list[str], path: Path, kind: str) -> tuple[int, list[int]]:
    """Column of the run, and columns of the domains or metrics."""
    ids = [place for place, name in enumerate(header) if name in _ID_COLUMNS]
    if len(ids) != 1:
        raise InputError(
            f"{path}: {'two columns name' if ids else 'no column names'} the run. Its header begins with"
            f" {header[:4]}; expected one column 'run' or 'run_id', then one for each {kind}."
        )
    places = [
        place
        for place, name in enumerate(header)
        if place not in ids and name and not name.startswith("Unnamed:") and name not in _OTHER_COLUMNS
    ]
    names = [header[place] for place in places]
    if not names:
        raise InputError(f"{path} has no column for a {kind}; its header is {header}.")
    doubled = given_twice(names)
    if doubled:
        raise InputError(f"{path} has the {kind} '{doubled[0]}' twice in its header. Keep one of them.")
    return ids[0], places


def _chosen_metrics(results: _Csv, only: Sequence[str] | None, drop: Sequence[str]) -> tuple[str, ...]:
    check_known(only or (), results.columns, f"{results.path} has no metric")
    absent = [name for name in drop if name not in results.columns]
    if absent:
        get_logger().warning("%s has none of the metrics to drop: %s", results.path, listed(absent))
    chosen = tuple(name for name in results.columns if (only is None or name in only) and name not in drop)
    if not chosen:
        raise InputError(f"no metric of {results.path} is left: it has {listed(results.columns)}, and all are dropped.")
    return chosen


def _lacking(mixtures: _Csv, results: _Csv, chosen: tuple[str, ...], values: Array) -> dict[str, str]:
    """{run: reason} of the runs that lack a row or a value."""
    lacking = {run: f"not in {results.path.name}" for run in mixtures.rows if run not in results.rows}
    lacking |= {run: f"not in {mixtures.path.name}" for run in results.rows if run not in mixtures.rows}
    for run, row in zip(results.rows, values, strict=True):
        absent = [name for name, value in zip(chosen, row, strict=True) if not math.isfinite(value)]
        if absent and run not in lacking:
            lacking[run] = f"no {listed(absent, 2)}"
    return lacking


def _mixtures(mixtures: _Csv, runs: Sequence[str]) -> Array:
    """float64 [R, K], checked and normalised."""
    places = list(mixtures.rows)
    ratios = mixtures.numbers(mixtures.columns)[[places.index(run) for run in runs]]
    for run, row in zip(runs, ratios, strict=True):
        for domain, value in zip(mixtures.columns, row, strict=True):
            if not value >= 0:
                raise InputError(
                    f"{mixtures.path}, line {mixtures.lines[run]}: run {run} has the ratio {value} of '{domain}',"
                    " expected a number from 0 to 1."
                )
    sums = ratios.sum(axis=1)
    off = [f"{run} ({total:.6g})" for run, total in zip(runs, sums, strict=True) if abs(total - 1) > SUM_TOLERANCE]
    if off:
        raise InputError(
            f"{mixtures.path}: the ratios of {plural(len(off), 'run')} do not sum to 1 (within {SUM_TOLERANCE}):"
            f" {listed(off)}. Is a domain's column missing?"
        )
    return ratios / sums[:, None]


def _write_csv(path: Path, runs: Sequence[str], columns: Sequence[str], values: Array) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "name", "index", *columns])
    for index, (run, row) in enumerate(zip(runs, np.asarray(values).tolist(), strict=True)):
        fields = ["" if math.isnan(value) else repr(value) for value in row]
        if len(fields) != len(columns):
            raise ValueError(f"{len(fields)} values for {len(columns)} columns")
        writer.writerow([run, run, index, *fields])
    replace_file(path, text.getvalue().encode("utf-8"))
