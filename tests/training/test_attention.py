"""Attention within documents as a setting of a run: what a resume and reference losses make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamix.core.config import load_config
from megamix.core.errors import InputError, ResumeRefused
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import resume_from
from megamix.training.checkpoints.state import GuardState, RunState
from megamix.training.config import RunConfig
from megamix.training.plan import Plan, make_plan
from megamix.training.reference.cache import cache_key
from megamix.training.reference.run import check_same_data


@pytest.fixture
def plan_of(tiny_config: Callable[..., Path]) -> Callable[..., Plan]:
    def plan_of(checkpoint: dict[str, Any] | None = None, **data: Any) -> Plan:
        return make_plan(load_config(RunConfig, tiny_config(data=data, checkpoint=checkpoint or {})))

    return plan_of


def saved(plan: Plan) -> RunState:
    state = RunState(4, fingerprints(plan), {"blend": plan.blend().state_dict()}, {}, GuardState(), "data")
    return RunState.from_json(json.loads(json.dumps(state.to_json())), Path("run"))


def changed(state: RunState, plan: Plan) -> tuple[str, ...]:
    return resume_from(state, plan, Path("step_4"), fingerprints(plan)).changed


def test_a_run_goes_on_with_the_attention_that_it_had(plan_of: Callable[..., Plan]) -> None:
    """A change must be accepted. Runs of before the key attended to samples; positions restart with documents."""
    sample, document = plan_of(), plan_of(attention="document")
    assert changed(saved(document), plan_of(attention="document", reset_position_ids=True)) == ()
    with pytest.raises(ResumeRefused, match=r"attention was .sample., now .document.*accept_changed=.train."):
        changed(saved(sample), document)
    accepts = plan_of({"accept_changed": ["train"]}, attention="document")
    assert changed(saved(sample), accepts) == ("train",)
    older = saved(sample)
    train = {key: value for key, value in older.fingerprints["train"].items() if key != "attention"}
    older = replace(older, fingerprints={**older.fingerprints, "train": train})
    assert changed(older, sample) == ()
    with pytest.raises(ResumeRefused, match="attention was 'sample', now 'document'"):
        changed(older, document)


def test_reference_losses_are_of_one_attention(plan_of: Callable[..., Plan]) -> None:
    sample, document = plan_of(reset_position_ids=True), plan_of(attention="document")
    assert cache_key(document).reset_position_ids
    with pytest.raises(InputError, match="attention differs"):
        check_same_data(document, sample, "the proxy")
