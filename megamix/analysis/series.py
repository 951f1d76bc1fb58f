"""What a run did over its tokens, as series that are ready to be drawn.

Long series are thinned so that what is left out can be told: weights keep the changes that matter (`thin`), training
losses are means over longer intervals, evaluations are evenly chosen.

Legend: N domains, those of the end of the run and those it had before; P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.training.records.recorded_run import RecordedRun

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values over the tokens of a run.

    Attributes:
        names: what the columns are, [N].
        tokens: int64 [P], rising: where a value was measured or, of weights, begins to act.
        values: float64 [P, N]; NaN where it is not known.
        left_out: how many points the record has more.
        tolerance: no value that was left out is further than this from the one that stands before it.
    """

    names: tuple[str, ...]
    tokens: Ints
    values: Floats
    left_out: int = 0
    tolerance: float = 0.0

    @classmethod
    def of(cls, names: Sequence[str], tokens: Sequence[int] | Ints, rows: Sequence[Sequence[float | None]]) -> Series:
        """From rows of numbers, None where one is not known."""
        values = np.array(rows, np.float64).reshape(len(rows), len(names))
        return cls(tuple(names), np.array(tokens, np.int64), values)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Tokens and values of one column, where they are known."""
        values = self.values[:, self.names.index(name)]
        known = np.isfinite(values)
        return self.tokens[known].tolist(), values[known].tolist()

    def at_changes(self, most: int | None) -> Series:
        """At most that many points, so that each value left out is near the one before it; see `thin`."""
        if most is None or len(self.tokens) <= most:
            return self
        kept, tolerance = thin(self.values, most)
        return Series(self.names, self.tokens[kept], self.values[kept], len(self.tokens) - len(kept), tolerance)

    def means(self, most: int) -> Series:
        """At most that many points: means of neighbouring ones, each at the last of those it is of."""
        if len(self.tokens) <= most:
            return self
        starts = np.linspace(0, len(self.tokens), most, endpoint=False).astype(np.int64)
        known = np.isfinite(self.values)
        counts = np.add.reduceat(known, starts, axis=0, dtype=np.int64)
        sums = np.add.reduceat(np.where(known, self.values, 0.0), starts, axis=0)
        values = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        ends = np.append(starts[1:], len(self.tokens)) - 1
        return Series(self.names, self.tokens[ends], values, len(self.tokens) - most)

    def evenly(self, most: int) -> Series:
        """At most that many points, evenly chosen, the first and the last among them."""
        if len(self.tokens) <= most:
            return self
        kept = np.unique(np.linspace(0, len(self.tokens) - 1, most).round().astype(np.int64))
        return Series(self.names, self.tokens[kept], self.values[kept], len(self.tokens) - len(kept))


def thin(values: Floats, most: int) -> tuple[Ints, float]:
    """Which rows to keep of steps that hold until the next one, and how far the rows left out are from them.

    A row is kept where it strays from the last kept one by more than a tolerance in any column; the tolerance is the
    smallest, to a thousandth of itself, that keeps at most ``most`` rows. The first and the last row are kept.

    Args:
        values: float64 [P, N]; NaN counts as a number of its own.
        most: at least 2.

    Returns:
        The rows kept, rising, and the tolerance; 0 where all are kept, or all but repetitions.
    """
    if len(values) <= most:
        return np.arange(len(values)), 0.0
    filled = np.where(np.isfinite(values), values, -1.0)
    low, high = 0.0, float(np.ptp(filled, axis=0).max())
    same = _straying(filled, 0.0, most)
    if same is not None:  # what is left out are repetitions
        return same, 0.0
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _straying(filled, middle, most) is not None else (middle, high)
    kept = _straying(filled, high, most)
    assert kept is not None  # at the full range the first and the last row are enough
    return kept, high


def _straying(values: Floats, tolerance: float, most: int) -> Ints | None:
    """The rows that `thin` keeps at that tolerance; None where they are more than ``most``."""
    kept, start, size = [0], 1, 64
    while start < len(values):
        if len(kept) >= most:
            return None
        far = np.abs(values[start : start + size] - values[kept[-1]]).max(axis=1) > tolerance
        hit = int(far.argmax())
        if far[hit]:
            kept.append(start + hit)
            start, size = start + hit + 1, 64
        else:
            start, size = start + size, 2 * size
    return np.array(kept if kept[-1] == len(values) - 1 else [*kept, len(values) - 1])


def weight_series(run: RecordedRun, most: int | None = None) -> Series:
    """The sampling weights where each begins to act, and the last ones once more where the record ends."""
    lines = _acting(run)
    series = Series(run.domain_names, _tokens(run, lines), run.ledger.weights[: len(lines)]).at_changes(most)
    return _closed(series, recorded_tokens(run))


def recorded_series(run: RecordedRun, key: str, most: int | None = None) -> Series | None:
    """What a mixer shows of itself under ``key`` of weights.jsonl, where the weights beside it act; None if nothing.

    A list is by domain; a number makes a series with one column of that name.
    """
    lines = [line for line in _acting(run) if line.get(key) is not None]
    if not lines:
        return None
    rows: list[list[float | None]] = []
    by_domain = isinstance(lines[0][key], list)
    names = run.domain_names if by_domain else (key,)
    for line in lines:
        given = dict(zip(line["domain_names"], line[key], strict=True)) if by_domain else {key: line[key]}
        rows.append([given.get(name) for name in names])
    series = Series.of(names, _tokens(run, lines), rows).at_changes(most)
    return _closed(series, recorded_tokens(run))


def recorded_series_of(runs: Sequence[RecordedRun], key: str, most: int) -> list[tuple[int, Series]]:
    """The `recorded_series` of each run that has one, with the run's index."""
    found = [(index, recorded_series(run, key, most)) for index, run in enumerate(runs)]
    return [(index, series) for index, series in found if series is not None]


