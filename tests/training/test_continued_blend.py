"""Blend and mixer that a resume goes on with where the run is made longer, or the mixture leaves domains out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import job
from recorded_runs import BATCH, SEQ, write_data
from records import lines

from megamix.core.config import validate
from megamix.core.errors import InputError, ResumeRefused
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import Resumed, resume_from
from megamix.training.checkpoints.state import GuardState, RunState
from megamix.training.config import RunConfig
from megamix.training.data_loop import MixedData
from megamix.training.plan import Plan, make_plan
from megamix.training.records.ledger import Ledger
from megamix.training.records.run_record import RunRecord
from megamix_kernels import DomainSums

NAMES = ("web", "c_$1$", "_books")
SAMPLES = np.array([187, 62, 31])  # of 3000, 1000 and 500 tokens, 16 a sample


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded") / "data"
    write_data(folder)
    return folder / "manifest.json"


def plan_of(manifest: Path, steps: int, **sections: Any) -> Plan:
    data = {"manifest": str(manifest), "seq_length": SEQ, **sections.pop("data", {})}
    train = {"steps": steps, "global_batch": BATCH, "micro_batch": 4, "lr": 1e-3, "seed": 7}
    model = {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16}
    checkpoint = {"accept_changed": ["train", "mixture", "constraints"]}
    content = {"run_dir": "run", "data": data, "model": model, "train": train, "checkpoint": checkpoint, **sections}
    return make_plan(validate(RunConfig, {"mixture": "uniform", "mixer": {"name": "odm"}, **content}, "test"))


def saved(plan: Plan, step: int, asked: dict[int, list[float]] | None = None, **changed: Any) -> RunState:
    """The state after ``step`` steps in which a mixer asked for weights from some steps on."""
    blend, policy = plan.blend(), plan.policy
    blend.take(step * BATCH)
    for at, weights in (asked or {}).items():
        position = at * BATCH
        blend.set_weights(policy.allowed(np.array(weights), blend.counts_at(position), position), at=position)
    mixer = make_mixer(plan.config.mixer, plan.domain_names, blend.weights, left_out=plan.policy.left_out).state_dict()
    parts = {
        "step": step,
        "fingerprints": fingerprints(plan),
        "sampler": {"blend": blend.state_dict()},
        "shadow": {},
        "guard": GuardState(),
        "manifest": str(plan.config.data.manifest),
        "mixer": {**mixer, "num_updates": 0 if asked is None else len(asked)},
        "total_samples": plan.total_samples,
    }
    return RunState(**{**parts, **changed})


def resumed(state: RunState, plan: Plan) -> Resumed:
    return resume_from(state, plan, Path("run/checkpoints/step_N"), fingerprints(plan))


COURSE = {
    "free": None,
    "left_out": [],
    "pins": {},
    "bounds": {"web": [0.1, 0.4]},
    "held": False,
    "mixer": None,
    "ramp": None,
}


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("fingerprints.data", {}, r"fingerprints.data.domains"),
        ("fingerprints.data.domains", {"web": 3}, r"fingerprints.data.domains.web"),
        ("fingerprints.data.domains", [], r"fingerprints.data.domains"),
        ("fingerprints.mixer.mixer", ["odm"], r"fingerprints.mixer.mixer"),
        ("fingerprints.train.steps", "many", r"fingerprints.train.steps"),
        ("fingerprints.batch", {"sizes": [[0, "x"]]}, r"fingerprints.batch.sizes.0.1"),
        ("fingerprints.batch", {"sizes": [[0, 8], [0, 4]]}, r"its batches begin at the steps \[0, 0\]"),
        ("sampler", {}, r"sampler.blend"),
        ("sampler.blend.counts", [1, 2], r"counts has 2 numbers for 3 domains"),
        ("sampler.blend.position", -1, r"sampler.blend.position"),
        ("sampler.blend.seed", None, r"sampler.blend.seed"),
        ("sampler.blend.segments", [], r"sampler.blend.segments"),
        ("sampler.blend.segments.0.start", 10**6, r"its segments start at \[1000000\]"),
        ("sampler.blend.segments.0.weights", [1e308, 1e308, 0.0], r"its weights sum to inf"),
        ("mixer", {"mixer": "odm"}, r"mixer.domains"),
        ("mixer.domains", ["web"], r"mixer.domains are not those of the data"),
        ("mixer.num_updates", None, r"mixer.num_updates"),
        ("mixer.rule_of_mixed", 3, r"mixer, the rule"),
        ("shadow", {"odm": {"config": None, "mixer": {}, "sampler": {}}}, r"shadow.odm.sampler.blend"),
        ("steering", {"handled": 3}, r"steering.handled"),
        ("steering.course", {**COURSE, "rule_changes": 0, "pins": {"law": 0.5}}, r"steering names 'law'"),
        ("steering.course", {**COURSE, "rule_changes": 0, "free": [1.0]}, r"the weights has 1 numbers for 3"),
        ("steering.course", COURSE, r"steering.course.rule_changes"),
        ("interval", {"domains": {"web": [0.0]}}, r"interval.domains.web"),
    ],
)  # fmt: skip
def test_a_state_whose_parts_are_of_other_types(manifest: Path, path: str, value: Any, problem: str) -> None:
    plan = plan_of(manifest, 12)
    steering = {"handled": [], "course": {**COURSE, "rule_changes": 0}, "past": [], "stirred": False}
    state = saved(plan, 4, steering=steering, interval={"domains": {"web": [0.0, 0]}})
    data = json.loads(json.dumps(state.to_json()))
    assert resumed(RunState.from_json(data, Path("there")), plan).step == 4
    *parents, last = path.split(".")
    owner: Any = data
    for key in parents:
        owner = owner[int(key) if isinstance(owner, list) else key]
    owner[last] = value
    with pytest.raises(ResumeRefused, match=rf"step_N holds no state of a run \(.*{problem}"):
        resumed(RunState.from_json(data, Path("there")), plan)


@pytest.mark.parametrize("name", ["odm", "recommended", "ado"])
@pytest.mark.parametrize("value", [None, 3, [0.5], {"web": 1}, "x"])
def test_a_mixer_whose_own_state_is_of_other_types(name: str, value: Any) -> None:
    """With the same domains and with others."""
    mixer = make_mixer({"name": name}, NAMES, [0.5, 0.3, 0.2])
    state = mixer.state_dict()
    for key in state.keys() - {"mixer", "domains", "pending"}:
        for load in (mixer.load_state_dict, lambda state: mixer.adopt_state(state, [2, None, 0], np.full(3, 1 / 3))):
            with suppress(InputError):
                load({**state, key: value})


def test_weights_past_the_last_sample_are_bounded_and_a_longer_run_reads_no_more_than_it_may(manifest: Path) -> None:
    data = {"max_weight": {"web": 0.05}, "max_epochs": {"c_$1$": 0.5}}
    short, long = plan_of(manifest, 12, data=data), plan_of(manifest, 30, data=data)
    state = saved(short, 12, {12: [0.2, 0.6, 0.2], 13: [0.2, 0.6, 0.2]})
    for _, weights in Blend.from_state_dict(state.sampler["blend"]).ledger:
        assert weights[0] <= 0.05 + 1e-12
        assert weights[1] <= 31 / (12 * BATCH) + 1e-12
    blend, change = resumed(state, long).blend(long)
    assert change is not None
    assert change["parts"] == ["length"]
    assert change["length"] == {"before": 12 * BATCH, "now": 30 * BATCH}
    before = Blend.from_state_dict(state.sampler["blend"]).counts
    left = (31 - before[1]) / (18 * BATCH)
    assert blend.weights == pytest.approx([0.05, left, 0.95 - left])
    blend.take(18 * BATCH)
    assert blend.counts[0] <= 0.05 * 30 * BATCH + 1
    assert blend.counts[1] <= 31 + 1


def test_weights_of_a_checkpoint_from_before_they_were_bounded_there(manifest: Path) -> None:
    """Bounds that do not depend on the length change nothing, unless the weights in the checkpoint break them."""
    data = {"max_weight": {"web": 0.1}}
    short, long = plan_of(manifest, 12, data=data), plan_of(manifest, 30, data=data)
    kept = saved(short, 12, {12: [0.2, 0.6, 0.2]})
    blend, change = resumed(kept, long).blend(long)
    assert change is None
    assert blend.state_dict() == kept.sampler["blend"]
    unbounded = plan_of(manifest, 12).blend()
    unbounded.take(12 * BATCH)
    # As megamix 0.1 had it: no length in the state, but the steps in the fingerprints.
    old = saved(short, 12, sampler={"blend": unbounded.state_dict()}, total_samples=None)
    blend, change = resumed(old, long).blend(long)
    assert change is not None
    assert blend.weights == pytest.approx([0.1, 0.45, 0.45])


def test_a_run_of_the_same_length_goes_on_bit_for_bit(manifest: Path) -> None:
    plan = plan_of(manifest, 12, data={"max_weight": {"web": 0.4}, "max_epochs": 1})
    state = saved(plan, 5, {5: [0.6, 0.3, 0.1], 6: [0.9, 0.05, 0.05]})
    blend, change = resumed(state, plan).blend(plan)
    assert change is None
    assert blend.state_dict() == state.sampler["blend"]


def test_announced_weights_are_bounded_where_they_begin(manifest: Path) -> None:
    data = {"max_epochs": {"_books": 1}, "weight_lag": 3}
    short, long = plan_of(manifest, 20, data=data), plan_of(manifest, 40, data=data)
    state = saved(short, 10, {10: [0.4, 0.4, 0.2], 13: [0.1, 0.1, 0.8]})
    blend, _ = resumed(state, long).blend(long)
    assert [at for at, _ in blend.ledger] == [10 * BATCH, 13 * BATCH]
    at = 13 * BATCH
    cap = (31 - blend.counts_at(at)[2]) / (40 * BATCH - at)
    assert blend.segment_at(at).weights[2] == pytest.approx(cap)


def test_what_is_left_of_a_longer_run_must_fit_its_bounds(manifest: Path) -> None:
    """The whole run would fit, but the small domains have given all they may by the time it is made longer."""
    data = {"max_weight": {"web": 0.6}, "max_epochs": {"c_$1$": 0.5, "_books": 1}}
    short, long = plan_of(manifest, 15, data=data), plan_of(manifest, 18, data=data)
    state = saved(short, 15, {15: [0.1, 0.5, 0.4]})
    with pytest.raises(InputError, match=r"goes on for 24 samples after 120.*max_epochs and data\.max_weight allow 14"):
        resumed(state, long)
    resumed(state, short)


def test_a_stage_that_begins_within_the_lag_of_a_resume_is_announced(manifest: Path) -> None:
    def staged(third: str) -> Plan:
        stages = [(0, "natural"), (6, "uniform"), (7, third)]
        mixture = {"stages": [{"from_tokens": step * BATCH * SEQ, "weights": weights} for step, weights in stages]}
        return plan_of(manifest, 20, data={"weight_lag": 2}, mixture=mixture, mixer={"name": "static"})

    old, new = staged("natural"), staged("uniform")
    state = saved(old, 4)
    blend, change = resumed(state, new).blend(new)
    assert change is not None
    assert change["parts"] == ["mixture"]
    fresh = new.blend(through_step=6)
    assert blend.ledger[1:] == [entry for entry in fresh.ledger if entry[0] > 4 * BATCH]
    assert blend.ledger[1:][0][0] == 6 * BATCH


# Domains that are left out. ------------------------------------------------------------------------------------------


def test_what_the_mixture_leaves_out(manifest: Path) -> None:
    """Weight 0 in every stage, where no bound asks for more; not a domain that is only used up."""
    zero = {"web": 1, "c_$1$": 0, "_books": 1}
    assert plan_of(manifest, 12, mixture=zero).policy.left_out == ("c_$1$",)
    assert plan_of(manifest, 12, mixture=zero, data={"min_weight": {"c_$1$": 0.1}}).policy.left_out == ()
    later = {"stages": [{"from_tokens": 0, "weights": zero}, {"from_tokens": 640, "weights": "natural"}]}
    assert plan_of(manifest, 12, mixture=later).policy.left_out == ()
    with pytest.raises(InputError, match=r"without c_\$1\$, of weight 0 in the mixture: data\.max_weight sums to 0\.8"):
        plan_of(manifest, 12, mixture=zero, data={"max_weight": 0.4})
    with pytest.raises(InputError, match=r"without c_\$1\$, of weight 0.*data\.max_epochs.* 218 samples"):
        plan_of(manifest, 30, mixture=zero, data={"max_epochs": 1})
    assert plan_of(manifest, 30, data={"max_epochs": 1}).total_samples == 240


def test_a_resume_leaves_out_what_the_run_did(manifest: Path) -> None:
    zero = {"web": 1, "c_$1$": 0, "_books": 1}
    plan, used_up = plan_of(manifest, 12, mixture=zero), plan_of(manifest, 12, data={"max_epochs": {"c_$1$": 0.1}})
    assert resumed(saved(plan, 4), plan).left_out(plan) == ("c_$1$",)
    # A weight of 0 that is not the mixture's: the domain is used up, and comes back where it may.
    state = saved(used_up, 8)
    assert resumed(state, used_up).left_out(used_up) == ()
    # Another mixture gives it more, or leaves another out; a run of before weights of 0 stayed so goes on as it was.
    more = plan_of(manifest, 12, mixture="uniform")
    assert resumed(saved(plan, 4), more).left_out(more) == ()
    other = plan_of(manifest, 12, mixture={"web": 0, "c_$1$": 1, "_books": 1})
    assert resumed(saved(plan, 4), other).left_out(other) == ("web",)
    old = make_mixer(plan.config.mixer, NAMES, [0.5, 0.0, 0.5], left_out=()).state_dict()
    assert resumed(saved(plan, 4, mixer=old), plan).left_out(plan) == ()


def test_the_mixer_goes_on_with_what_it_knows_of_the_others(manifest: Path) -> None:
    zero = {"web": 1, "c_$1$": 0, "_books": 1}
    plan, more = plan_of(manifest, 12, mixture=zero), plan_of(manifest, 12, mixture="uniform")
    mixer = make_mixer(plan.config.mixer, NAMES, [0.5, 0.0, 0.5], left_out=plan.policy.left_out)
    mixer.update(DomainStats([30.0, 0.0, 10.0], [10, 0, 10]), 1)
    state = saved(plan, 1, mixer=mixer.state_dict())
    for now in (plan, more):
        found = resumed(state, now)
        again = make_mixer(now.config.mixer, NAMES, found.blend(now)[0].weights, left_out=found.left_out(now))
        found.set_mixer(again)
        rewards, before = again.record()["estimated_rewards"], mixer.record()["estimated_rewards"]
        assert (rewards[0], rewards[2]) == (before[0], before[2])
        assert (rewards[1] is None) == (now is plan)
        again.update(DomainStats([30.0, 20.0, 10.0], [10, 10, 10]), 2)
        assert (again.weights[1] == 0) == (now is plan)


# Whole runs, but for the model. --------------------------------------------------------------------------------------


class Parts:
    """A run of one rank without a model, in parts of some steps; its losses are drawn by chance."""

    def __init__(self, run: Path) -> None:
        self._run, self._state, self._rng = run, None, np.random.default_rng(0)
        self.counts = np.zeros(3, np.int64)

    def go(self, plan: Plan, steps: int) -> None:
        resumed_from = None if self._state is None else resumed(self._state, plan)
        data = MixedData(plan, data_rank=0, reads_data=False, device=torch.device("cpu"), resumed=resumed_from)
        record = RunRecord(self._run, plan.domain_names, None if self._state is None else self._state.step)
        data.announce(record)
        for _ in range(steps):
            data.next_batch()
            drawn = torch.from_numpy(self._rng.choice(3, 64, p=data.sampler.weights_at(data.step)))
            losses = torch.from_numpy(self._rng.uniform(1, 6, 64)).float()
            data.submit(DomainSums(3).add(drawn, losses).buffer)
        state = replace(data.state(), fingerprints=fingerprints(plan))
        self._state = RunState.from_json(json.loads(json.dumps(state.to_json())), self._run)
        for report in data.take_reports():
            record.step(report)
        self.counts = data.sampler.counts_at(data.step)
        record.close()
        data.close()


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with job(tmp_path):
        yield Parts(tmp_path / "run")


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("lengths", [[(12, 12)], [(12, 12), (30, 18)], [(12, 12), (20, 3), (30, 6), (22, 1)]])
def test_a_run_whose_length_changes_keeps_its_bounds(
    manifest: Path, parts: Parts, tmp_path: Path, lag: int, lengths: list[tuple[int, int]]
) -> None:
    """By pairs of planned steps and steps taken."""
    data = {
        "max_weight": {"web": 0.05},
        "max_epochs": {"c_$1$": 0.5},
        "min_weight": {"_books": 0.1},
        "weight_lag": lag,
    }
    for planned, steps in lengths:
        parts.go(plan_of(manifest, planned, data=data), steps)
    taken = BATCH * sum(steps for _, steps in lengths)
    assert parts.counts.sum() == taken
    assert parts.counts[0] <= 0.05 * taken + 1
    assert 30 <= parts.counts[1] <= 32  # used up in the first part
    assert parts.counts[2] >= 0.1 * taken - 1
    ledger = Ledger.read(tmp_path / "run" / "weights.jsonl", 7, "low_discrepancy")
    assert ledger is not None
    weights = ledger.weights[:, [ledger.names.index(name) for name in NAMES]]
    assert ledger.starts[-1] > taken  # what takes effect past the end is on record, too
    assert (weights[:, 0] <= 0.05 + 1e-12).all()
    assert (weights[:, 2] >= 0.1 - 1e-12).all()
    assert sum(ledger.counts(taken).values()) == taken


@pytest.mark.parametrize(
    "mixer", [{"name": "odm"}, {"name": "recommended"}, {"name": "doremi", "apply": "sampling"}, {"name": "static"}]
)
def test_a_domain_of_weight_0_is_sampled_once_another_mixture_lets_it_in(
    manifest: Path, parts: Parts, tmp_path: Path, mixer: dict[str, Any]
) -> None:
    shadow = [{"name": "odm", "preset": "paper"}]
    zero = plan_of(manifest, 20, mixture={"web": 1, "c_$1$": 0, "_books": 1}, mixer=mixer, shadow=shadow)
    for steps in (8, 12):
        parts.go(zero, steps)
        assert parts.counts[1] == 0
    for name in ("weights.jsonl", "shadow/odm-paper.jsonl"):
        assert {line["domain_weights"][1] for line in lines(tmp_path / "run" / name)} == {0.0}
    parts.go(plan_of(manifest, 30, mixer=mixer, shadow=shadow), 10)
    assert parts.counts[1] >= 10


def test_a_ramp_in_parts_is_the_ramp_in_one(manifest: Path, tmp_path: Path) -> None:
    """Stopped inside it, resumed twice: the same ledger, within the bounds, and any position from one line of it."""
    tokens = BATCH * SEQ
    stages = [
        {"from_tokens": 0, "weights": {"web": 0.8, "c_$1$": 0.1, "_books": 0.1}},
        {"from_tokens": 4 * tokens, "weights": {"web": 0.8, "c_$1$": 0.1, "_books": 0.1}},
        {"from_tokens": 16 * tokens, "weights": {"web": 0.0, "c_$1$": 0.9, "_books": 0.1}, "ramp": "linear"},
    ]
    data = {"max_weight": {"c_$1$": 0.7}, "weight_lag": 2}
    plan = plan_of(manifest, 24, data=data, mixture={"stages": stages}, mixer={"name": "static"})
    for run, parts in (("one", (24,)), ("parts", (1, 8, 7, 8))):
        (tmp_path / run).mkdir()
        with job(tmp_path / run):
            taken = Parts(tmp_path / run)
            for steps in parts:
                taken.go(plan, steps)
            assert taken.counts.sum() == 24 * BATCH
    ledgers = [Ledger.read(tmp_path / run / "weights.jsonl", 7, "low_discrepancy") for run in ("one", "parts")]
    assert ledgers[0] is not None
    assert ledgers[1] is not None
    assert ledgers[0].starts.tolist() == ledgers[1].starts.tolist() == [0, *(BATCH * step for step in range(4, 17))]
    assert [line["segment"] for line in ledgers[0].lines] == [line["segment"] for line in ledgers[1].lines]
    weights = ledgers[0].weights_of(NAMES)[1:]
    assert weights.tolist() == ledgers[1].weights_of(NAMES)[1:].tolist()
    assert weights[:, 1].max() <= 0.7 + 1e-12
    asked = np.array([[0.8 * (1 - x), 0.1 + 0.8 * x, 0.1] for x in (np.arange(4, 17) - 4) / 12])
    free = asked[:, 1] <= 0.7
    np.testing.assert_allclose(weights[free], asked[free], atol=1e-12)
    np.testing.assert_allclose(weights[~free, 1], 0.7, atol=1e-12)
    blend = plan.blend(through_step=24)
    for position in (0, 4 * BATCH, 7 * BATCH + 3, 16 * BATCH - 5, 20 * BATCH):
        opened = ledgers[0].blend_at(position, plan.num_samples, plan.domain_keys)
        for one, other in zip(opened.window(position, 5), blend.window(position, 5), strict=True):
            assert one.tolist() == other.tolist()
