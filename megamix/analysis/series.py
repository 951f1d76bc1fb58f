"""Series over the tokens of a run, ready to be drawn.

Long series are thinned with a known error: weights keep the changes that matter (`thin`), training losses are means
over longer intervals, evaluations are evenly chosen.

Legend: N domains, those of the end of the run and those it had before; P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.training.objective import objective_name, weighted_loss
from megamix.training.records.recorded_run import RecordedRun

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values over the tokens of a run.

    Attributes:
        names: of the columns, [N].
        tokens: int64 [P], rising: where a value was measured or where a weight begins to act.
        values: float64 [P, N]; NaN where not known.
        left_out: number of points of the record that were left out.
        tolerance: largest distance of a value that was left out from the one kept before it.
    """

    names: tuple[str, ...]
    tokens: Ints
    values: Floats
    left_out: int = 0
    tolerance: float = 0.0

    @classmethod
    def of(cls, names: Sequence[str], tokens: Sequence[int] | Ints, rows: Sequence[Sequence[float | None]]) -> Series:
        """From rows of numbers; None where one is not known."""
        values = np.array(rows, np.float64).reshape(len(rows), len(names))
        return cls(tuple(names), np.array(tokens, np.int64), values)

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Tokens and known values of one column."""
        values = self.values[:, self.names.index(name)]
        known = np.isfinite(values)
        return self.tokens[known].tolist(), values[known].tolist()

    def at_changes(self, most: int | None) -> Series:
        """At most ``most`` points; each value left out is near the one before it (`thin`)."""
        if most is None or len(self.tokens) <= most:
            return self
        return self._keep(*thin(self.values, most))

    def means(self, most: int) -> Series:
        """At most ``most`` points: means of neighbouring ones, each at the last of its points."""
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
        """At most ``most`` points, evenly chosen, the first and the last among them."""
        if len(self.tokens) <= most:
            return self
        return self._keep(np.unique(np.linspace(0, len(self.tokens) - 1, most).round().astype(np.int64)))

    def closed(self, end: int) -> Series:
        """With the last values repeated at token ``end``."""
        values = np.vstack([self.values, self.values[-1:]])
        return replace(self, tokens=np.append(self.tokens, end), values=values)

    def _keep(self, kept: Ints, tolerance: float = 0.0) -> Series:
        return Series(self.names, self.tokens[kept], self.values[kept], len(self.tokens) - len(kept), tolerance)


def thin(values: Floats, most: int) -> tuple[Ints, float]:
    """The rows to keep of values that hold until the next one, and the distance of the rows left out.

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
    """The rows that `thin` keeps at this tolerance; None where they are more than ``most``."""
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
    """The sampling weights where each begins to act, the last ones repeated where the record ends."""
    lines = _acting(run)
    series = Series(run.domain_names, _tokens(run, lines), run.ledger.weights_of(run.domain_names)[: len(lines)])
    return series.at_changes(most).closed(recorded_tokens(run))


def recorded_series(run: RecordedRun, key: str, most: int | None = None) -> Series | None:
    """The mixer's values under ``key`` of weights.jsonl, where the weights beside them act; None without any.

    A list has a value for each domain; a number makes one column named ``key``.
    """
    lines = [line for line in _acting(run) if line.get(key) is not None]
    if not lines:
        return None
    rows: list[list[float | None]] = []
    by_domain = not isinstance(lines[0][key], int | float)
    names = run.domain_names if by_domain else (key,)
    for line in lines:
        given = dict(zip(line["domain_names"], line[key], strict=True)) if by_domain else {key: line[key]}
        rows.append([given.get(name) for name in names])
    return Series.of(names, _tokens(run, lines), rows).at_changes(most).closed(recorded_tokens(run))


def recorded_series_of(runs: Sequence[RecordedRun], key: str, most: int) -> list[tuple[int, Series]]:
    """The `recorded_series` of each run that has one, with the run's index."""
    found = [(index, recorded_series(run, key, most)) for index, run in enumerate(runs)]
    return [(index, series) for index, series in found if series is not None]


def score_series(run: RecordedRun, key: str, most: int) -> Series | None:
    """The mixer's score of each domain, under ``key`` of weights.jsonl; None where the run has none.

    A score is not known before its domain is first seen. It belongs to one step and is noisy, so many are drawn as
    means of neighbouring ones.
    """
    lines = [line for line in _acting(run) if line.get(key) is not None and "statistics" in line]
    if not lines:
        return None
    names, rows, seen = run.domain_names, [], set()
    for line in lines:
        given = dict(zip(line["domain_names"], line[key], strict=True))
        # Before its first token, the score of a domain measures nothing.
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
    shares = lengths @ run.ledger.weights_of(run.domain_names) / end
    return dict(zip(run.domain_names, shares.tolist(), strict=True))


