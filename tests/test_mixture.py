"""Initial weights: a mixture for the whole run, one from a file, and stages by tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamix.config import validate
from megamix.errors import InputError
from megamix.mixture import WeightSchedule, make_schedule
from megamix.run_config import RunConfig

NAMES = ("web", "code")
NATURAL = np.array([0.8, 0.2])


def schedule(mixture: Any, steps: int = 100) -> WeightSchedule:
    """Of a run with 1000 tokens a step."""
    config = {
        "run_dir": "run",
        "data": {"manifest": "data", "seq_length": 100},
        "model": {"preset": "neox-2m"},
        "mixture": mixture,
        "train": {"steps": steps, "global_batch": 10, "micro_batch": 1, "lr": 1e-3},
    }
    return make_schedule(validate(RunConfig, config, "test"), NAMES, NATURAL)


def test_one_mixture_holds_for_the_whole_run() -> None:
    for mixture, weights in (("natural", [0.8, 0.2]), ("uniform", [0.5, 0.5]), ({"code": 3, "web": 1}, [0.25, 0.75])):
        found = schedule(mixture)
        assert found.at(0).tolist() == found.at(99).tolist() == weights
        assert not any(found.changes_at(step) for step in range(100))


def test_stages_change_at_the_first_step_from_their_tokens_on() -> None:
    found = schedule(
        {
            "stages": [
                {"from_tokens": 0, "weights": "uniform"},
                {"from_tokens": 2000, "weights": {"web": 1, "code": 0}},
                {"from_tokens": 5.5e3, "weights": "natural"},
            ]
        }
    )
    assert found.steps == (0, 2, 6)  # 5500 tokens are not a whole number of steps: the next one
    assert [found.at(step).tolist() for step in (1, 2, 5, 6, 99)] == [
        [0.5, 0.5],
        [1, 0],
        [1, 0],
        [0.8, 0.2],
        [0.8, 0.2],
    ]
    assert [step for step in range(100) if found.changes_at(step)] == [2, 6]


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"code": 0.6, "web": 0.2}))
    assert schedule({"file": str(path)}).at(0) == pytest.approx([0.25, 0.75])
    stages = [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 3000, "weights": {"file": str(path)}}]
    assert schedule({"stages": stages}).at(3) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"the first stage is missing, expected from_tokens: 0"),
        (
            [{"from_tokens": 1000, "weights": "uniform"}],
            r"the first stage starts at 1000 tokens, expected from_tokens: 0",
        ),
        (
            [{"from_tokens": 0, "weights": "uniform"}, {"from_tokens": 0, "weights": "natural"}],
            r"stage 2 starts at 0 tokens and the one before it at 0",
        ),
        (
            [{"from_tokens": number, "weights": "uniform"} for number in (0, 1001, 1999)],
            r"stage 3 starts at 1999 tokens and the one before it at 1001, which is not a step of 1000 tokens earlier",
        ),
        (
            [{"from_tokens": 0, "weights": "uniform"}, {"from_tokens": 1e5, "weights": "natural"}],
            r"stage 2 starts at 100000 tokens, but the run ends after 100000 \(100 steps\)",
        ),
        ([{"from_tokens": 0, "weights": {"web": 1}}], r"mixture\.stages, stage 1: no weight for code"),
        ([{"from_tokens": 0, "weights": {"web": 1, "cod": 1}}], r"no domain 'cod'\. Did you mean 'code'"),
        ([{"from_tokens": 0, "weights": "uni"}], r"mixture\.stages\.0\.weights"),
        ([{"from_tokens": -1, "weights": "uniform"}], r"mixture\.stages\.0\.from_tokens"),
        ([{"until": 0, "weights": "uniform"}], r"unknown key 'mixture\.stages\.0\.until'"),
    ],
)
def test_bad_stages_are_named(stages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedule({"stages": stages})
