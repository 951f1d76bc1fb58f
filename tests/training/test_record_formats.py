"""weights.jsonl names things as DataFlex's logs do, and beside it lie logs of exactly their form, which code written
for those reads as they are.

The facts are from DataFlex's documentation of its ODM and DoReMi mixers; the code here has the form of its examples.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import run_job
from matplotlib.figure import Figure

STEPS, WARMUP = 8, 3
COMMON = {"step", "timestamp", "domain_names", "domain_weights", "is_warmup"}
ODM = COMMON | {"exploration_rate", "alpha", "warmup_steps"}
CUMULATIVE = "cumulative_estimated_rewards"
DOREMI = COMMON | {"perdomain_scores", "average_weights"}


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """weights.jsonl of four real runs; the last was stopped, and went on."""
    folder = tmp_path_factory.mktemp("formats")
    config = folder / "config.yaml"
    config.write_text(
        f"""
        data: {{manifest: {data_dir}, seq_length: 32}}
        model: {{architecture: neox, hidden_size: 16, num_layers: 1, num_heads: 2, ffn_size: 32}}
        engine: {{pipeline: 1}}
        train: {{steps: {STEPS}, global_batch: 8, micro_batch: 8, lr: 1.0e-2}}
        evaluate: {{every: 0, batches: 1}}
        checkpoint: {{every: 0}}
        """
    )
    mixers = {
        "moving": f"{{name: odm, preset: official, warmup_steps: {WARMUP}}}",
        "cumulative": f"{{name: odm, preset: exp3, warmup_steps: {WARMUP}}}",
        "doremi": "{name: doremi, apply: sampling, eta: 0.1}",
        "doremi_loss": "{name: doremi, eta: 0.1}",
    }
    jobs = {name: [f"run_dir={folder / name}", f"mixer={mixer}"] for name, mixer in mixers.items()}
    stopped = [*jobs["doremi_loss"], "train.stop_after=5"]
    run_job(1, [(config, overrides) for overrides in (stopped, *jobs.values())])
    return {name: folder / name / "weights.jsonl" for name in mixers}


def history(path: Path) -> list[dict[str, Any]]:
    entries = []
    with open(path) as file:
        for line in file:
            entries.append(json.loads(line))
    return entries


@pytest.mark.parametrize(
    ("run", "keys"),
    [
        ("moving", ODM | {"estimated_rewards"}),
        ("cumulative", ODM | {"cumulative_estimated_rewards"}),
        ("doremi", DOREMI),
    ],
)
def test_every_line_has_the_keys(runs: dict[str, Path], run: str, keys: set[str]) -> None:
    entries = history(runs[run])
    for entry in entries:
        assert keys <= entry.keys()
        datetime.strptime(entry["timestamp"], "%Y-%m-%d %H:%M:%S")
        assert isinstance(entry["is_warmup"], bool)
        assert math.fsum(entry["domain_weights"]) == pytest.approx(1)
        for key in ("domain_weights", "estimated_rewards", "cumulative_estimated_rewards", *(DOREMI - COMMON)):
            assert len(entry.get(key, entry["domain_names"])) == 4, key
    changes = range(WARMUP + 1, STEPS + 1) if run != "doremi" else range(1, STEPS + 1)
    assert [entry["step"] for entry in entries] == [0, *changes]


@pytest.mark.parametrize("run", ["moving", "cumulative"])
def test_an_analysis_of_an_odm_run(runs: dict[str, Path], run: str, tmp_path: Path) -> None:
    """The last weights, their course, and the decay of the exploration rate."""
    entries = history(runs[run])
    learnt = [entry for entry in entries if not entry.get("is_warmup", False)]
    assert [entry["step"] for entry in entries if entry not in learnt] == [0]
    final = learnt[-1]
    last = dict(zip(final["domain_names"], final["domain_weights"], strict=True))
    assert sorted(last) == ["code", "packages", "tables", "topics"]
    assert "code: " in "".join(f"  {name}: {weight:.4f}\n" for name, weight in last.items())

    steps = [entry["step"] for entry in learnt]
    weights = np.array([entry["domain_weights"] for entry in learnt])
    rates = [entry["exploration_rate"] for entry in learnt]
    assert weights.shape == (STEPS - WARMUP, 4)
    assert rates == pytest.approx([min(1 / 4, math.sqrt(math.log(4) / (4 * step))) for step in steps], rel=1e-12)
    assert {(entry["alpha"], entry["warmup_steps"]) for entry in learnt} == {(0.9, WARMUP)}
    figure = Figure()
    weights_axes, rate_axes = figure.subplots(2)
    for column, name in enumerate(final["domain_names"]):
        weights_axes.plot(steps, weights[:, column], label=name, marker="o")
    rate_axes.plot(steps, rates)
    weights_axes.legend()
    figure.savefig(tmp_path / "odm.png")


def test_an_analysis_of_a_doremi_run(runs: dict[str, Path]) -> None:
    """The last weights, and the scores that they follow from; the mean of the weights is DoReMi's result."""
    entries = history(runs["doremi"])
    weights = np.array([entry["domain_weights"] for entry in entries])
    scores = np.array([entry["perdomain_scores"] for entry in entries])
    assert weights.shape == scores.shape == (STEPS + 1, 4)
    raised = weights[:-1] * np.exp(0.1 * scores[1:])
    expected = (1 - 1e-3) * raised / raised.sum(1, keepdims=True) + 1e-3 / 4
    np.testing.assert_allclose(weights[1:], expected, rtol=1e-9)
    np.testing.assert_allclose(entries[-1]["average_weights"], weights[1:].mean(0), rtol=1e-9)


@pytest.mark.parametrize(("run", "rewards"), [("moving", "estimated_rewards"), ("cumulative", CUMULATIVE)])
def test_an_odm_log_has_the_form_of_the_documentation(runs: dict[str, Path], run: str, rewards: str) -> None:
    entries, updates = history(runs[run].with_name("odm_weights.jsonl")), history(runs[run])[1:]
    assert [list(entry) for entry in entries] == [
        ["step", "timestamp", "domain_names", "domain_weights", rewards, "exploration_rate", "alpha", "warmup_steps", "is_warmup"]
    ] * (STEPS - WARMUP)  # fmt: skip
    assert entries == [{key: line[key] for key in entries[0]} for line in updates]
    assert not runs[run].with_name("doremi_weights.jsonl").exists()


@pytest.mark.parametrize("run", ["doremi", "doremi_loss"])
def test_domain_weights_of_a_doremi_log_are_alpha(runs: dict[str, Path], run: str) -> None:
    """Whether alpha acts on the blend or, as in DataFlex, on the loss while the blend stays as it was."""
    entries = history(runs[run].with_name("doremi_weights.jsonl"))
    keys = ["step", "timestamp", "domain_names", "domain_weights", "perdomain_scores"]
    assert [list(entry) for entry in entries] == [keys] * STEPS
    assert [entry["step"] for entry in entries] == [*range(1, STEPS + 1)]
    alpha = np.array(history(runs[run])[0]["domain_weights"])
    for entry in entries:
        alpha = alpha * np.exp(0.1 * np.array(entry["perdomain_scores"]))
        alpha = (1 - 1e-3) * alpha / alpha.sum() + 1e-3 / 4
        np.testing.assert_allclose(entry["domain_weights"], alpha, rtol=1e-9)
    sampled = history(runs[run])[-1]["domain_weights"]
    assert np.allclose(sampled, alpha) == (run == "doremi")
    assert not runs[run].with_name("odm_weights.jsonl").exists()
