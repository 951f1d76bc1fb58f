"""Arenas that run: killed and gone on with, a domain that comes late, frozen means, and the results."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOut
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, RUN_SECONDS
from processes import children, wait_for_step, wait_until_gone
from records import lines
from test_arena import DOMAINS, ODM, config

from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.locks import turn
from megamix.studies.arena.checks import read_study
from megamix.studies.arena.collect import collect
from megamix.studies.arena.tasks import arena
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun

Megamix = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]
STEPS = 24
LONG: dict[str, Any] = {
    "train": {"steps": STEPS, "micro_batch": 8},
    "checkpoint": {"every": 8},
    "evaluate": {"every": 8},
}


def rows(folder: Path) -> list[dict[str, str]]:
    """results.csv without what depends on the clock."""
    with (folder / "results.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_killed_and_started_again_it_has_the_same_results(megamix: Megamix, tiny_config: Write, tmp_path: Path) -> None:
    path = config(
        tiny_config,
        {"seeds": [1, 2], "controls": False, "frozen_mean": False, "arms": {"natural": {}, "odm": ODM}},
        **LONG,
    )
    whole = f"run_dir={tmp_path / 'whole'}"
    megamix("arena", path, whole, "--at-once", "2")

    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "megamix", "arena", str(path), "--at-once", "2"],
        env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(run / "runs" / "seed1.natural", 10, process)
    members = children(process.pid)
    process.kill()
    process.communicate(timeout=RUN_SECONDS)
    wait_until_gone(members)
    said = megamix("arena", path, "--only", "collect").stdout
    assert "of 4 members are done" in said
    assert len(rows(run)) < 4
    said = megamix("arena", path, "--at-once", "2").stdout
    assert "All 4 members are done." in said
    assert [(row["arm"], row["seed"]) for row in rows(run)] == [
        ("natural", "1"),
        ("odm", "1"),
        ("natural", "2"),
        ("odm", "2"),
    ]
    assert rows(run) == rows(tmp_path / "whole")

    # The numbers are those of the records.
    for row in rows(run):
        last = [line for line in lines(run / "runs" / row["member"] / "metrics.jsonl") if line["event"] == "evaluate"][
            -1
        ]
        assert float(row["objective_loss"]) == pytest.approx(last["objective_loss"], abs=1e-12)
        assert float(row["macro_loss"]) == pytest.approx(last["macro_loss"], abs=1e-12)
        assert float(row["micro_loss"]) == pytest.approx(last["micro_loss"], abs=1e-12)
        assert float(row["worst_loss"]) == last["worst_loss"]
        assert int(row["tokens"]) == STEPS * 8 * 64
    assert float(rows(run)[0]["steps_to_target"]) <= STEPS
    results = json.loads((run / "results.json").read_bytes())
    losses = {(row["arm"], row["seed"]): float(row["objective_loss"]) for row in rows(run)}
    found = results["cells"][0]["arms"]["odm"]["differences"]["natural"]
    wanted = sum(losses["odm", seed] - losses["natural", seed] for seed in "12") / 2
    assert found["mean"] == pytest.approx(wanted)

    # The page says the same, and loads nothing.
    page = (run / "arena.html").read_text(encoding="utf-8")
    assert found["verdict"] in page
    assert f"{found['mean']:+.4f}" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    plots = {"differences.png", f"gain.natural.{STEPS}steps.png", "weights.png"}
    assert {path.name for path in (run / "plots").iterdir()} == plots


def test_a_domain_that_comes_late_and_a_frozen_mean(megamix: Megamix, tiny_config: Write, tmp_path: Path) -> None:
    late = {"kind": "late", "domain": "tables", "from_step": 5}
    path = config(tiny_config, {"seeds": [3], "controls": False, "arms": {"odm": ODM}, "traps": {"late": late}})
    megamix("arena", path, "--at-once", "2")
    runs = tmp_path / "run" / "runs"
    assert sorted(folder.name for folder in runs.iterdir()) == ["seed3.late.odm", "seed3.odm", "seed3.odm-frozen"]

    ledger = lines(runs / "seed3.late.odm" / "weights.jsonl")
    arrival = next(line for line in ledger if "tables" in line["domain_names"])
    assert arrival["position"] == 5 * 8
    assert arrival["change"]["domains"]["added"] == ["tables"]
    assert all("tables" not in line["domain_names"] for line in ledger[: ledger.index(arrival)])
    plan = read_yaml(tmp_path / "run" / "members" / "arms" / "seed3.late.odm.yaml")
    share = plan["checkpoint"]["domains"]["add"]["tables"]
    assert dict(zip(arrival["domain_names"], arrival["domain_weights"], strict=True))["tables"] == pytest.approx(share)

    parent, frozen = (RecordedRun.open(runs / name) for name in ("seed3.odm", "seed3.odm-frozen"))
    weights = dict(zip(DOMAINS, frozen.ledger.lines[0]["domain_weights"], strict=True))
    assert weights == pytest.approx(run_weights(parent, "mean"))
    assert len(frozen.ledger.lines) == 1
    by_trap = {(row["arm"], row["trap"]): row for row in rows(tmp_path / "run")}
    assert by_trap.keys() == {("odm", "none"), ("odm-frozen", "none"), ("odm", "late")}
    assert int(by_trap["odm", "late"]["noise_tokens"]) > 0
    assert by_trap["odm", "none"]["noise_tokens"] == ""


def test_what_a_run_lost_is_left_out_and_said(megamix: Megamix, tiny_config: Write, tmp_path: Path) -> None:
    """A member that fails, is damaged, or was made with another config: the results are of the others, and say so."""
    fails = {"mixture": "uniform", "guard.explosion": 1e-3}
    arms = {"natural": {}, "odm": ODM, "fails": fails}
    path = config(tiny_config, {"seeds": [1, 2], "controls": False, "arms": arms})
    done = megamix("arena", path, "--at-once", "2", code=1)
    assert "2 of 6 members failed" in done.stderr
    assert "6 of 8 members are done: the results are of these." in done.stdout
    assert "Members that the results lack, by arm: fails 2." in done.stdout
    folder = tmp_path / "run"
    assert len(rows(folder)) == 6

    def left_out(**sections: Any) -> dict[str, str]:
        collect(read_study(config(tiny_config, {"seeds": [1, 2], "controls": False, "arms": arms}, **sections), []))
        found = json.loads((folder / "results.json").read_bytes())
        assert len(rows(folder)) == 6 - len(found["left_out"])
        return found["left_out"]

    metrics = folder / "runs" / "seed2.odm" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(line for line in whole.splitlines(keepends=True) if json.loads(line)["step"] < 10))
    lost = left_out()
    assert lost.keys() == {"seed2.odm", "seed2.odm-frozen"}
    assert "metrics.jsonl has no evaluation after its last step, 12" in lost["seed2.odm"]
    assert re.search(r"seed2\.odm has trained 9 of its 12 steps", lost["seed2.odm-frozen"])
    results = json.loads((folder / "results.json").read_bytes())
    verdict = results["cells"][0]["arms"]["odm"]["differences"]["natural"]["verdict"]
    assert verdict == "one seed, no interval, on 1 of 2 seeds"

    metrics.write_text(whole)
    ledger = folder / "runs" / "seed2.odm" / "weights.jsonl"
    written = ledger.read_text()
    first, rest = written.split("\n", 1)
    moved = {**json.loads(first), "domain_weights": [0.5, 0.25, 0.25]}
    ledger.write_text(f"{json.dumps(moved)}\n{rest}")
    lost = left_out()
    assert lost.keys() == {"seed2.odm-frozen"}
    assert "its weights are not the mean of odm's" in lost["seed2.odm-frozen"]
    ledger.write_text(written)

    for state in (folder / "runs" / "seed1.natural" / "checkpoints").glob("*/state.json"):
        state.write_text("{")
    assert left_out().keys() == {"seed1.natural"}
    lost = left_out(train={"lr": 1e-3})
    assert len(lost) == 6
    assert "it was made with another config: train.lr is 0.001, and was 0.003" in lost["seed2.odm"]


def test_results_are_written_by_one_at_a_time(tiny_config: Write, tmp_path: Path) -> None:
    """A job that collects, and somebody who looks at the results so far."""
    study = read_study(config(tiny_config, {"seeds": [1]}), [])
    folder = tmp_path / "run"
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with turn(folder):
            waits = pool.submit(collect, study)
            with pytest.raises(TimedOut):  # in Python 3.10 not the built-in one
                waits.result(timeout=1.0)
            assert not (folder / "results.csv").exists()
        waits.result(timeout=RUN_SECONDS)
    assert (folder / "results.csv").exists()


def test_it_does_not_start_within_a_job(tiny_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="megamix arena starts its own ranks"):
        arena(config(tiny_config), [])
