"""DoReMi in rounds, with real runs: killed between rounds and within one, and resumed. Takes a few minutes
(``-m slow``)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ENVIRONMENT
from processes import children, wait_until_gone
from records import record, samples

from megamix.core.config_files import read_yaml
from megamix.data.reference_losses import read_info

STEPS, ROUNDS = 16, 3
SECONDS = 1200

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "run_dir": "run",
        "data": {"manifest": str(data_dir), "seq_length": 32},
        "model": {"architecture": "neox", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
        "mixture": "natural",
        "train": {"steps": STEPS, "global_batch": 16, "micro_batch": 4, "lr": 5.0e-3, "warmup": 0.1},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 4},
        "log": {"every": 1, "samples": True},
        "doremi": {
            "proxy": {"mixer": {"eta": 0.2}}, "target": {"train": {"steps": 4}}, "rounds": ROUNDS, "tolerance": 1e-9
        },
    }  # fmt: skip
    path = tmp_path_factory.mktemp("rounds") / "doremi.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def start(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megamix", "doremi", str(config), f"run_dir={run_dir}"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL)


def kill_when(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the command, whose ranks end with it, once something is seen on disk."""
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(ranks)  # until then they hold the lock of their run


@pytest.fixture(scope="module")
def runs(config: Path) -> tuple[Path, Path]:
    """(in one go, killed three times)."""
    whole, killed = config.parent / "whole", config.parent / "killed"
    second = killed / "round_2"
    # Once round 1 has its weights, in the second reference run, and in the last proxy run.
    for reached in (
        (second / "reference.yaml").is_file,
        (second / "reference" / "checkpoints" / "step_8" / "checkpoint.json").is_file,
        (killed / "round_3" / "proxy" / "checkpoints" / "step_4" / "checkpoint.json").is_file,
    ):
        kill_when(reached, start(config, killed))
        assert not (killed / "weights.json").exists()
    for run_dir in (killed, whole):
        process = start(config, run_dir)
        assert process.wait(timeout=SECONDS) == 0
    return whole, killed


def folders(run_dir: Path) -> list[Path]:
    return [run_dir, *(run_dir / f"round_{number}" for number in range(2, ROUNDS + 1))]


def test_killed_is_the_same_as_in_one_go(runs: tuple[Path, Path]) -> None:
    """Every run of every round to the last digit, and every cache byte by byte."""
    whole, killed = runs
    assert (killed / "weights.json").read_bytes() == (whole / "weights.json").read_bytes()
    for one, other in zip(folders(whole), folders(killed), strict=True):
        for run in ("reference", "proxy"):
            assert record(one / run) == record(other / run)
            assert samples(one / run) == samples(other / run)
        for path in sorted((one / "cache").glob("*.f16")):
            assert path.read_bytes() == (other / "cache" / path.name).read_bytes(), path
    assert record(whole / "target") == record(killed / "target")


def test_each_round_starts_from_the_result_of_the_one_before(runs: tuple[Path, Path]) -> None:
    results, references = [], set()
    for number, folder in enumerate(folders(runs[0])):
        last = record(folder / "proxy")[1][-1]
        results.append(dict(zip(last["domain_names"], last["average_weights"], strict=True)))
        mixture = read_yaml(folder / "reference.yaml")["mixture"]
        assert mixture == ("natural" if number == 0 else pytest.approx(results[number - 1], rel=1e-12))
        used = record(folder / "reference")[1][0]
        if number:
            assert dict(zip(used["domain_names"], used["domain_weights"], strict=True)) == pytest.approx(
                results[number - 1], rel=1e-12
            )
        # The proxies are alike but for the reference, and all start from equal weights.
        assert read_yaml(folder / "proxy.yaml")["mixer"]["reference"] == str(folder / "cache")
        assert record(folder / "proxy")[1][0]["loss_weights"] == [0.25] * 4
        references.add(read_info(folder / "cache").checkpoint_sha256)
    assert len(references) == ROUNDS
    assert json.loads((runs[0] / "weights.json").read_text()) == pytest.approx(results[-1], rel=1e-12)
    target = record(runs[0] / "target")[1][0]
    assert target["domain_weights"] == pytest.approx(list(results[-1].values()), rel=1e-12)
    # Rounds find different weights, though ever less so on real problems.
    assert np.abs(np.diff([list(result.values()) for result in results], axis=0)).max(axis=1).min() > 1e-9
