"""Reads and compares the records of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIMES = {
    "step_seconds",
    "data_wait_seconds",
    "communication_seconds",
    "mixing_seconds",
    "compute_seconds",
    "tokens_per_second",
    "memory_bytes",
    "flop_utilisation",
    "timestamp",
}


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, without what depends on the clock."""
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read]


def record(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(metrics, weights) of a run."""
    return lines(run / "metrics.jsonl"), lines(run / "weights.jsonl")


def samples(run: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> (domain, sample) of the whole global batch, the ranks' slices one after the other."""
    result: dict[int, list[tuple[int, int]]] = {}
    for path in sorted((run / "samples").glob("data_*.jsonl")):
        for line in lines(path):
            result.setdefault(line["step"], []).extend(zip(line["domain"], line["sample"], strict=True))
    return result


def largest_difference(run: Path, other: Path) -> tuple[float, float]:
    """The largest difference of any per-domain loss and of any weight (of sampling or of losses) between two records of
    the same steps."""
    (metrics, weights), (other_metrics, other_weights) = record(run), record(other)
    assert [(line["event"], line["step"]) for line in metrics] == [
        (line["event"], line["step"]) for line in other_metrics
    ]
    assert [line["step"] for line in weights] == [line["step"] for line in other_weights]
    loss = 0.0
    for line, twin in zip(metrics, other_metrics, strict=True):
        for name, value in line["domain_loss"].items():
            assert (value is None) == (twin["domain_loss"][name] is None), (line, twin)
            loss = max(loss, abs(value - twin["domain_loss"][name]) if value is not None else 0.0)
    weight = max(
        abs(a - b)
        for line, twin in zip(weights, other_weights, strict=True)
        for key in ("domain_weights", "loss_weights", "average_weights")
        for a, b in zip(line.get(key, []), twin.get(key, []), strict=True)
    )
    return loss, weight
