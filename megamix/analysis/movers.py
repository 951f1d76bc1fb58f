"""Domains to draw where there are too many: those whose weights moved most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megamix.core.text import plural
from megamix.training.records.recorded_run import RecordedRun

MOST = 40
"""Domains of a picture at most; beyond some dozens neither colours nor names can be told apart."""
PROMINENT = 12
"""Domains whose lines have names and full colour, at most."""


def top_movers(runs: Sequence[RecordedRun], most: int = MOST) -> list[RecordedRun]:
    """The runs, to be drawn with the same ``most`` domains: those with the largest range of weights in any of them, in
    the order of the runs' domains."""
    moved = _ranges(runs)
    if len(moved) <= most:
        return list(runs)
    kept = set(sorted(moved, key=lambda name: -moved[name])[:most])
    return [replace(run, drawn=tuple(name for name in run.ledger.names if name in kept)) for run in runs]


def prominent(runs: Sequence[RecordedRun], most: int = PROMINENT) -> frozenset[str]:
    """The drawn domains that stand out among the others: all, or beyond ``most`` those whose weights moved most."""
    moved, drawn = _ranges(runs), {name: None for run in runs for name in run.domain_names}
    return frozenset(sorted(drawn, key=lambda name: -moved[name])[:most])


def _ranges(runs: Sequence[RecordedRun]) -> dict[str, float]:
    """The largest range of each domain's weight in any of the runs."""
    moved: dict[str, float] = {}
    for run in runs:
        for name, span in zip(run.ledger.names, np.ptp(run.ledger.weights, axis=0).tolist(), strict=True):
            moved[name] = max(span, moved.get(name, 0.0))
    return moved


def movers_note(runs: Sequence[RecordedRun]) -> str:
    """Which domains are drawn; empty where all are."""
    every = {name for run in runs for name in run.ledger.names}
    drawn = {name for run in runs for name in run.domain_names}
    if len(drawn) == len(every):
        return ""
    return f"{plural(len(drawn), 'domain')} of {len(every):,}: those whose weights moved most"
