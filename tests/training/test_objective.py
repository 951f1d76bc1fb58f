"""The objective of a run: what a config may say, what mixers and resumes make of it, and samples per evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_config import SMALL, small

from megamix.core.config import load_config
from megamix.core.errors import InputError, ResumeRefused
from megamix.mixing.mixers import MIXERS, Mixer, make_mixer
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import resume_from
from megamix.training.checkpoints.state import GuardState, RunState
from megamix.training.config import RunConfig
from megamix.training.mix_plan import planned_mix
from megamix.training.objective import weighted_loss
from megamix.training.plan import Plan, make_plan

Write = Callable[..., Path]
NAMES = ("code", "packages", "tables", "topics")
GIVEN = {"topics": 1, "code": 3, "tables": 0, "packages": 4}
COUNTED = "data.token_counts={a: 6000, b: 2000}"


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [(None, [0.75, 0.25]), ("natural", [0.75, 0.25]), ("uniform", [0.5, 0.5]), ("{b: 3, a: 9}", [0.75, 0.25])],
)
def test_weights_of_the_objective(objective: str | None, wanted: list[float]) -> None:
    mix = planned_mix(small(COUNTED, *([] if objective is None else [f"objective={objective}"])))
    assert mix is not None
    np.testing.assert_allclose(mix.objective_weights, wanted, rtol=1e-15)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("macro", r"objective: got 'macro', expected natural, uniform or \{domain: weight\}"),
        ("[1, 2]", r"objective: got \[1, 2\], expected natural"),
        ("{a: 1}", "objective: no weight for b"),
        ("{a: 1, b: 1, bb: 1}", "objective: there is no domain 'bb'.*Did you mean 'b'"),
        ("{a: -1, b: 2}", "objective: the weight of domain 'a' is -1"),
        ("{a: 0, b: 0}", "objective: the weights of all 2 domains .* are 0"),
        ("{a: much, b: 0}", "objective.*a"),
    ],
)
def test_objectives_that_cannot_be_used(objective: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        planned_mix(small(COUNTED, f"objective={objective}"))


def test_a_domain_of_weight_0_needs_no_loss() -> None:
    assert weighted_loss({"a": 0.25, "b": 0.75, "c": 0.0}, {"a": 4.0, "b": 2.0, "c": None}) == 2.5
    assert weighted_loss({"a": 0.25, "b": 0.75}, {"a": 4.0, "b": None}) is None
    assert weighted_loss({"a": 1.0}, {}) is None


# Samples of an evaluation


def test_batches_are_read_as_samples() -> None:
    assert small().evaluate.samples == 64
    assert small("evaluate.samples=7").evaluate.samples == 7
    assert small("evaluate={every: 3, batches: 5}", "train.micro_batch=4").evaluate.model_dump() == {
        "every": 3,
        "samples": 20,
    }
    reread = RunConfig.model_validate(small("evaluate.batches=5").model_dump())
    assert reread.evaluate.samples == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate={batches: 2, samples: 4}"], "samples is 4 and batches is 2.*Remove batches"),
        (["evaluate.batches=0"], "evaluate.batches is 0, expected a whole number above 0"),
        (["evaluate.batches=true"], "evaluate.batches is True, expected a whole number above 0"),
        (["evaluate.batches=2.5"], "evaluate.batches is 2.5"),
        (["evaluate.samples=0"], "evaluate.samples"),
        (["evaluate.batches=2", "train.micro_batch=many"], "train.micro_batch"),
        (["evaluate.batchs=2"], "evaluate.*batchs"),
    ],
)
def test_samples_that_cannot_be_used(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(*overrides)


# Mixers


@pytest.mark.parametrize("name", list(MIXERS))
def test_mixers_get_the_objective(name: str) -> None:
    names, initial = ["a", "b", "c"], [1, 3, 4]
    mixer = make_mixer({"name": name}, names, initial)
    np.testing.assert_array_equal(mixer.objective, [0.125, 0.375, 0.5])
    mixer = make_mixer({"name": name}, names, initial, {"b": 1, "a": 4, "c": 3})
    np.testing.assert_array_equal(mixer.objective, [0.5, 0.125, 0.375])
    np.testing.assert_array_equal(mixer.weights, [0.125, 0.375, 0.5])
    mixer.objective[0] = 7.0
    np.testing.assert_array_equal(mixer.objective, [0.5, 0.125, 0.375])
    with pytest.raises(InputError, match="objective: 1 weights for 3 domains"):
        make_mixer({"name": name}, names, initial, [1])


# Resume


class Follower(Mixer):
    """Samples by the objective."""

    def _new_weights(self, step: int) -> np.ndarray:
        return self.objective


@pytest.fixture
def plan_of(tiny_config: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    import sys
    from types import ModuleType

    module: Any = ModuleType("followers")
    module.Follower = Follower
    monkeypatch.setitem(sys.modules, "followers", module)

    def plan_of(**sections: Any) -> Plan:
        return make_plan(load_config(RunConfig, tiny_config(**sections)))

    return plan_of


def saved(plan: Plan) -> RunState:
    state = RunState(4, fingerprints(plan), {"blend": plan.blend().state_dict()}, {}, GuardState(), "data")
    return RunState.from_json(json.loads(json.dumps(state.to_json())), Path("run"))


def resume(state: RunState, plan: Plan) -> tuple[str, ...]:
    return resume_from(state, plan, Path("step_4"), fingerprints(plan)).changed


FOLLOWS = {"mixer": {"name": "followers:Follower"}}


def test_a_mixer_that_ignores_the_objective_goes_on_with_another(plan_of: Callable[..., Plan]) -> None:
    assert resume(saved(plan_of()), plan_of(objective="uniform")) == ()


def test_the_objective_is_a_setting_of_a_mixer_that_follows_it(plan_of: Callable[..., Plan]) -> None:
    state = saved(plan_of(**FOLLOWS, objective=GIVEN))
    assert resume(state, plan_of(**FOLLOWS, objective={name: 2 * weight for name, weight in GIVEN.items()})) == ()
    with pytest.raises(ResumeRefused, match=r"another mixer: objective was .*now 'natural'.*accept_changed=\[mixer\]"):
        resume(state, plan_of(**FOLLOWS))
    accepted = plan_of(**FOLLOWS, checkpoint={"accept_changed": ["mixer"]})
    assert resume(state, accepted) == ("mixer",)


def test_runs_from_before_there_was_an_objective_go_on(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(**FOLLOWS)
    state = saved(plan)
    old = {**state.fingerprints, "mixer": {"mixer": state.fingerprints["mixer"]["mixer"]}}
    assert old != state.fingerprints
    assert resume(replace(state, fingerprints=old), plan) == ()


def test_other_domains_bring_their_own_objective(plan_of: Callable[..., Plan]) -> None:
    """A word stays, an objective by name changes with the names, and a word for another is refused."""
    fewer: dict[str, Any] = {"data": {"domains": list(NAMES[:3])}, "checkpoint": {"domains": {"remove": ["topics"]}}}
    assert resume(saved(plan_of(**FOLLOWS)), plan_of(**FOLLOWS, **fewer)) == ("data",)
    given = {name: GIVEN[name] for name in NAMES[:3]}
    assert resume(saved(plan_of(**FOLLOWS, objective=GIVEN)), plan_of(**FOLLOWS, **fewer, objective=given)) == ("data",)
    with pytest.raises(ResumeRefused, match="objective was 'natural', now 'uniform'"):
        resume(saved(plan_of(**FOLLOWS)), plan_of(**FOLLOWS, **fewer, objective="uniform"))
    with pytest.raises(InputError, match="objective: there is no domain 'topics'"):
        plan_of(**FOLLOWS, **fewer, objective=GIVEN)


def test_the_plan_of_data(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(objective=GIVEN)
    np.testing.assert_array_equal(plan.objective_weights, [3 / 8, 4 / 8, 0, 1 / 8])
    np.testing.assert_array_equal(plan_of().objective_weights, plan.natural_weights)
    assert "objective" not in SMALL