def validation_series(run: RecordedRun, most: int) -> Series:
    """The validation loss of each of the N domains, nats per token."""
    names = run.domain_names
    rows = [[line["domain_loss"].get(name) for name in names] for line in run.evaluations]
    return Series.of(names, [line["tokens"] for line in run.evaluations], rows).evenly(most)


def mean_series(run: RecordedRun, most: int) -> Series:
    """The validation loss: by the run's objective, mean over domains, mean by natural share, and the worst domain's."""
    objective = objective_losses(run)
    rows = [
        [loss, line.get("macro_loss"), line.get("micro_loss"), worst(line)[1]]
        for loss, line in zip(objective, run.evaluations, strict=True)
    ]
    tokens = [line["tokens"] for line in run.evaluations]
    return Series.of(("objective", "macro", "micro", "worst"), tokens, rows).evenly(most)


def shared_objective(runs: Sequence[RecordedRun]) -> str | None:
    """The name of the objective of all runs; None where they have different ones."""
    first = runs[0]
    same = all((run.config.objective, run.objective()) == (first.config.objective, first.objective()) for run in runs)
    return objective_name(first.config.objective) if same else None


def objective_losses(run: RecordedRun) -> list[float | None]:
    """The objective loss of every evaluation, all by the run's last objective; None where a domain that counts has no
    loss, or where the objective is natural shares that are not known."""
    weights = run.objective()
    if not weights:  # older records: the loss by natural share, which they have
        return [line.get("micro_loss") for line in run.evaluations]
    return [weighted_loss(weights, line["domain_loss"]) for line in run.evaluations]


def equal_tokens(runs: Sequence[RecordedRun]) -> int | None:
    """The most tokens after which all runs were evaluated; None where there are none but 0."""
    shared = set.intersection(*({line["tokens"] for line in run.evaluations} for run in runs)) - {0}
    return max(shared, default=None)


def up_to(run: RecordedRun, tokens: int) -> RecordedRun:
    """The run with its evaluations after at most ``tokens``."""
    return replace(run, evaluations=[line for line in run.evaluations if line["tokens"] <= tokens])


def first_step_at(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The step at which a loss first comes down to ``target``, on the line between two evaluations."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def worst(evaluation: dict[str, Any]) -> tuple[str | None, float | None]:
    """The domain with the highest loss of an evaluation, and its loss; None where no domain has one."""
    known = {name: loss for name, loss in evaluation["domain_loss"].items() if loss is not None}
    if not known:
        return None, None
    name = max(known, key=lambda name: known[name])
    return name, known[name]


def training_series(run: RecordedRun, most: int) -> Series:
    """The training loss of each of the N domains; many lines become means over the tokens of neighbouring ones."""
    parts = [part for part in np.array_split(np.arange(len(run.train)), min(most, len(run.train)) or 1) if part.size]
    names = run.domain_names
    rows = [[_mean([run.train[index] for index in part], name) for name in names] for part in parts]
    tokens = [run.train[part[-1]]["tokens"] for part in parts]
    return replace(Series.of(names, tokens, rows), left_out=len(run.train) - len(parts))


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [line for line in lines if line["domain_loss"].get(name) is not None]
    # Older records have no tokens; a single line needs none.
    tokens = [line.get("domain_tokens", {}).get(name, 1) for line in known]
    losses = [line["domain_loss"][name] for line in known]
    return losses[0] if len(known) == 1 else float(np.average(losses, weights=tokens)) if known else None


def recorded_tokens(run: RecordedRun) -> int:
    """The tokens up to the end of a run's record."""
    return run.config.batches.tokens_at(_end(run))


def _end(run: RecordedRun) -> int:
    """The samples up to the end of a run's record."""
    # Weights are on record before the metrics of the steps they act in; the last ones of a run never act.
    return min(max(run.position, run.ledger.lines[-1]["position"]), run.config.total_samples)


def _acting(run: RecordedRun) -> list[dict[str, Any]]:
    """The lines of the ledger that act before the end of the record."""
    end = _end(run)
    return [line for line in run.ledger.lines if line["position"] <= end]


def _tokens(run: RecordedRun, lines: Sequence[dict[str, Any]]) -> Ints:
    tokens_at = run.config.batches.tokens_at
    return np.array([tokens_at(line["position"]) for line in lines], np.int64)
