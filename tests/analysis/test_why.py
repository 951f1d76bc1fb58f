"""``megamix why``: the causes of a change add up to it, and are what the rule makes of other losses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from records import lines
from studied_runs import OWN, STEPS, studied_runs
from typer.testing import CliRunner

from megamix.analysis.causes import find_causes
from megamix.analysis.inspect import inspect_sample
from megamix.analysis.replayable import ReplayableRun
from megamix.analysis.why import why
from megamix.cli import app
from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.mixing import DomainStats, make_mixer
from megamix.mixing.steering.journal import ANSWERS, append_command


@pytest.fixture(scope="module")
def run(data_dir: Path) -> Path:
    return studied_runs(data_dir) / "plain"


def usual_losses(replayable: ReplayableRun) -> np.ndarray:
    """float64 [K]: medians over the steps before the last one; there are fewer than 20."""
    sums = replayable.statistics
    seen = [sums.tokens[:-1, k] > 0 for k in range(sums.tokens.shape[1])]
    return np.array([np.median(sums.nats[:-1, k][at] / sums.tokens[:-1, k][at]) for k, at in enumerate(seen)])


def asked_for(replayable: ReplayableRun, altered: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """float64 [K]: the weights of a new mixer whose last step had ``losses`` where ``altered``."""
    sums = replayable.statistics
    mixer = make_mixer(OWN, sums.domain_names, replayable.drawn_with[0])
    for step in range(STEPS):
        nats = sums.nats[step]
        if step == STEPS - 1:
            nats = np.where(altered, losses * sums.tokens[step], nats)
        mixer.update(DomainStats(nats, sums.tokens[step], weights=replayable.drawn_with[step]), step + 1)
    return mixer.weights


def test_causes_are_what_the_rule_makes_of_other_losses(run: Path) -> None:
    replayable = ReplayableRun.open(run)
    usual = usual_losses(replayable)
    recorded = lines(run / "weights.jsonl")
    last, before = recorded[-1]["domain_weights"], recorded[-2]["domain_weights"]
    everyone = np.ones(len(usual), np.bool_)
    for k in range(len(usual)):
        alone = np.arange(len(usual)) == k
        found = find_causes(replayable, STEPS, k, before[k])
        np.testing.assert_allclose(found.usual_loss.loss, usual, rtol=1e-12)
        assert found.usual == pytest.approx(asked_for(replayable, everyone, usual)[k], abs=1e-12)
        assert found.others == pytest.approx(asked_for(replayable, alone, usual)[k], abs=1e-12)
        assert found.own == pytest.approx(asked_for(replayable, ~everyone, usual)[k], abs=1e-12)
        assert found.allowed == last[k]
        assert found.own != found.others  # the own loss was not the usual one
        by = {
            j: found.own - asked_for(replayable, np.arange(len(usual)) == j, usual)[k]
            for j in range(len(usual))
            if j != k
        }
        assert found.other is not None
        assert found.other[1] == pytest.approx(max(by.values(), key=abs), abs=1e-12)


@pytest.fixture(scope="module")
def strange(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run with a last step in which the loss of one domain is 20, and that domain."""
    folder = tmp_path_factory.mktemp("strange") / "run"
    shutil.copytree(run, folder)
    sums = ReplayableRun.open(folder).statistics
    k, num_domains = int(np.argmax(sums.tokens[-1])), len(sums.domain_names)
    (path,) = (folder / "statistics").glob("from_*.bin")
    header, _, data = path.read_bytes().partition(b"\n")
    rows = np.frombuffer(data, [("nats", "<f8", (num_domains,)), ("tokens", "<i8", (num_domains,))]).copy()
    rows["nats"][-1, k] = 20.0 * rows["tokens"][-1, k]
    path.write_bytes(header + b"\n" + rows.tobytes())
    return folder, sums.domain_names[k]


def test_a_strange_loss_is_named_with_its_samples(strange: tuple[Path, str]) -> None:
    folder, name = strange
    text = why(folder, name, STEPS).text()
    assert "Mostly by its own loss: 20.00 nats per token" in text
    position = int(text.split("--sample ")[1].split()[0])
    assert f"sample {position % 8} of step {STEPS - 1}, counted from 0" in inspect_sample(folder, position).text()
    assert f"domain      {name} " in inspect_sample(folder, position).text()


def test_bounds_are_a_cause(strange: tuple[Path, str]) -> None:
    """The rule asks for less than 0.2 of the other domains; each has 0.2 all the same."""
    folder, name = strange
    replayable = ReplayableRun.open(folder)
    for k, other in enumerate(replayable.statistics.domain_names):
        found = find_causes(replayable, STEPS, k, 0.25)
        if other == name:
            assert found.own > 0.45
            assert found.allowed == pytest.approx(0.4)
        else:
            assert found.own < 0.19
            assert found.allowed == pytest.approx(0.2)


def test_steering_is_a_cause_beside_the_bounds(
    strange: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pin of the last step: the bounds would leave the domain 0.4, the pin takes it to 0.3. Each replay of it
    is silent."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, "megamix")
    folder, name = tmp_path / "run", strange[1]
    shutil.copytree(strange[0], folder)
    pin = append_command(folder, {"pin": {name: 0.3}})
    recorded = lines(folder / "weights.jsonl")
    k, last = recorded[-1]["domain_names"].index(name), recorded[-1]
    answer = {"id": pin.id, "outcome": "applied", "step": STEPS, "effective_step": last["effective_step"]}
    answer |= {"position": last["position"], "text": ""}
    (folder / ANSWERS).write_text(json.dumps(answer) + "\n")
    last["steering"] = {"commands": [{"id": pin.id, "what": pin.describe()}], "pins": {name: 0.3}}
    (folder / "weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    found = find_causes(ReplayableRun.open(folder), STEPS, k, 0.25, is_steered=True)
    assert found.own > 0.45
    assert (found.bounded, found.allowed) == pytest.approx((0.4, 0.3), abs=1e-9)
    text = why(folder, name, STEPS).text()
    assert f"steering ({pin.describe()})" in text
    assert "-0.1000" in text
    assert caplog.messages == []


def test_a_stage_is_no_ones_loss(run: Path) -> None:
    staged = lines(run / "weights.jsonl")[1]
    assert staged["step"] <= 4
    assert "later stage of the run's mixture" in why(run, step=max(staged["step"], 1)).text()


def test_command_without_options_takes_the_largest_change(run: Path) -> None:
    done = CliRunner().invoke(app, ["why", str(run)])
    assert done.exit_code == 0, done.output
    weights = [line["domain_weights"] for line in lines(run / "weights.jsonl")]
    step, k = np.unravel_index(np.argmax(np.abs(np.diff(weights, axis=0))), np.diff(weights, axis=0).shape)
    first = lines(run / "weights.jsonl")[step + 1]
    assert done.output.startswith(f"{first['domain_names'][k]} ")
    assert f"after step {first['step']}, in force from position {first['position']:,}" in done.output
    assert "other large changes" in done.output


def test_what_cannot_be_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such domain.*Did you mean 'tables'"):
        why(run, "table")
    first = lines(run / "weights.jsonl")[1]["step"]
    with pytest.raises(InputError, match=f"no change of weights is on record up to step {first - 1}"):
        why(run, step=first - 1)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "statistics")
    text = why(bare, step=STEPS).text()
    assert f"after step {STEPS}" in text
    assert "cannot be taken apart into causes: " in text
    assert "has no sums of its steps" in text
