"""Series of long runs: what is drawn of them is near what is recorded, and says how near."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from recorded_runs import BATCH, SEQ, write_data, write_run
from report_pages import data_of, lines_of, rewrite

from megamix.analysis import series
from megamix.analysis.report import write_report
from megamix.training.records.recorded_run import RecordedRun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pile"
    write_data(folder)
    return folder


def test_thinned_steps_are_within_the_tolerance_they_state() -> None:
    rng = np.random.default_rng(3)
    values = np.cumsum(rng.normal(size=(5000, 4)), axis=0)
    values[2000] += 500.0
    for most in (2, 10, 300):
        kept, tolerance = series.thin(values, most)
        assert len(kept) <= most
        assert (kept[0], kept[-1]) == (0, 4999)
        held = values[kept[np.searchsorted(kept, np.arange(5000), "right") - 1]]
        assert np.abs(held - values).max() <= tolerance
    kept, tolerance = series.thin(values, 300)
    assert 2000 in kept
    # A little below the tolerance, the rule would keep more than allowed.
    strict, last = 1, values[0]
    for row in values[1:]:
        if np.abs(row - last).max() > tolerance * 0.998:
            strict, last = strict + 1, row
    assert strict >= 300


def test_repetitions_are_left_out_without_loss() -> None:
    values = np.repeat(np.arange(10.0), 100)[:, None]
    kept, tolerance = series.thin(values, 50)
    assert tolerance == 0.0
    assert kept.tolist() == [*range(0, 1000, 100), 999]
    assert series.thin(values[:5], 50)[0].tolist() == [0, 1, 2, 3, 4]


def test_a_long_run_makes_a_small_page_that_says_so(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    config = yaml.safe_load((tmp_path / "config.resolved.yaml").read_text())
    config["train"]["steps"] = 6000
    (tmp_path / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    first = lines_of(tmp_path, "weights.jsonl")[0]
    rng = np.random.default_rng(0)
    logits = np.cumsum(rng.normal(scale=0.02, size=(6000, 3)), axis=0)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    lines = []
    for step, row in enumerate(weights):
        segment = {**first["segment"], "start": step * BATCH}
        lines.append(
            {**first, "step": step, "position": step * BATCH, "domain_weights": row.tolist(), "segment": segment}
        )
    rewrite(tmp_path, "weights.jsonl", lines)
    text = write_report([tmp_path]).read_text()
    drawn = data_of(text)["weights:0"]
    tokens, values = np.array(drawn["x"][0]), np.array(drawn["y"]).T
    assert len(tokens) <= 401
    stated = re.search(r"changed 5,999 times; the chart draws the (\d+) changes.*?further than ([\d.]+) from", text)
    assert stated is not None
    assert int(stated[1]) == len(tokens) - 2
    positions = np.arange(6000) * BATCH * SEQ
    place = np.searchsorted(tokens, positions, "right") - 1
    assert np.abs(values[place] - weights).max() <= float(stated[2]) * 1.06
    assert len(text) < 300_000


def test_training_losses_become_means_over_tokens(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, data)
    rng = np.random.default_rng(1)
    loss, tokens = rng.uniform(1, 5, 100), rng.integers(1, 9, 100)
    lines = [
        {
            "event": "train", "step": step + 1, "tokens": (step + 1) * 10, "loss": loss[step], "tokens_per_second": 1.0,
            "domain_loss": {"web": loss[step], "c_$1$": None}, "domain_tokens": {"web": int(tokens[step]), "c_$1$": 0},
        }
        for step in range(100)
    ]  # fmt: skip
    rewrite(tmp_path, "metrics.jsonl", lines)
    found = series.training_series(RecordedRun.open(tmp_path), 10)
    wanted = [(loss * tokens)[i : i + 10].sum() / tokens[i : i + 10].sum() for i in range(0, 100, 10)]
    assert found.column("web") == (list(range(100, 1001, 100)), pytest.approx(wanted))
    assert found.column("c_$1$") == ([], [])


def test_scores_become_means() -> None:
    rows = np.arange(20.0).reshape(10, 2)
    rows[3, 1] = np.nan
    found = series.Series(("a", "b"), np.arange(10), rows).means(5)
    assert found.tokens.tolist() == [1, 3, 5, 7, 9]
    assert found.values.tolist() == [[1, 2], [5, 5], [9, 10], [13, 14], [17, 18]]
