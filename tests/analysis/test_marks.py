"""Marks on the weights of a run: each where it happened, drawn and in words."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from studied_runs import BATCH, HALF, SEQ, STEPS, studied_runs

from megamix.analysis.marks import marks
from megamix.analysis.plots.figures import weights_figure
from megamix.analysis.report import write_report
from megamix.training.records.recorded_run import RecordedRun


@pytest.fixture(scope="module")
def runs(data_dir: Path) -> Path:
    return studied_runs(data_dir)


def test_stage_and_resume(runs: Path, tmp_path: Path) -> None:
    run = RecordedRun.open(runs / "halves")
    found = [(mark.kind, mark.tokens) for mark in marks(run)]
    assert found == [("stage", 4 * BATCH * SEQ), ("resumed", HALF * BATCH * SEQ)]
    axes = weights_figure(run).axes[0]
    assert {line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"} == {
        tokens for _, tokens in found
    }
    page = write_report([runs / "halves"], tmp_path / "report.html").read_text()
    assert f"resumed at step {HALF}" in page
    assert page.count('<path class="mark"') == 4  # two marks in two charts


def test_jumps_are_the_largest_and_say_how_to_ask(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamix.analysis.marks._MOST_JUMPS", 4)
    folder = tmp_path / "run"
    shutil.copytree(runs / "plain", folder)
    path = folder / "weights.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Up and down again; six changes act before the end of the run.
    for number, row in enumerate(rows[2:10]):
        high = 0.351 + 0.01 * number
        row["domain_weights"] = [high, *[(1 - high) / 3] * 3] if number % 2 == 0 else [0.25] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    jumps = [mark for mark in marks(RecordedRun.open(folder)) if mark.kind == "jump"]
    names = rows[0]["domain_names"]
    far = [
        (abs(after["domain_weights"][0] - before["domain_weights"][0]), after["position"] * SEQ, after["step"])
        for before, after in itertools.pairwise(rows[1:])
    ]
    acting = [one for one in far if one[0] >= 0.1 and one[1] <= STEPS * BATCH * SEQ]
    assert len(acting) == 6
    wanted = sorted(sorted(acting, key=lambda one: -one[0])[:4], key=lambda one: one[1])
    assert [mark.tokens for mark in jumps] == [tokens for _, tokens, _ in wanted]
    assert all(
        mark.text.endswith(f"megamix why {folder} --domain {names[0]} --step {step}")
        for mark, (_, _, step) in zip(jumps, wanted, strict=True)
    )
