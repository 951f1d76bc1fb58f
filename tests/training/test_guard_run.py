"""Runs in which a loss really goes wrong: where they end, what they say, what they leave out, and how they go on."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from jobs import run_job
from poisoned import VOCAB, Read, plant, poisoned_model, read_by, with_any
from records import lines, record, samples

from megamix.analysis.inspect import inspect_sample
from megamix.core.config_files import merge
from megamix.training.config import KINDS
from megamix.training.guard import RECORD

Run = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]
BATCH, STEPS = 8, 8
DOMAINS = ["code", "packages", "tables", "topics"]
FIXED: dict[str, Any] = {
    "mixer": {"name": "static"},
    "mixture": "uniform",
    "train": {"steps": STEPS, "lr": 1e-3},
    "evaluate": {"every": 0, "batches": 1},
    "checkpoint": {"every": 1, "keep": 99},
}
ENGINES: dict[str, dict[str, Any]] = {
    "deepspeed": {"name": "deepspeed", "pipeline": 2},
    "megatron": {"name": "megatron", "pipeline": 2},
    # Has no look at the gradient of its own: the sums alone tell, some steps later.
    "unaware": {"name": "deepspeed", "zero": 0},
}
# The update alone is nearly the largest number of fp32, and decay makes the sum larger.
RUINOUS = {"steps": 1, "lr": 3.4e38, "warmup": 0.0, "beta1": 0.0, "weight_decay": 1.0}


def poisoned(tmp_path: Path, tokens: Iterable[int]) -> dict[str, Any]:
    """The sections of a run on the data that `plant` has written, with a model that these tokens make NaN of."""
    return {"data": {"manifest": str(tmp_path / "data")}, "model": poisoned_model(tmp_path / "model", tokens)}


def half_of(read: Read) -> int:
    """Which half of its step it is in: which of two data-parallel ranks reads it."""
    return read.position % BATCH // (BATCH // 2)


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def bad_steps(run: Path) -> dict[int, list[tuple[int, str, int]]]:
    """Step -> position, domain and number of the samples on record; steps count from 1."""
    found = lines(run / RECORD)
    for line in found:
        assert sum(line["tokens"].values()) == sum(bad["tokens"] for bad in line["samples"])
    return {
        line["step"]: [(bad["position"], bad["domain"], bad["sample"]) for bad in line["samples"]] for line in found
    }


def expected(steps: list[list[Read]]) -> dict[int, list[tuple[int, str, int]]]:
    """The same, of the samples that have a token."""
    return {
        step: [(read.position, read.domain, read.sample) for read in found]
        for step, found in enumerate(steps, start=1)
        if found
    }


@pytest.mark.parametrize(("engine", "at"), [("deepspeed", 5), ("megatron", 5), ("unaware", 0), ("unaware", STEPS - 1)])
def test_stop_names_the_samples_and_leaves_no_checkpoint_after(
    megamix: Run, tiny_config: Write, data_dir: Path, tmp_path: Path, engine: str, at: int
) -> None:
    """One token in one sample, of step ``at`` (counted from 0); every step is saved. Then the same run leaves the step
    out, and finishes."""
    sections = {**FIXED, "engine": ENGINES[engine]}
    bad = read_by(tiny_config(**sections))[at][2]
    tokens = plant(data_dir, tmp_path / "data", [[bad]])
    config = tiny_config(**sections, **poisoned(tmp_path, tokens))
    said = megamix("train", config, code=1).stderr
    assert f"step {at + 1}: the loss is not finite in '{bad.domain}' (" in said
    assert f"at position {bad.position} (sample {bad.sample} of '{bad.domain}'," in said
    assert said.count("is not finite") == 1
    run = tmp_path / "run"
    assert saved(run) == list(range(1, at + 1))
    assert bad_steps(run) == {at + 1: [(bad.position, bad.domain, bad.sample)]}
    command = re.search(r"`megamix inspect (\S+) --sample (\d+)`", said)
    assert command is not None
    shown = inspect_sample(Path(command[1]), int(command[2])).text()
    assert f"domain      {bad.domain} " in shown
    assert f"sample      {bad.sample} of " in shown
    said = megamix("train", config, "guard.non_finite=skip").stderr
    assert f"step {at + 1} left out, 1 in a row: the loss is not finite in '{bad.domain}'" in said
    assert saved(run) == list(range(1, STEPS + 1))
    assert [(line["step"], line["policy"]) for line in lines(run / RECORD)] == [(at + 1, "stop"), (at + 1, "skip")]


def test_weights_ruined_by_the_last_step_are_not_saved(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """Its loss and its gradient are finite; the learning rate is not of this world. No loss is left that would tell."""
    sections = {**FIXED, "engine": {"zero": 0}, "train": RUINOUS}
    said = megamix("train", tiny_config(**sections), code=1).stderr
    assert "are not finite" in said
    assert not saved(tmp_path / "run")


@pytest.mark.parametrize("engine", [{"name": "deepspeed", "data": 2}, {"name": "megatron", "pipeline": 2}])
def test_skip_leaves_out_these_steps_and_resumes_as_if_never_stopped(
    tiny_config: Write, data_dir: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """The first step and the last, and two in a row before a checkpoint: one of them in samples of several domains,
    another in one of the two ranks' samples only."""
    sections = {
        **FIXED,
        "engine": engine,
        "guard": {"non_finite": "skip"},
        "checkpoint": {"every": 5},
        "log": {"every": 3},
    }
    steps = read_by(tiny_config(**sections))
    one_rank = [read for read in steps[3] if half_of(read) == 0][:2]
    several = [next(read for read in steps[4] if read.domain == domain) for domain in ("code", "packages")]
    tokens = plant(
        data_dir, tmp_path / "data", [[steps[0][1]], one_rank, *([read] for read in several), [steps[-1][0]]]
    )
    sections |= poisoned(tmp_path, tokens)
    steps = read_by(tiny_config(**sections))
    runs = []
    for name in ("whole", "halves"):
        config = tiny_config(run_dir=str(tmp_path / name), **sections)
        runs.append(config.rename(tmp_path / f"{name}.yaml"))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_job(2, [(runs[0], []), (runs[1], ["train.stop_after=5"]), (runs[1], [])])
    wanted = expected(with_any(steps, tokens))
    assert list(wanted) == [1, 4, 5, STEPS]
    assert len({domain for _, domain, _ in wanted[5]}) > 1
    assert len({half_of(read) for read in with_any(steps, tokens)[3]}) == 1
    for run in (whole, halves):
        assert bad_steps(run) == wanted
        assert samples(run) == {
            step: [(DOMAINS.index(read.domain), read.sample) for read in reads]
            for step, reads in enumerate(steps, start=1)
        }
        assert state(run, STEPS)["guard"] == {"skips": 4, "in_a_row": 1}
    assert state(halves, 5)["guard"] == {"skips": 3, "in_a_row": 2}
    assert record(halves) == record(whole)
    assert layers(halves) == layers(whole)


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step_{step}" / "state.json").read_text())


