"""Alerts: each condition at the point where it begins to hold, once; in a run they are events and start a program."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import run_job
from records import lines

from megamix.core.errors import InputError
from megamix.data.blend.segment import Segment
from megamix.mixing.constraints import Constraints
from megamix.mixing.exchange import MixReport
from megamix.mixing.mixers import DomainStats
from megamix.training.alerts import Alert, Alerts, check_alerts
from megamix.training.config import AlertsConfig

NAMES = ("web", "code")
OFF: dict[str, Any] = {"forgetting": None, "data_wait": None, "again_after": 1}


class Told:
    """Alerts of a run of 1,000 samples in batches of 10, and what they told."""

    def __init__(
        self,
        *,
        before: list[dict[str, Any]] | None = None,
        bounds: dict[str, Any] | None = None,
        first: Any = None,
        **config: Any,
    ):
        self.found: list[tuple[int, str, str | None]] = []
        self.last: Alert | None = None
        given = {
            "names": NAMES,
            "num_samples": np.array([500, 100]),
            "total_samples": 1000,
            "floor": np.zeros(2),
            "cap": np.ones(2),
            "max_epochs": np.full(2, np.inf),
            "on_exhausted": "cap",
            **(bounds or {}),
        }
        self.alerts = Alerts(
            AlertsConfig(**{**OFF, **config}),
            Constraints(**given),
            tell=self.tell,
            evaluations=before or [],
            weights=first,
        )

    def tell(self, alert: Alert, step: int) -> None:
        self.last = alert
        self.found.append((step, alert.kind, alert.domain))

    def weights(self, step: int, web: float, counts: tuple[int, int] = (0, 0)) -> None:
        """After step ``step``, counted from 1; no lag, so that they act in the next."""
        segment = Segment(
            start=step * 10, weights=np.array([web, 1 - web]), deficits=np.zeros(2), counts=np.array(counts)
        )
        stats = DomainStats([1.0, 1.0], [1, 1])
        self.alerts.weights(MixReport(step - 1, stats, step, step * 10, segment, {}, updated=True))


def evaluated(web: float | None, code: float | None) -> dict[str, Any]:
    return {"event": "evaluate", "domain_loss": {"web": web, "code": code}}


def test_forgetting_counts_rises_in_a_row() -> None:
    told = Told(forgetting=2)
    for step, web in enumerate([3.0, 3.1, 3.0, 3.1, 3.2, 3.3, 3.2, 3.3, 3.4], start=1):
        told.alerts.evaluation(step, evaluated(web, 5.0 - step))
    assert told.found == [(5, "forgetting", "web"), (9, "forgetting", "web")]
    assert told.last is not None
    assert told.last.numbers == {"before": 3.2, "after": 3.4, "evaluations": 2}


def test_stalled_is_no_new_best() -> None:
    told = Told(stalled=2)
    for step, web in enumerate([3.0, 3.1, 2.9, 2.9, 2.95, 2.8], start=1):
        told.alerts.evaluation(step, evaluated(web, None))
    assert told.found == [(5, "stalled", "web")]


@pytest.mark.parametrize(("forgetting", "stalled"), [(1, 3), (4, 2)])
def test_a_long_run_is_judged_as_by_all_of_its_losses_and_keeps_few(forgetting: int, stalled: int) -> None:
    told = Told(forgetting=forgetting, stalled=stalled)
    losses = np.random.default_rng(3).integers(0, 40, 400) / 8 + np.linspace(9, 0, 400)
    wanted, before = [], set[str]()
    for step, web in enumerate(losses.tolist(), start=1):
        told.alerts.evaluation(step, evaluated(web, None))
        so_far = losses[:step]
        rises = step > forgetting and bool((np.diff(so_far[-forgetting - 1 :]) > 0).all())
        none_better = step > stalled and so_far[-stalled:].min() >= so_far[:-stalled].min()
        hold = {kind for kind, holds in (("forgetting", rises), ("stalled", none_better)) if holds}
        wanted += [(step, kind, "web") for kind in sorted(hold - before)]
        before = hold
    assert told.found == wanted
    assert len({kind for _, kind, _ in wanted}) == 2
    tracemalloc.start()
    try:
        for step in range(401, 2401):
            told.alerts.evaluation(step, evaluated(step / 7, step / 9))
        assert tracemalloc.get_traced_memory()[0] < 16_000, "two floats of 24 bytes for each would be 96,000"
    finally:
        tracemalloc.stop()


def test_evaluations_before_a_resume_count() -> None:
    told = Told(forgetting=2, before=[evaluated(3.0, 1.0), evaluated(3.1, 1.0)])
    told.alerts.evaluation(30, evaluated(3.2, 1.0))
    assert told.found == [(30, "forgetting", "web")]


def test_the_first_change_of_a_start_can_be_a_jump() -> None:
    told = Told(jump=0.125, first=np.array([0.75, 0.25]))
    told.weights(1, 0.5)
    assert told.found == [(1, "jump", name) for name in NAMES]


def test_a_jump_is_above_the_limit_and_waits_to_come_again() -> None:
    told = Told(jump=0.125, again_after=3)
    for step, web in enumerate([0.5, 0.625, 0.875, 0.875, 0.5, 0.25], start=1):
        told.weights(step, web)
    # 0.125 exactly is no jump; the one of step 5 comes too soon after the alert of step 3.
    assert told.found == [(step, "jump", name) for step in (3, 6) for name in NAMES]


def test_at_bound_counts_steps() -> None:
    told = Told(at_bound=3, bounds={"cap": np.array([0.75, 1.0])})
    for step, web in ((1, 0.75), (3, 0.75), (4, 0.75), (5, 0.5), (6, 0.75), (8, 0.75)):
        told.weights(step, web)
    assert told.found == [(4, "at_bound", "web")]  # code has no bound: a weight of 0 or 1 is none


@pytest.mark.parametrize(
    ("config", "bounds", "found"),
    [
        ({"epochs": 4.0}, {}, [(1, "runs_out", "code")]),  # 0.5 * 990 / 100 epochs
        ({"epochs": 5.0}, {}, []),
        ({}, {"max_epochs": np.array([np.inf, 4.0]), "on_exhausted": "repeat"}, [(1, "runs_out", "code")]),
        ({}, {"max_epochs": np.array([np.inf, 4.0]), "on_exhausted": "cap"}, []),
        ({}, {"max_epochs": np.array([np.inf, 5.0]), "on_exhausted": "stop"}, []),
    ],
)
def test_runs_out_at_the_present_weights(config: dict[str, Any], bounds: dict[str, Any], found: list[Any]) -> None:
    told = Told(bounds=bounds, **config)
    told.weights(1, 0.5)
    assert told.found == found


def test_intervals() -> None:
    told = Told(data_wait=0.5, slowdown=0.25)
    for step, (speed, waited) in enumerate(
        [(100, 0.5), (100, 0.6), (100, 0.6), (100, 0.1), (100, 0.1), (74, 0), (75, 0)], 1
    ):
        told.alerts.interval(step, {"tokens_per_second": speed, "step_seconds": 1.0, "data_wait_seconds": waited})
    assert told.found == [(2, "data_wait", None), (6, "slowdown", None)]


def test_a_command_that_fails_is_said(logged: list[str]) -> None:
    told = Told(jump=0.1, first=np.array([0.5, 0.5]), run=(sys.executable, "-c", "raise SystemExit(3)"))
    told.weights(1, 0.9)
    for command in told.alerts._commands:
        command.wait()
    told.alerts.interval(2, {"tokens_per_second": 1, "step_seconds": 1.0, "data_wait_seconds": 0})
    assert [line for line in logged if line.startswith("alerts.run")] == 2 * [
        f"alerts.run: {sys.executable} ended with 3"
    ]


def test_a_run_tells_and_starts_the_program(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    code = f"import sys; open({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.readline())"
    config = tiny_config(
        alerts={"jump": 1e-6, "run": [sys.executable, "-c", code], "again_after": 1000},
        train={"steps": 6},
        evaluate={"every": 0},
        checkpoint={"every": 0},
    )
    run_job(1, [(config, [])])
    events = [line for line in lines(tmp_path / "run" / "events.jsonl") if line["event"] == "alert"]
    assert events
    assert {event["alert"] for event in events} == {"jump"}
    weights = {line["step"]: line for line in lines(tmp_path / "run" / "weights.jsonl")}
    for event in events:
        k = weights[event["step"]]["domain_names"].index(event["domain"])
        assert event["after"] == weights[event["step"]]["domain_weights"][k]
    # The first change counts, from the mixture that the run starts with.
    first = min(events, key=lambda event: event["step"])
    assert first["before"] == weights[0]["domain_weights"][weights[0]["domain_names"].index(first["domain"])]
    end = time.monotonic() + 60
    told: list[dict[str, Any]] = []
    while len(told) < len(events) and time.monotonic() < end:
        time.sleep(0.05)
        text = (tmp_path / "told").read_text() if (tmp_path / "told").exists() else ""
        told = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    assert sorted(line["text"] for line in told) == sorted(event["text"] for event in events)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"alerts.run: there is no program 'nosuchprogram'"):
        check_alerts(AlertsConfig(run=("nosuchprogram", "x")))
    with pytest.raises(InputError, match=r"alerts.run: .* has a zero byte"):
        check_alerts(AlertsConfig(run=("true", "a\0b")))


def test_a_program_in_the_home_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tell").write_text("#!/bin/sh\n")
    (tmp_path / "tell").chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_alerts(AlertsConfig(run=("~/tell",)))
    check_alerts(AlertsConfig(run=("$HOME/tell",)))
    with pytest.raises(InputError, match=r"\$NOWHERE_SET, which is not set"):
        check_alerts(AlertsConfig(run=("$NOWHERE_SET/tell",)))
