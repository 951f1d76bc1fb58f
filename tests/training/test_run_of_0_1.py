"""A run that megamix 0.1 wrote goes on, and can be looked at.

The archive holds a data set, a run that 0.1 stopped after 12 of 20 steps (ODM in stages, a shadow, an open log
interval), and the record of the same run undisturbed.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SUPPORT, run_megamix
from records import lines, samples

from megamix.analysis import inspect
from megamix.analysis.plots import plot_run
from megamix.analysis.report import write_report
from megamix.core.errors import ResumeRefused
from megamix.interop.hugging_face.export import export
from megamix.training.checkpoints.state import VERSION, GuardState, RunState, newest_state, read_state

SAVED, STEPS = 12, 20
# To first order a step moves the loss by g dw, summed over N parameters. Adam moves each by at most the learning rate,
# with a relative error of at most (error of g) / |g|, so that two processors part by N x lr x (error of g) a step. With
# N = 2e4, lr = 3e-3 and g (of order 0.1) off by 8 roundings of fp32, that is 3e-6; eight steps stay below 3e-5.
LOSS = 1e-4
# ODM's log weights move by exploration rate (1/3 at most) x loss / probability (1/10 at least). A hundred random
# changes of this size to the weights of this run dealt the very same samples.
WEIGHT = 4 * LOSS


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run_of_0_1")
    with tarfile.open(SUPPORT / "run_of_0_1.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def resumed(kept: Path) -> Path:
    """The run, continued to its end; the checkpoint of 0.1 stays."""
    config = kept / "run" / "config.resolved.yaml"
    overrides = [f"run_dir={kept / 'run'}", f"data.manifest={kept / 'data'}", "train.stop_after=null"]
    run_megamix("train", config, *overrides, f"checkpoint.keep_every={SAVED}")
    return kept / "run"


def close(seen: Any, wanted: Any, tolerance: float) -> None:
    """Numbers within ``tolerance`` of their size, all else the same."""
    if isinstance(wanted, dict):
        assert list(seen) == list(wanted)
        for key in wanted:
            close(seen[key], wanted[key], tolerance)
    elif isinstance(wanted, list):
        assert len(seen) == len(wanted)
        for one, other in zip(seen, wanted, strict=True):
            close(one, other, tolerance)
    elif isinstance(wanted, float):
        np.testing.assert_allclose(seen, wanted, rtol=tolerance, atol=tolerance)
    else:
        assert seen == wanted


def test_a_shadow_whose_rule_is_another_now_begins_anew(resumed: Path) -> None:
    seen = lines(resumed / "shadow" / "recommended.jsonl")
    begun = [line for line in seen if "change" in line]
    assert {(line["step"], *line["change"]["parts"]) for line in begun} == {(SAVED, "shadow")}
    assert seen[-1]["step"] == STEPS


def test_it_goes_on_as_if_it_had_not_stopped(kept: Path, resumed: Path) -> None:
    whole = kept / "whole"
    assert samples(resumed) == samples(whole)
    assert len(samples(whole)) == STEPS
    seen, wanted = lines(resumed / "weights.jsonl"), lines(whole / "weights.jsonl")
    assert [(line["step"], line["effective_step"], line["position"]) for line in seen] == [
        (line["step"], line["effective_step"], line["position"]) for line in wanted
    ]
    assert wanted[-1]["step"] == STEPS
    for line, twin in zip(seen, wanted, strict=True):
        close(line["domain_weights"], twin["domain_weights"], WEIGHT)
        close(line["segment"], twin["segment"], WEIGHT * 8 * STEPS)
        close(line.get("statistics"), twin.get("statistics"), LOSS)
    for line, twin in zip(lines(resumed / "metrics.jsonl"), lines(whole / "metrics.jsonl"), strict=True):
        assert {key: line[key] for key in ("event", "step", "tokens")} == {
            key: twin[key] for key in ("event", "step", "tokens")
        }
        close(line["domain_loss"], twin["domain_loss"], LOSS)
        assert line.get("domain_tokens") == twin.get("domain_tokens")


def test_its_state_is_read_and_written_again(resumed: Path) -> None:
    """The state of 0.1 has no version; today's differs from it by that, the length of the run, steering, and what it
    says of the record."""
    old = resumed / "checkpoints" / f"step_{SAVED}"
    raw = json.loads((old / "state.json").read_text())
    assert "version" not in raw
    state = read_state(old)
    assert (state.step, state.guard, state.optimizer_steps) == (SAVED, GuardState(0, 0), SAVED)
    assert json.loads(json.dumps(state.to_json())) == {"version": VERSION, **raw}
    newest = newest_state(resumed / "checkpoints")
    assert newest is not None
    assert newest.step == STEPS
    written = json.loads((resumed / "checkpoints" / f"step_{STEPS}" / "state.json").read_text())
    assert written["version"] == VERSION
    assert written.keys() == {"version", "total_samples", "steering", "record", "record_ends", *raw}


def test_states_that_cannot_be_read(resumed: Path) -> None:
    raw = json.loads((resumed / "checkpoints" / f"step_{SAVED}" / "state.json").read_text())
    with pytest.raises(
        ResumeRefused, match=rf"run is of version {VERSION + 1}; this megamix reads versions up to"
    ) as told:
        RunState.from_json({**raw, "version": VERSION + 1}, Path("run"))
    assert told.value.exit_code == 3
    del raw["sampler"]
    with pytest.raises(ResumeRefused, match=r"run holds no state of a run \(sampler: Field required"):
        RunState.from_json(raw, Path("run"))
    for broken in ([], None, {**raw, "sampler": {}, "shadow": None}, {**raw, "sampler": {}, "guard": 3}):
        with pytest.raises(ResumeRefused, match="run holds no state of a run"):
            RunState.from_json(broken, Path("run"))


def test_the_state_of_a_rank_without_a_mixer_is_read_again() -> None:
    state = RunState(3, {}, {}, {}, GuardState(), "data")
    assert RunState.from_json(json.loads(json.dumps(state.to_json())), Path("run")) == state


def test_it_can_be_looked_at(kept: Path, resumed: Path, tmp_path: Path) -> None:
    old = resumed / "checkpoints" / f"step_{SAVED}"
    assert f"step        {SAVED}, {8 * SAVED} samples taken" in inspect.inspect_path(old).text()
    assert "code" in inspect.inspect_path(resumed).text()
    drawn = plot_run([resumed], tmp_path / "plots")
    assert drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "</html>" in write_report([resumed], tmp_path / "report.html").read_text()
    exported = export(old, tmp_path / "model")
    assert (exported.out / "model.safetensors").stat().st_size > exported.num_parameters * 4
