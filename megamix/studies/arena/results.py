"""The results of an arena: a line for each member, and differences between arms, seed by seed.

All losses are means over the run's own domains on their held-out text, in nats per token, also where a trap adds a
domain. A difference is the arm's objective loss less the baseline's, so below 0 it is better.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from megamix import __version__
from megamix.analysis.paired import Interval, smallest_visible, t_interval
from megamix.studies.arena.config import FROZEN, NATURAL, NO_TRAP
from megamix.studies.arena.members import Condition, Entry
from megamix.studies.arena.rows import COLUMNS, Row, read_rows
from megamix.studies.arena.study import ArenaStudy

WITHOUT_TRAP = "best_static_without_trap"


@dataclass(frozen=True)
class Difference:
    """An arm against a baseline, paired by seed.

    Attributes:
        against: natural, best_static, best_static_without_trap, or frozen: its own mean weights from the first step on.
        baseline: the arm that this is.
        missing: seeds of the arena that one of the two lacks.
        deviation: standard deviation of the differences; None for fewer than two seeds.
        smallest_visible: the difference that this many seeds show with a probability of 0.8.
    """

    against: str
    baseline: str
    interval: Interval
    missing: int
    deviation: float | None
    smallest_visible: float | None

    @property
    def is_better(self) -> bool:
        """Whether the arm has the lower loss beyond noise."""
        return self.interval.excludes_zero and self.interval.mean < 0

    @property
    def is_worse(self) -> bool:
        """Whether the arm has the higher loss beyond noise."""
        return self.interval.excludes_zero and self.interval.mean > 0

    @property
    def verdict(self) -> str:
        """In words; "no difference found" unless the interval excludes 0. What is of a part of the seeds says so: those
        of which a member failed may be the worst."""
        return self.finding + self.part

    @property
    def part(self) -> str:
        """Of how many seeds, where it is not of all."""
        number = self.interval.number
        return f", on {number} of {number + self.missing} seeds" if self.missing else ""

    @property
    def finding(self) -> str:
        """`verdict` without the seeds."""
        mean, half = self.interval.mean, self.interval.half_width
        if half is None:
            return "one seed, no interval"
        if not self.interval.excludes_zero:
            return "no difference found"
        gain = abs(mean)
        return f"{'better' if mean < 0 else 'worse'} by {gain:.4f} ({gain - half:.4f} to {gain + half:.4f})"

    def record(self) -> dict[str, Any]:
        """For results.json."""
        half = self.interval.half_width
        low_high = None if half is None else [self.interval.mean - half, self.interval.mean + half]
        return {
            "baseline": self.baseline,
            "mean": self.interval.mean,
            "interval": low_high,
            "number": self.interval.number,
            "missing": self.missing,
            "deviation": self.deviation,
            "smallest_visible": self.smallest_visible,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Cell:
    """The arms under one objective and condition.

    Attributes:
        rows: {arm: {seed: row}}, of members that are done.
        best_static: the static arms, by their mean loss over the seeds that all of them have; the lowest first.
        differences: {arm: its differences}.
    """

    objective: str
    condition: Condition
    rows: Mapping[str, Mapping[int, Row]]
    best_static: tuple[str, ...]
    differences: Mapping[str, Sequence[Difference]]


@dataclass(frozen=True)
class Results:
    """Results of an arena, as far as its members are done.

    Attributes:
        left_out: {member: why its run is not among the rows}, of those that are done.
    """

    study: ArenaStudy
    rows: tuple[Row, ...]
    done: int
    total: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def missing(self) -> dict[str, int]:
        """{arm: members that are not among the rows}."""
        there = {row.member for row in self.rows}
        return dict(Counter(entry.arm.name for entry in self.study.entries if entry.name not in there))

    @cached_property
    def cells(self) -> list[Cell]:
        """A cell for each objective and condition with a row."""
        found: dict[tuple[str, Condition], Cell] = {}
        for objective in self.study.objectives:
            # Without the trap first: what a trap is compared with.
            for condition in sorted(self.study.conditions, key=lambda one: one.trap != NO_TRAP):
                rows = self._rows_of(objective, condition)
                if rows:
                    plain = found.get((objective, Condition(condition.model, condition.steps, NO_TRAP)))
                    found[objective, condition] = self._cell(objective, condition, rows, plain)
        return list(found.values())

    def _rows_of(self, objective: str, condition: Condition) -> dict[str, dict[int, Row]]:
        rows: dict[str, dict[int, Row]] = {}
        key = (objective, condition.model or "", condition.steps, condition.trap)
        for row in self.rows:
            if (row.objective, row.model, row.budget, row.trap) == key:
                rows.setdefault(row.arm, {})[row.seed] = row
        return {arm: rows[arm] for arm in self.study.arms if arm in rows}

    def _cell(
        self, objective: str, condition: Condition, rows: Mapping[str, Mapping[int, Row]], plain: Cell | None
    ) -> Cell:
        arms = self.study.arms
        best = best_of({arm: found for arm, found in rows.items() if arms[arm].is_static and arms[arm].mean_of is None})
        differences: dict[str, list[Difference]] = {}
        for arm, mine in rows.items():
            found = []
            if NATURAL in rows and arm != NATURAL:
                found.append(self._difference("natural", NATURAL, mine, rows[NATURAL]))
            rival = next((name for name in best if name != arm), None)
            if rival is not None:
                found.append(self._difference("best_static", rival, mine, rows[rival]))
            if condition.trap != NO_TRAP and plain is not None and plain.best_static:
                rival = plain.best_static[0]
                found.append(self._difference(WITHOUT_TRAP, rival, mine, plain.rows[rival]))
            if (mean := arm + FROZEN) in rows and arms[mean].mean_of == arm:
                found.append(self._difference("frozen", mean, mine, rows[mean]))
            differences[arm] = [one for one in found if one is not None]
        return Cell(objective, condition, rows, best, differences)

    @property
    def num_comparisons(self) -> int:
        """Different pairs with an interval: where natural is the best static arm, both differences to it are one."""
        pairs = {
            (
                cell.objective,
                cell.condition,
                one.against == WITHOUT_TRAP and arm,
                frozenset((arm, one.baseline)),
            )
            for cell in self.cells
            for arm, found in cell.differences.items()
            for one in found
            if one.interval.half_width is not None
        }
        return len(pairs)

    def _difference(
        self, against: str, baseline: str, mine: Mapping[int, Row], theirs: Mapping[int, Row]
    ) -> Difference | None:
        return difference(against, baseline, mine, theirs, len(self.study.config.seeds))

    def csv(self) -> str:
        """results.csv; an empty cell where there is no number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in self.rows)
        return text.getvalue()

    def json(self) -> dict[str, Any]:
        """results.json."""
        return {
            "megamix": __version__,
            "members": {"done": self.done, "total": self.total},
            "seeds": list(self.study.config.seeds),
            "objectives": self.study.objectives,
            "left_out": dict(self.left_out),
            "comparisons": self.num_comparisons,
            "cells": [self._cell_record(cell) for cell in self.cells],
        }

    def _cell_record(self, cell: Cell) -> dict[str, Any]:
        return {
            "objective": cell.objective,
            **asdict(cell.condition),
            "best_static": cell.best_static[0] if cell.best_static else None,
            "arms": {arm: arm_record(cell, arm) for arm in cell.rows},
        }


