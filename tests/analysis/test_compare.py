"""``megamix compare`` on written records, against scipy and numbers worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from typer.testing import CliRunner

from megamix.analysis.compare import compare
from megamix.analysis.paired import t_interval
from megamix.analysis.series import first_step_at
from megamix.cli import app
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.data.blend.blend import Blend
from megamix.training.config import KINDS

NAMES = ("web", "code", "books")
STEPS, BATCH, SEQ = 40, 8, 16
EVERY = 10


def losses(variant: str, seed: int, step: int) -> dict[str, float]:
    """Falling, with a part that the runs of a seed share and a smaller one of each run's own."""
    shared = np.random.default_rng(seed).normal(size=3) * 0.3
    own = np.random.default_rng([seed, len(variant), step]).normal(size=3) * 0.02
    level = 6.0 - step * (0.06 if variant == "static" else 0.07)
    return dict(zip(NAMES, (level + shared + own + np.array([0.0, 0.5, 0.2])).tolist(), strict=True))


def write_run(folder: Path, variant: str, seed: int, steps: int = STEPS, **sections: Any) -> Path:
    """The record of a run of a mixer; the natural shares are 0.5, 0.3 and 0.2."""
    run = folder / f"{variant}-{seed}"
    run.mkdir(parents=True)
    config: dict[str, Any] = {
        "run_dir": str(run),
        "data": {"manifest": "nowhere", "seq_length": SEQ},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixer": {"name": variant},
        "train": {"steps": steps, "global_batch": BATCH, "micro_batch": 4, "lr": 1e-3, "seed": seed},
    }
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(merge(config, sections, KINDS)), encoding="utf-8")
    segment = Blend([9, 9, 9], [0.5, 0.3, 0.2], seed).segment_at(0).to_json()
    line = {"step": 0, "position": 0, "domain_names": NAMES, "domain_weights": segment["weights"], "segment": segment}
    (run / "weights.jsonl").write_text(json.dumps(line) + "\n")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(0, steps + 1, EVERY):
            loss = losses(variant, seed, step)
            values = np.array(list(loss.values()))
            line = {"event": "evaluate", "step": step, "tokens": step * BATCH * SEQ, "domain_loss": loss}
            line |= {"macro_loss": values.mean(), "micro_loss": float(values @ [0.5, 0.3, 0.2])}
            file.write(json.dumps(line) + "\n")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of two variants; a layout and a log of its own make no variant."""
    other: dict[str, Any] = {"engine": {"pipeline": 2, "data": 2}, "log": {"every": 3}, "checkpoint": {"every": 7}}
    return [
        write_run(tmp_path, variant, seed, **(other if seed == 3 else {}))
        for variant in ("static", "odm")
        for seed in (1, 2, 3)
    ]


def final(variant: str, metric: str) -> np.ndarray:
    """float64 [3], by seed."""
    rows = np.array([list(losses(variant, seed, STEPS).values()) for seed in (1, 2, 3)])
    return {"macro": rows.mean(axis=1), "worst": rows.max(axis=1), "micro": rows @ [0.5, 0.3, 0.2]}[metric]


@pytest.mark.parametrize("metric", ["macro", "worst", "micro"])
def test_losses_are_compared_seed_by_seed(runs: list[Path], metric: str) -> None:
    found = {summary.variant: summary for summary in compare(runs).summaries if summary.metric == metric}
    base, other = final("static", metric), final("odm", metric)
    assert list(found) == ["natural", "odm-official"]
    assert found["natural"].mean is not None
    assert found["natural"].mean.mean == pytest.approx(base.mean())
    assert found["natural"].difference is None
    difference = found["odm-official"].difference
    assert difference is not None
    interval = stats.ttest_rel(other, base).confidence_interval(0.95)
    assert difference.half_width is not None
    assert difference.mean - difference.half_width == pytest.approx(interval.low, rel=1e-9)
    assert difference.mean + difference.half_width == pytest.approx(interval.high, rel=1e-9)
    assert difference.excludes_zero
    # Less wide than without pairs, of which the spread between seeds would be a part.
    unpaired = stats.ttest_ind(other, base).confidence_interval(0.95)
    assert difference.half_width < 0.8 * (unpaired.high - unpaired.low) / 2


def crossing(variant: str, seed: int, target: float) -> float:
    """The step at which the piecewise linear curve of a run's objective loss is at ``target``."""
    steps = np.arange(0, STEPS + 1, EVERY)
    loss = [np.dot([0.5, 0.3, 0.2], list(losses(variant, seed, step).values())) for step in steps.tolist()]
    return float(np.interp(-target, -np.array(loss), steps))