def layers(run: Path) -> dict[str, bytes]:
    """The weights and moments after the last step."""
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step_{STEPS}" / "layers").iterdir()}


def test_a_mixer_goes_on_over_steps_left_out(tiny_config: Write, data_dir: Path, tmp_path: Path) -> None:
    """Its weights follow from the finite tokens; stopped between two steps that are left out, it goes on the same."""
    sections = {
        **FIXED,
        "mixer": {"name": "odm", "preset": "paper", "warmup_steps": 1},
        "guard": {"non_finite": "skip"},
    }
    sections |= {"checkpoint": {"every": 4}, "engine": {"pipeline": 2}}
    steps = read_by(tiny_config(**sections))
    # Early samples of one domain: they come soon whatever the mixer makes of it.
    bad = [next(read for read in steps[at] if read.domain == "code") for at in (1, 3, 4, 6)]
    sections |= poisoned(tmp_path, plant(data_dir, tmp_path / "data", [bad]))
    runs = []
    for name in ("whole", "halves"):
        runs.append(tiny_config(run_dir=str(tmp_path / name), **sections).rename(tmp_path / f"{name}.yaml"))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_job(2, [(runs[0], []), (runs[1], ["train.stop_after=4"]), (runs[1], [])])
    skipped = set(bad_steps(whole))
    assert 0 < len(skipped) < STEPS
    assert state(whole, STEPS)["guard"]["skips"] == len(skipped)
    assert record(halves) == record(whole)
    assert layers(halves) == layers(whole)
    assert bad_steps(halves) == bad_steps(whole)


@pytest.mark.parametrize("all_tokens", [False, True], ids=["one token", "every token"])
def test_too_many_steps_left_out_in_a_row_end_the_run(
    megamix: Run, tiny_config: Write, data_dir: Path, tmp_path: Path, all_tokens: bool
) -> None:
    """One domain, bad in every step; the third step is the last, and the run's first checkpoint would have been after
    it. Where no loss at all is finite, there is none to be logged."""
    sections = {**FIXED, "data": {"domains": ["code"]}, "guard": {"non_finite": "skip", "max_skips": 3}}
    sections |= {"checkpoint": {"every": 3}, "log": {"every": 1}}
    planted = plant(data_dir, tmp_path / "data", [[step[0] for step in read_by(tiny_config(**sections))]])
    sections = merge(sections, poisoned(tmp_path, range(VOCAB) if all_tokens else planted), KINDS)
    said = megamix("train", tiny_config(**sections), code=1).stderr
    assert "step 3: the loss is not finite in 'code'" in said
    assert ("which is all of the step: the weights are at fault" in said) == all_tokens
    assert "the last of 3 steps in a row that were left out (guard.max_skips 3)" in said
    assert "Logging error" not in said
    run = tmp_path / "run"
    assert list(bad_steps(run)) == [1, 2, 3]
    assert not saved(run)
    assert [line["step"] for line in record(run)[0] if line["event"] == "train"] == ([] if all_tokens else [1, 2])


def test_a_loss_that_explodes_ends_the_run(megamix: Run, tiny_config: Write, tmp_path: Path) -> None:
    """By a learning rate that is far too large; the checkpoint that is named lies before the step."""
    config = tiny_config(
        **FIXED
        | {
            "train": {"steps": STEPS, "lr": 0.5, "warmup": 0.5},
            "guard": {"explosion": 1.5},
            "checkpoint": {"every": 1, "keep": 99, "asynchronous": False},
        }
    )
    said = megamix("train", config, code=1).stderr
    found = re.search(r"step (\d+): the mean loss is ([\d.]+) with a learning rate of ([\d.]+), above ([\d.]+) ", said)
    assert found is not None, said
    step, loss, limit = int(found[1]), float(found[2]), float(found[4])
    assert loss > limit == pytest.approx(1.5 * 6.238, abs=1e-2)
    run = tmp_path / "run"
    assert max(saved(run)) == step - 1
    assert f"checkpoint.resume={run}/checkpoints/step_{step - 1}" in said
    written = [line for line in record(run)[0] if line["event"] == "train"]
    assert [line["step"] for line in written] == list(range(1, step))
    assert max(line["loss"] for line in written) <= limit
