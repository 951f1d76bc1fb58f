"""An engine skips a step whose loss or gradient is not finite, without a trace, in every layout of two ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import SUPPORT
from guard_steps import BAD_GRADIENT, BAD_LOSS, BAD_REFERENCE, GOOD, LAYOUTS, SEQ_LENGTH, STEPS
from ranks import run_ranks

pytest.importorskip("megatron.core")

SCRIPT = SUPPORT / "guard_steps.py"


def steps_of(*kinds: str) -> list[str]:
    """The numbers of the steps of these kinds, as JSON has them."""
    return [str(step) for step, kind in enumerate(STEPS) if kind in kinds]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Results of each rank, by layout."""
    folder = tmp_path_factory.mktemp("guard")
    run_ranks(SCRIPT, 2, folder, cwd=folder)
    return {name: [json.loads((folder / f"{name}_{rank}.json").read_text()) for rank in range(2)] for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_left_out_is_as_if_never_asked_for(trained: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Weights, moments and Adam's count equal, bit for bit, those of an engine that saw the good steps only."""
    for rank in trained[name]:
        assert rank["trained"], "the good steps change weights"
        assert rank["differing"] == []
        assert rank["optimizer_steps"] == [len(steps_of(GOOD))] * 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_agree_on_what_is_finite(trained: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Though the bad samples are one rank's, and the loss the last stage's."""
    for rank in trained[name]:
        said = rank["skipping"]["finite"]
        assert {step for step, is_finite in said.items() if is_finite} == set(steps_of(GOOD))
        assert all(rank["plain"]["finite"].values())
        norms = rank["skipping"]["norms"]
        assert {norms[step] for step in steps_of(BAD_LOSS, BAD_GRADIENT)} == {None}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_an_engine_tells_without_being_asked_to_look(trained: dict[str, list[dict[str, Any]]], name: str) -> None:
    for rank in trained[name]:
        assert rank["told"] == dict.fromkeys(steps_of(BAD_GRADIENT), not LAYOUTS[name].tells)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bad_tokens_are_counted_by_sample(trained: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Only the sample with the bad token has any, at least all from that token on, and that with the bad reference one;
    as many as the sums exclude."""
    for step in map(str, range(len(STEPS))):
        found = [rank["skipping"] for rank in trained[name]]
        given = [part["counts"][step] for part in found if part["counts"][step] is not None]
        flat = [count for counts in given for micro_batch in counts for count in micro_batch]
        assert len(flat) == 8, "each sample of the step is counted by one rank"
        bad = [count for count in flat if count]
        assert sum(flat) == sum(sum(part["bad"][step]) for part in found)
        if step in steps_of(BAD_LOSS, BAD_REFERENCE):
            assert bad == [given[-1][-1][0]]
            assert bad == [1] if step in steps_of(BAD_REFERENCE) else bad[0] >= SEQ_LENGTH // 2
        else:
            assert not bad