def test_step_at_which_a_target_is_reached() -> None:
    curve = [(0, 6.0), (10, 5.0), (20, 4.0), (30, 4.5)]
    assert first_step_at(curve, 4.25) == pytest.approx(np.interp(-4.25, [-6, -5, -4], [0, 10, 20]))
    assert first_step_at(curve, 4.0) == 20
    assert first_step_at(curve, 3.9) is None
    assert first_step_at(curve, 7.0) == 0


def test_steps_to_target(runs: list[Path]) -> None:
    """Without a target, what the baseline ends with at the same seed; with one, that for all."""
    found = {(run.variant, run.seed): run for run in compare(runs).runs}
    for seed in (1, 2, 3):
        assert found["natural", seed].steps == STEPS
        target = float(final("static", "micro")[seed - 1])
        steps = crossing("odm", seed, target)
        assert STEPS - 2 * EVERY < steps < STEPS
        assert found["odm-official", seed].steps == pytest.approx(steps)
        assert found["odm-official", seed].tokens == pytest.approx(steps * BATCH * SEQ)
    target = 4.5
    given = compare(runs, target)
    for run in given.runs:
        assert run.steps == pytest.approx(crossing("static" if run.variant == "natural" else "odm", run.seed, target))
    (summary,) = (one for one in given.summaries if (one.variant, one.metric) == ("odm-official", "steps"))
    assert summary.difference is not None
    expected = np.mean([crossing("odm", seed, target) - crossing("static", seed, target) for seed in (1, 2, 3)])
    assert summary.difference.mean == pytest.approx(expected)
    # Reached before the first step; and by the three odm runs only.
    assert {run.steps for run in compare(runs, 9.0).runs} == {0.0}
    low = float(final("static", "micro").min()) - 0.01
    some = compare(runs, low)
    assert [run.steps is None for run in some.runs][:3] == [True, True, True]
    assert {one.difference for one in some.summaries if one.metric in ("steps", "tokens")} == {None}