def score_series(run: RecordedRun, key: str, most: int) -> Series | None:
    """What a mixer has learnt of each domain, under ``key`` of weights.jsonl; None where the run has none.

    It is not known before a domain is first seen. Many are drawn as means of neighbouring ones: a score is that of one
    step, and noisy.
    """
    lines = [line for line in _acting(run) if line.get(key) is not None and "statistics" in line]
    if not lines:
        return None
    names, rows, seen = run.domain_names, [], set()
    for line in lines:
        given = dict(zip(line["domain_names"], line[key], strict=True))
        # Before its first token a domain has a score that nothing was measured for.
        tokens = zip(line["domain_names"], line["statistics"]["tokens"], strict=True)
        seen |= {name for name, count in tokens if count}
        rows.append([given.get(name) if name in seen else None for name in names])
    return Series.of(names, _tokens(run, lines), rows).means(most)


def asked_shares(run: RecordedRun) -> dict[str, float]:
    """The mean weight of each of the N domains over the samples taken so far; empty before the first."""
    end = run.position
    if end == 0:
        return {}
    starts = np.array([min(line["position"], end) for line in run.ledger.lines])
    lengths = np.diff(np.append(starts, end))
    shares = lengths @ run.ledger.weights / end
    return dict(zip(run.domain_names, shares.tolist(), strict=True))


def validation_series(run: RecordedRun, most: int) -> Series:
    """The validation loss of each of the N domains, nats per token."""
    names = run.domain_names
    rows = [[line["domain_loss"].get(name) for name in names] for line in run.evaluations]
    return Series.of(names, [line["tokens"] for line in run.evaluations], rows).evenly(most)


def mean_series(run: RecordedRun, most: int) -> Series:
    """The validation loss: its mean over domains, that by natural share, and that of the worst domain."""
    rows = [[line.get("macro_loss"), line.get("micro_loss"), worst(line)[1]] for line in run.evaluations]
    tokens = [line["tokens"] for line in run.evaluations]
    return Series.of(("macro", "micro", "worst"), tokens, rows).evenly(most)


def worst(evaluation: dict[str, Any]) -> tuple[str | None, float | None]:
    """The domain with the highest loss of an evaluation, and that loss; None where no domain has one."""
    known = {name: loss for name, loss in evaluation["domain_loss"].items() if loss is not None}
    if not known:
        return None, None
    name = max(known, key=lambda name: known[name])
    return name, known[name]


def training_series(run: RecordedRun, most: int) -> Series:
    """The training loss of each of the N domains; of many lines, means over the tokens of neighbouring ones."""
    parts = [part for part in np.array_split(np.arange(len(run.train)), min(most, len(run.train)) or 1) if part.size]
    names = run.domain_names
    rows = [[_mean([run.train[index] for index in part], name) for name in names] for part in parts]
    tokens = [run.train[part[-1]]["tokens"] for part in parts]
    series = Series.of(names, tokens, rows)
    return Series(series.names, series.tokens, series.values, len(run.train) - len(parts))


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [line for line in lines if line["domain_loss"].get(name) is not None]
    # A record of an older kind has no tokens; a line of its own needs none.
    tokens = [line.get("domain_tokens", {}).get(name, 1) for line in known]
    losses = [line["domain_loss"][name] for line in known]
    return losses[0] if len(known) == 1 else float(np.average(losses, weights=tokens)) if known else None


def recorded_tokens(run: RecordedRun) -> int:
    """The tokens that the record of a run reaches."""
    return _end(run) * run.config.data.seq_length


def _end(run: RecordedRun) -> int:
    """The samples that the record of a run reaches."""
    # Weights are on record before the metrics of the steps they act in; the last ones of a run never act.
    last, train = run.ledger.lines[-1]["position"], run.config.train
    return min(max(run.position, last), train.steps * train.global_batch)


def _acting(run: RecordedRun) -> list[dict[str, Any]]:
    """The lines of the ledger that act before the end of the record."""
    end = _end(run)
    return [line for line in run.ledger.lines if line["position"] <= end]


def _tokens(run: RecordedRun, lines: Sequence[dict[str, Any]]) -> Ints:
    return np.array([line["position"] for line in lines], np.int64) * run.config.data.seq_length


def _closed(series: Series, end: int) -> Series:
    """With the last values once more at the end."""
    return Series(
        series.names,
        np.append(series.tokens, end),
        np.vstack([series.values, series.values[-1:]]),
        series.left_out,
        series.tolerance,
    )
