"""A run that is steered while it trains: killed at any moment it does the same again, and so does its replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import SUPPORT
from disturbed import assert_same
from jobs import run_job
from records import lines

from megamix.analysis.replay import replay
from megamix.mixing.steering.journal import read_answers

Write = Callable[..., Path]
STEPS = 12


def config_of(run: Path, like: Path) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**yaml.safe_load(like.read_text()), "run_dir": str(run)}))
    return path


def test_a_killed_run_heeds_its_commands_where_it_had(tiny_config: Write, tmp_path: Path) -> None:
    """Run a: commands for steps to come from the start, and two after a stop at step 5. Run b: killed when a was done
    but for its checkpoints after step 4, so with commands that had their effect since. Run c: never disturbed, told by
    a's answers when the commands came. All the same, bit for bit; a's replay too."""
    a, b, c = (tmp_path / name for name in "abc")
    like = tiny_config(checkpoint={"every": 4, "keep": 9}, log={"every": 3})
    first, *others = (config_of(run, like) for run in (a, b, c))
    runs = [(first, ["train.stop_after=5"]), (first, []), *((config, []) for config in others)]
    run_job(1, runs, script=SUPPORT / "steered_ranks.py")
    answers = read_answers(a)
    assert [answer["outcome"] for answer in answers] == ["noticed", "noticed", "applied", "noticed", *["applied"] * 3]
    assert [answer["step"] for answer in answers if answer["outcome"] == "applied"] == [2, 6, 7, 9]
    assert_same(b, a, STEPS, "b")
    assert_same(c, a, STEPS, "c")

    weights = lines(a / "weights.jsonl")
    names = weights[0]["domain_names"]
    tables, code = names.index("tables"), names.index("code")
    by_step = {line["step"]: line for line in weights}
    assert by_step[2]["domain_weights"][tables] == 0
    assert by_step[2]["left_out"] == ["tables"]
    held = by_step[6]["steering"]["commands"]
    assert held == [{"id": held[0]["id"], "who": held[0]["who"], "note": "while we look", "what": "hold"}]
    assert by_step[8]["domain_weights"] != by_step[7]["domain_weights"], "the ramp goes on while the rule is held"
    assert by_step[9]["domain_weights"][code] == pytest.approx(0.45)
    assert by_step[9]["domain_weights"][tables] == pytest.approx(0.1)
    assert 0 < by_step[12]["domain_weights"][tables] != 0.1, "the rule mixes it again"
    assert by_step[12]["domain_weights"][code] == pytest.approx(0.45)
    events = [line["text"] for line in lines(a / "events.jsonl") if line["event"] == "steered"]
    assert len(events) == 4

    replay(a, [])
    (replayed,) = (a / "replay").glob("*.jsonl")
    assert lines(replayed) == weights