def arm_record(cell: Cell, arm: str) -> dict[str, Any]:
    """Means of an arm over its seeds, and its differences."""
    rows = list(cell.rows[arm].values())
    losses = [row.objective_loss for row in rows]
    reached = [row.steps_to_target for row in rows]
    means = {
        key: statistics.fmean(getattr(row, key) for row in rows)
        for key in ("objective_loss", "macro_loss", "micro_loss", "worst_loss", "seconds")
    }
    noise = [row.noise_tokens for row in rows if row.noise_tokens is not None]
    return {
        "seeds": [row.seed for row in rows],
        **means,
        "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        # A mean over the seeds that got there would favour an arm that gets there rarely.
        "steps_to_target": None if None in reached else statistics.fmean(step for step in reached if step is not None),
        "reached_target": sum(step is not None for step in reached),
        "noise_share": statistics.fmean(noise) / rows[0].tokens if noise else None,
        "differences": {one.against: one.record() for one in cell.differences[arm]},
    }


def online_runs(results: Results) -> list[Entry]:
    """A member of each arm with a mixer, and for each objective that it follows: of the first seed and condition that
    are done."""
    done = {row.member for row in results.rows}
    found: dict[tuple[str, str | None], Entry] = {}
    for entry in results.study.entries:
        if entry.name in done and not entry.arm.is_static:
            found.setdefault((entry.arm.name, entry.objective), entry)
    return list(found.values())


def best_of(rows: Mapping[str, Mapping[int, Row]]) -> tuple[str, ...]:
    """Arms by their mean objective loss over the seeds that all of them have; none where no seed is common."""
    common = set.intersection(*(set(found) for found in rows.values())) if rows else set()
    if not common:
        return ()
    mean = {arm: statistics.fmean(found[seed].objective_loss for seed in common) for arm, found in rows.items()}
    return tuple(sorted(mean, key=lambda arm: mean[arm]))


def difference(
    against: str, baseline: str, mine: Mapping[int, Row], theirs: Mapping[int, Row], seeds: int
) -> Difference | None:
    """An arm less a baseline over the seeds that both have; None where there is none.

    Args:
        seeds: how many the arena has.
    """
    pairs = [mine[seed].objective_loss - theirs[seed].objective_loss for seed in mine if seed in theirs]
    if not pairs:
        return None
    deviation = statistics.stdev(pairs) if len(pairs) > 1 else None
    smallest = None if deviation is None else smallest_visible(deviation, len(pairs))
    return Difference(against, baseline, t_interval(pairs), seeds - len(pairs), deviation, smallest)


def read_results(study: ArenaStudy) -> Results:
    """What the members that are done have come to; see `read_rows`."""
    rows, left_out = read_rows(study)
    done = len({row.member for row in rows}) + len(left_out)
    return Results(study, rows, done, len(study.entries), left_out)