def test_tables_and_files(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--baseline", "odm-official", "--out", str(out)])
    assert done.exit_code == 0, done.output
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["odm-official"] * 3 + ["natural"] * 3
    assert [float(row["objective"]) for row in rows[3:]] == pytest.approx(final("static", "micro"))
    assert [float(row["macro"]) for row in rows[3:]] == final("static", "macro").tolist()
    assert [row["worst_domain"] for row in rows[3:]] == [
        max(NAMES, key=losses("static", seed, STEPS).__getitem__) for seed in (1, 2, 3)
    ]
    assert [row["steps"] for row in rows[3:]] == ["", "", ""]
    with (out / "variants.csv").open() as file:
        long = {(row["variant"], row["metric"]): row for row in csv.DictReader(file)}
    row = long["natural", "macro"]
    difference = final("static", "macro") - final("odm", "macro")
    assert float(row["difference"]) == pytest.approx(difference.mean())
    assert row["pairs"] == row["seeds"] == "3"
    assert f"{difference.mean():.4f}" in done.output
    assert "the objective is natural" in done.output
    metrics = [summary.metric for summary in compare(runs).summaries if summary.variant == "natural"]
    assert metrics[:2] == ["objective", "macro"]
    assert long["natural", "steps"]["mean"] == ""
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_records_without_natural_shares(runs: list[Path], tmp_path: Path) -> None:
    """Have no loss by the objective natural: the other losses are compared, and there is no target."""
    for run in runs:
        found = [json.loads(line) | {"micro_loss": None} for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    found = compare(runs, out=tmp_path / "out")
    assert {(run.objective, run.target, run.steps) for run in found.runs} == {(None, None, None)}
    assert [run.macro for run in found.runs[:3]] == final("static", "macro").tolist()
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0


def test_variants(tmp_path: Path) -> None:
    """Named by mixer, or by mixture where there is none, and by the keys that differ where that is not enough."""
    static, odm = {"name": "static"}, {"name": "odm", "preset": "paper"}
    changes: list[dict[str, Any]] = [
        {"mixer": static},
        {"mixer": static, "mixture": "uniform"},
        {"mixer": static, "mixture": {"file": "found/weights.json"}},
        {"mixer": odm},
        {"mixer": odm, "train": {"lr": 2e-3}},
        {"mixer": odm, "mixture": "uniform"},
        {"mixer": static, "engine": {"precision": "bf16"}},
    ]
    runs = [write_run(tmp_path / str(number), "static", 1, **change) for number, change in enumerate(changes)]
    assert sorted(run.variant for run in compare(runs).runs) == [
        "natural (engine.precision=bf16)",
        "natural (engine.precision=fp32)",
        "odm-paper (train.lr=0.001)",
        "odm-paper (train.lr=0.002)",
        "odm-paper from uniform",
        "uniform",
        "weights",
    ]


def test_seeds_that_only_one_side_has(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "static", seed) for seed in (1, 2)] + [
        write_run(tmp_path, "odm", seed) for seed in (2, 3)
    ]
    found = {one.variant: one for one in compare(runs).summaries if one.metric == "macro"}
    difference = found["odm-official"].difference
    assert difference is not None
    assert (difference.number, difference.half_width) == (1, None)
    assert difference.mean == pytest.approx(final("odm", "macro")[1] - final("static", "macro")[1])
    assert not difference.excludes_zero
    alone = {one.variant: one for one in compare([runs[0], runs[3]]).summaries if one.metric == "macro"}
    assert alone["odm-official"].difference is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"seq_length": 32}}, "data.seq_length is 32 and 16"),
        ({"evaluate": {"batches": 3}}, "evaluate.samples is 12 and 64"),
        ({"objective": "uniform"}, "the objective is uniform and natural"),
        ({"data": {"eod_mask_loss": True}}, "data.eod_mask_loss is True and False"),
        ({"steps": 0, "train": {"steps": 1}}, "has no evaluation after training"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    runs = [write_run(tmp_path, "static", 1), write_run(tmp_path, "odm", 1, **change)]
    with pytest.raises(InputError, match=message):
        compare(runs)


def test_runs_of_different_lengths_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "static", 1), write_run(tmp_path, "odm", 1, steps=30)]
    found = compare(runs)
    rows = {run.variant: run for run in found.runs}
    assert len(rows) == 2
    for run, variant in zip(found.runs, ("static", "odm"), strict=True):
        at_30 = losses(variant, 1, 30)
        assert (run.macro, run.worst) == pytest.approx((np.mean(list(at_30.values())), max(at_30.values())), rel=1e-14)
        assert run.curve[-1][0] == 30 * BATCH * SEQ
        assert run.objective == pytest.approx(np.dot([0.5, 0.3, 0.2], list(at_30.values())), rel=1e-14)
        assert run.target == pytest.approx(np.dot([0.5, 0.3, 0.2], list(losses("static", 1, 30).values())), rel=1e-14)
    assert "the runs end after 3,840 to 5,120 tokens and are compared after 3,840" in found.report().text()
    metrics = runs[1] / "metrics.jsonl"
    moved = [
        {**json.loads(line), "tokens": json.loads(line)["tokens"] + 1} for line in metrics.read_text().splitlines()
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in moved))
    with pytest.raises(
        InputError, match=r"end after 3,841, 5,120 tokens, and no number of tokens is one after which all"
    ):
        compare(runs)


def test_other_mistakes(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 run is given"):
        compare(runs[:1])
    with pytest.raises(InputError, match=r"no such variant\. Did you mean 'odm-official'"):
        compare(runs, baseline="odm-oficial")
    again = write_run(tmp_path / "again", "odm", 2)
    with pytest.raises(InputError, match=r"are both of the variant 'odm-official' with train.seed 2"):
        compare([*runs, again])
    metrics = again / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"code": ', '"prose": '))
    with pytest.raises(InputError, match="the set of domains is books, prose, web and books, code, web"):
        compare([runs[0], again])


@pytest.mark.parametrize(
    ("values", "confidence", "t"),
    [([1, 3], 0.95, 12.706), ([1, 2, 3], 0.95, 4.303), ([0.1, -0.4, 2.5, 0.7], 0.99, 5.841), (range(31), 0.5, 0.683)],
)
def test_intervals_by_printed_tables_of_t(values: list[float], confidence: float, t: float) -> None:
    found = t_interval(values, confidence)
    mean = sum(values) / len(values)
    error = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(t * error, rel=1e-3)
    assert t_interval(values[:1], confidence).half_width is None
