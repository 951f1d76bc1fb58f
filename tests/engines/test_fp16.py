"""fp16 with a dynamic loss scale: its rule, and runs in which it overflows, stops and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import SUPPORT
from jobs import run_job
from records import largest_difference, lines, record

from megamix.engines.loss_scale import FIRST_SCALE, LARGEST_SCALE, STEPS_TO_DOUBLE, LossScale
from megamix.training.checkpoints.state import read_state

STEPS, STOP = 24, 13


def test_the_scale_doubles_after_good_steps_and_halves_after_others() -> None:
    scale = LossScale()
    for _ in range(STEPS_TO_DOUBLE - 1):
        assert scale.update(is_finite=True) is None
    assert scale == LossScale(FIRST_SCALE, STEPS_TO_DOUBLE - 1)
    scale.update(is_finite=True)
    assert scale == LossScale(2 * FIRST_SCALE, 0)
    scale.update(is_finite=True)
    text = scale.update(is_finite=False)
    assert text == "its gradients exceed fp16 with loss scale 131,072, which is 65,536 from here on"
    assert scale == LossScale(FIRST_SCALE, 0), "good steps are counted from the change on"


def test_the_scale_has_ends() -> None:
    """At the least it says nothing: gradients that exceed fp32 without a scale are no matter of it."""
    scale = LossScale(2.0, 3)
    assert scale.update(is_finite=False) is not None
    assert scale.update(is_finite=False) is None
    assert scale.scale == 1.0
    scale = LossScale(LARGEST_SCALE, STEPS_TO_DOUBLE - 1)
    scale.update(is_finite=True)
    assert scale.scale == LARGEST_SCALE


def test_its_state_is_all_of_it() -> None:
    scale, other = LossScale(8.0, 5), LossScale()
    other.load_state_dict(scale.state_dict())
    assert other == scale


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """In fp16 at once and in two parts, and in fp32, with a scale that doubles every other step."""
    folder = tmp_path_factory.mktemp("fp16")

    def config(name: str, precision: str) -> Path:
        sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64}
        settings = {
            "run_dir": str(folder / name),
            "data": {"manifest": str(data_dir), "seq_length": 32},
            "model": {"architecture": "neox", **sizes},
            "mixer": {"name": "odm", "preset": "official", "warmup_steps": 3},
            "engine": {"name": "deepspeed", "precision": precision},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "lr": 3.0e-3, "warmup": 0.1, "clip": 0.5},
            "evaluate": {"every": STEPS, "batches": 2},
            "checkpoint": {"every": 0},
            "log": {"every": 1},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    job: list[tuple[Path, tuple[str, ...]]] = [(config("whole", "fp16"), ()), (config("fp32", "fp32"), ())]
    job += [(config("parts", "fp16"), (f"train.stop_after={STOP}",)), (config("parts", "fp16"), ())]
    run_job(1, job, SUPPORT / "fp16_job.py")
    return folder


def overflows(run: Path) -> list[int]:
    """Steps that were left out, counted from 1."""
    skipped = [line for line in lines(run / "events.jsonl") if line["event"] == "skipped"]
    assert all("left out: its gradients exceed fp16 with loss scale" in line["text"] for line in skipped)
    return [line["step"] for line in skipped]


def test_a_step_that_overflows_is_left_out_and_said(runs: Path) -> None:
    """And the run goes on, by the policy that stops it at a loss that is not finite."""
    found = overflows(runs / "whole")
    assert found
    assert not (runs / "whole" / "non_finite.jsonl").exists()
    state = read_state(runs / "whole" / "checkpoints" / f"step_{STEPS}")
    assert state.guard.skips == len(found)
    assert state.loss_scale is not None
    assert FIRST_SCALE < state.loss_scale["scale"] < LARGEST_SCALE


def test_losses_follow_those_of_fp32(runs: Path) -> None:
    """Up to fp16's rounding, and to the few steps that were left out; without the scale in a sum, or with it in a
    gradient that clipping sees, they would not."""
    loss, _ = largest_difference(runs / "fp32", runs / "whole")
    assert loss < 0.1
    first, _ = (record(runs / name)[0] for name in ("whole", "fp32"))
    trained = [line for line in first if line["event"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.2


def test_stopped_and_resumed_is_the_uninterrupted_run(runs: Path) -> None:
    """To the last digit, the scale with it."""
    stopped, whole = (read_state(runs / "parts" / "checkpoints" / f"step_{step}") for step in (STOP, STEPS))
    assert stopped.loss_scale is not None
    assert stopped.loss_scale != LossScale().state_dict(), "another scale than that of a start"
    assert max(overflows(runs / "whole")) > STOP
    assert record(runs / "parts") == record(runs / "whole")
    assert overflows(runs / "parts") == overflows(runs / "whole")
    assert whole.loss_scale == read_state(runs / "whole" / "checkpoints" / f"step_{STEPS}").loss_scale
