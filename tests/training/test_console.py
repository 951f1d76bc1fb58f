"""The run on the console: what it is, a line that renews itself on a terminal and log lines elsewhere, and the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megamix.core.config import load_config
from megamix.core.log import get_logger
from megamix.training.config import RunConfig
from megamix.training.console import PEAK_BF16, Console
from megamix.training.plan import make_plan

LINE = {"loss": 2.34567, "lr": 3e-4, "tokens_per_second": 12345.6, "step_seconds": 1.5, "memory_bytes": 3 * 2**29}
TEXT = "loss 2.3457, lr 3.00e-04, 12,346 tokens/s, 1.50 s/step, 1.50 GiB"


@pytest.fixture
def console(tiny_config: Callable[..., Path]) -> Console:
    plan = make_plan(load_config(RunConfig, tiny_config(train={"steps": 100})))
    return Console(plan, torch.device("cpu"), np.array([0.25, 0.25, 0.25, 0.25]))


@pytest.fixture
def said(
    console: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level(logging.INFO, "megamix")
    return caplog


def report(*weights: float) -> Any:
    return SimpleNamespace(segment=SimpleNamespace(weights=np.array(weights)))


def test_on_a_terminal_each_line_and_each_log_line_takes_the_place_of_the_one_before(
    console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = get_logger("megamix.test_console")  # its handler writes to the captured standard error
    console.progress({**LINE, "step": 50})
    logger.warning("saved")
    console.progress({**LINE, "step": 100})
    logger.warning("done")
    clear = "\r\x1b[K"
    halfway, saved, last = capsys.readouterr().err.split(clear)[1:]
    assert halfway == f"[{'#' * 12}{'-' * 12}] step 50/100: {TEXT}, 0:01:15 left"
    assert saved.endswith("saved\n")
    last, done = last.splitlines()
    assert last == f"[{'#' * 24}] step 100/100: {TEXT}, 0:00:00 left"
    assert done.endswith("done")


def test_elsewhere_it_is_logged_with_the_weights_that_moved(
    console: Console, said: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    names = console._plan.domain_names
    console.evaluation(0, {"objective_loss": 6.5, "macro_loss": 6.6, "worst_domain": names[0]})
    console.weights(report(0.3, 0.2, 0.252, 0.248))
    console.weights(report(0.352, 0.15, 0.25, 0.248))
    console.progress({**LINE, "step": 10, "flop_utilisation": 0.415})
    console.weights(report(0.351, 0.151, 0.25, 0.248))
    console.progress({**LINE, "step": 20})
    first, second = said.messages[-2:]
    named = TEXT.replace(", lr", ", objective 6.5000, lr")
    assert first == (
        f"step 10/100: {named}, 41.5% of peak, 0:02:15 left; weights: {names[0]} 0.250 -> 0.352, {names[1]} 0.250 -> 0.150"
    )
    assert second == f"step 20/100: {named}, 0:02:00 left"
    assert "\x1b" not in capsys.readouterr().err


def test_begin_and_end(console: Console, said: pytest.LogCaptureFixture) -> None:
    console.begin(0)
    text = "\n".join(said.messages)
    model = console._plan.model
    for part in (
        f"model     neox, 2 layers of 32: {model.num_parameters():,} parameters",
        "data      4 domains, ",
        "steps of 8 x 64 = 512 tokens, 51,200 in all",
        "mixture   natural: ",
        "rule      odm, preset official, warmup_steps 3, update_every 1",
        "objective natural",
        "schedule  cosine, up to 0.003 in 10 steps, down to 0.0003 at step 100",
        "layout    deepspeed, one rank a copy, 1 rank, fp32",
    ):
        assert part in text
    for step, loss, came in ((0, 6.5, "6.5000 at step 0;"), (100, 4.25, "6.5000 at step 0, 4.2500 at step 100;")):
        console.evaluation(step, {"objective_loss": loss, "macro_loss": loss, "worst_domain": "code"})
        console.end(40)
        assert f"objective loss {came} weights now" in said.messages[-3]
    assert said.messages[-2] == "stopped at step 40 of 100; the same command goes on"
    assert f"megamix report {console._plan.config.run_dir}" in said.messages[-1]


def test_utilisation_is_of_the_peak_of_all_ranks(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.machine(1e5)["flop_utilisation"] is None  # no device whose peak is known
    assert console.machine(1e5)["memory_bytes"] > 2**20  # type: ignore[operator]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    console._device = torch.device("cuda")
    assert console.machine(1e5) == {"memory_bytes": 7, "flop_utilisation": None}  # fp32
    plan = console._plan
    engine = plan.config.engine.model_copy(update={"precision": "bf16"})
    object.__setattr__(plan, "config", plan.config.model_copy(update={"engine": engine}))
    object.__setattr__(plan, "world_size", 4)
    # Parameters of the layers (with biases and norms), S H of causal attention, and the output; H = 32, S = 64.
    operations = 6 * (2 * (4 * 32**2 + 4 * 32 + 2 * 32 * 64 + 64 + 32 + 4 * 32 + 64 * 32) + 32 * plan.model.vocabulary)
    found = console.machine(1e12)["flop_utilisation"]
    assert found == pytest.approx(operations * 1e12 / (4 * PEAK_BF16["H100"]), rel=1e-12)
