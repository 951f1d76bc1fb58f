"""Steps of different sizes: a ramp of batches by tokens, and another batch on resume, are one and the same thing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import job
from legs import leave
from recorded_runs import SEQ, write_data
from records import lines

from megamix.analysis.replay import replay
from megamix.core.config import validate
from megamix.core.errors import InputError, ResumeRefused
from megamix.data.batches import Batches
from megamix.engines.config import BatchStage, TrainConfig
from megamix.training.checkpoints.fingerprints import fingerprints
from megamix.training.checkpoints.resume import Resumed, resume_from
from megamix.training.checkpoints.state import RunState
from megamix.training.config import RunConfig
from megamix.training.data_loop import MixedData
from megamix.training.plan import Plan, make_plan
from megamix.training.records.run_record import RunRecord
from megamix_kernels import DomainSums

STEPS = 9
ODM = {"name": "odm", "preset": "official", "warmup_steps": 1}
SHADOW = [{"name": "odm", "preset": "paper", "warmup_steps": 1}]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches") / "data"
    write_data(folder)
    return folder / "manifest.json"


def plan_of(manifest: Path, batch: int, ramp: Any = (), world_size: int = 1, **sections: Any) -> Plan:
    train = {
        "steps": STEPS,
        "global_batch": batch,
        "micro_batch": 2,
        "lr": 1e-3,
        "seed": 7,
        **sections.pop("train", {}),
    }
    content = {
        "run_dir": "run",
        "data": {"manifest": str(manifest), "seq_length": SEQ, **sections.pop("data", {})},
        "model": {"architecture": "neox", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16},
        "mixture": "uniform",
        "mixer": ODM,
        "shadow": SHADOW,
        "checkpoint": {"accept_changed": ["batch", "train"]},
        "train": {**train, "batch_ramp": [{"global_batch": size, "until_tokens": tokens} for size, tokens in ramp]},
        **sections,
    }
    return make_plan(validate(RunConfig, content, "test"), world_size)


def resumed(state: RunState, plan: Plan) -> Resumed:
    return resume_from(state, plan, Path("run/checkpoints/step_N"), fingerprints(plan))


class Run:
    """A run of one rank without a model, in parts; its losses are drawn by chance, by the step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: RunState | None = None
        self.order: list[tuple[int, int]] = []
        self.weights: list[list[float]] = []

    def go(self, plan: Plan, steps: int) -> Plan:
        found = None if self.state is None else resumed(self.state, plan)
        plan = plan if found is None else found.adopted(plan)
        data = MixedData(plan, data_rank=0, reads_data=True, device=torch.device("cpu"), resumed=found)
        record = RunRecord(self.folder, plan.domain_names, None if found is None else found.step)
        data.announce(record)
        for _ in range(steps):
            step, batches = data.step, plan.config.batches
            batch, _ = data.next_batch()
            assert batch is not None
            assert batch.samples is not None
            assert (batch.samples.step, batch.samples.position) == (step, batches.position(step))
            assert batch.tokens.shape[0] == data.num_micro_batches() == batches.size(step) // 2
            self.order += zip(batch.samples.all_domain.tolist(), batch.samples.all_sample.tolist(), strict=True)
            self.weights.append(data.sampler.weights_at(step).tolist())
            rng = np.random.default_rng(step)
            drawn = torch.from_numpy(rng.choice(3, 64, p=self.weights[-1]))
            sums = DomainSums(3).add(drawn, torch.from_numpy(rng.uniform(1, 6, 64)).float()).buffer
            data.submit(sums)
        self.state = leave(data, record, plan, self.folder)
        return plan


@pytest.mark.parametrize(
    ("first", "second", "at", "lag"), [(4, 8, 1, 1), (8, 2, 4, 1), (4, 8, 4, 3), (8, 2, 4, 3), (4, 8, 8, 1)]
)
def test_another_batch_on_resume_is_the_ramp_that_has_it_there(
    manifest: Path, tmp_path: Path, first: int, second: int, at: int, lag: int
) -> None:
    """The same samples, weights, mixer and shadow, bit for bit, with weights announced across the change; stopped and
    resumed once more before, at and after it. Its record replays to the same weights."""
    data = {"weight_lag": lag}
    ramp = plan_of(manifest, second, [(first, at * first * SEQ)], data=data)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    with job(whole):
        one = Run(whole)
        one.go(ramp, STEPS)
    with job(parts):
        other = Run(parts)
        other.go(plan_of(manifest, first, data=data), at)
        again = other.go(plan_of(manifest, second, data=data), (STEPS - at) // 2)
        again = other.go(plan_of(manifest, second, data=data, checkpoint={}), STEPS - at - (STEPS - at) // 2)
    assert again.config.batches == ramp.config.batches == Batches(((0, first), (at, second)), SEQ)
    assert again.config.train.batch_ramp == ramp.config.train.batch_ramp
    assert len(one.order) == at * first + (STEPS - at) * second
    assert other.order == one.order
    assert other.weights == one.weights
    assert len({tuple(each) for each in one.weights}) >= 3, "the weights must move"
    assert one.state is not None
    assert other.state is not None
    assert other.state.mixer == one.state.mixer
    assert other.state.sampler == one.state.sampler
    assert other.state.shadow == one.state.shadow
    used = [line["domain_weights"] for line in lines(whole / "weights.jsonl")]
    for run in (one, other):
        replayed = replay(run.folder, [], tmp_path / f"replayed-{run.folder.name}")
        assert replayed.mixers[0].distance == 0
        assert [line["domain_weights"] for line in lines(replayed.mixers[0].written[0])] == used


def test_a_domain_with_weights_alone_gives_every_sample_once_across_the_change(manifest: Path, tmp_path: Path) -> None:
    """K = 1: samples of one epoch follow one another, none twice, whatever the batch."""
    one = {"data": {"domains": ["web"]}, "mixer": {"name": "static"}, "shadow": []}
    plan = plan_of(manifest, 8, [(2, 3 * 2 * SEQ), (4, (6 + 4 * 4) * SEQ)], **one)
    position, steps = plan.config.batches.position(STEPS), [2, 2, 2, 4, 4, 4, 4, 8, 8]
    assert [plan.config.batches.size(step) for step in range(STEPS)] == steps
    assert plan.total_samples == position == sum(steps)
    domain, sample = plan.blend().take(position)
    assert set(domain.tolist()) == {0}
    assert len(set(sample.tolist())) == position


def test_a_change_that_nobody_accepted_is_refused(manifest: Path, tmp_path: Path) -> None:
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, 8, [(4, 5 * 4 * SEQ)]), 3)
    assert run.state is not None
    for batch, ramp, said in (
        (4, [], "global_batch was '4, from step 6 on 8', now 4."),
        (8, [], "now 8"),
        (8, [(4, 4 * 4 * SEQ)], "now '4, from step 5 on 8'"),
    ):
        with pytest.raises(ResumeRefused, match=rf"another batch: .*{re.escape(said)}.*accept_changed=\[batch\]"):
            resumed(run.state, plan_of(manifest, batch, ramp, checkpoint={}))
    # What lies before the checkpoint is what it was, whatever the config says of it.
    same = plan_of(manifest, 8, [(2, 2 * 4 * SEQ), (4, 5 * 4 * SEQ)], checkpoint={})
    assert resumed(run.state, same).adopted(same).config.batches.sizes == ((0, 4), (5, 8))
    # A checkpoint of before there were several sizes, on two ranks.
    old = json.loads(json.dumps(run.state.to_json()))
    del old["fingerprints"]["batch"]
    old["fingerprints"]["order"]["global_batch"] = 4
    two = plan_of(manifest, 4, checkpoint={}, world_size=2, engine={"name": "deepspeed", "data": 2})
    assert resumed(RunState.from_json(old, tmp_path), two).changed == ()
    assert two.share(1).num_micro_batches == 1


def test_what_a_changed_batch_does_is_said(manifest: Path, tmp_path: Path) -> None:
    with job(tmp_path):
        run = Run(tmp_path)
        run.go(plan_of(manifest, 4), 3)
    state = run.state
    assert state is not None

    def said(**train: Any) -> str | None:
        plan = plan_of(manifest, 8, train=train)
        found = resumed(state, plan)
        return found.said_changes(found.adopted(plan).config)

    text = said()
    assert text is not None
    assert text.startswith(
        "another batch from step 4 on: 6 steps of 8 samples are left, before 6 steps of 4 samples; the run"
    )
    assert (
        f"ends after {(12 + 48) * SEQ:,} tokens, before after {36 * SEQ:,} (as near as can be with train.steps=6)"
        in text
    )
    assert "Learning rate of step 4: 0.000722, as before" in text
    kept = said(steps=6)
    assert kept is not None
    assert "3 steps of 8 samples are left, before 6 steps of 4" in kept
    assert f"ends after {36 * SEQ:,} tokens, as before" in kept
    assert "steps 9 -> 6" in kept
    assert "Learning rate of step 4: 0.000411, 0.000722 before" in kept


def test_bounds_count_the_samples_of_the_whole_ramp(manifest: Path) -> None:
    """max_epochs and stages by tokens follow the sizes of the steps."""
    stages = {"stages": [{"from_tokens": 0, "weights": "natural"}, {"from_tokens": 20 * SEQ, "weights": "uniform"}]}
    plan = plan_of(manifest, 8, [(4, 12 * SEQ)], mixture=stages, mixer={"name": "static"}, shadow=[])
    assert plan.policy.stages.steps == (0, 4)
    assert plan.total_samples == 3 * 4 + 6 * 8
    blend = plan.blend(through_step=STEPS)
    assert [position for position, _ in blend.ledger] == [0, 20]
    with pytest.raises(InputError, match="stage 2 starts at"):
        plan_of(
            manifest, 2, [(1, 6 * SEQ)], mixture=stages, mixer={"name": "static"}, shadow=[], train={"micro_batch": 1}
        )


@pytest.mark.parametrize(
    ("ramp", "problem"),
    [
        ([(4, 100), (8, 100)], "until_tokens 100 follows 100"),
        ([(8, SEQ), (2, 8 * SEQ)], r"stage 2 \(2 samples a step until 128 tokens\) has no step"),
        ([(3, 10 * SEQ)], "global_batch 3 does not divide"),
    ],
)
def test_ramps_that_cannot_be(manifest: Path, ramp: list[tuple[int, int]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        plan_of(manifest, 16, ramp)


def test_a_ramp_that_outlasts_the_run_is_warned_of(manifest: Path) -> None:
    warned = [text for text in plan_of(manifest, 8, [(4, 1e6)]).warnings() if "never has" in text]
    assert len(warned) == 1
    assert not [text for text in plan_of(manifest, 8, [(4, 100)]).warnings() if "never has" in text]


def test_learning_rate_over_tokens() -> None:
    """The share of the way is that of the tokens; with equal steps it is that of the steps, to the last bit."""
    ramp = (BatchStage(global_batch=2, until_tokens=8), BatchStage(global_batch=4, until_tokens=32))
    train = TrainConfig(
        steps=13, global_batch=8, micro_batch=2, lr=1.0, min_lr=0.0, warmup=0.0, schedule="linear", batch_ramp=ramp,
        schedule_over="tokens",
    )  # fmt: skip
    batches = train.batches(1)
    starts = np.cumsum([0, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 8])
    assert [batches.position(step) for step in range(13)] == starts.tolist()
    rates = [train.lr_at(step, batches) for step in range(13)]
    assert rates == pytest.approx((1 - starts / starts[-1]).tolist(), abs=1e-12)
    by_steps = train.model_copy(update={"schedule_over": "steps"})
    assert [by_steps.lr_at(step, batches) for step in range(13)] == [by_steps.lr_at(step) for step in range(13)]
    for schedule in ("cosine", "wsd"):
        equal = train.model_copy(update={"schedule": schedule, "warmup_steps": 3, "batch_ramp": ()})
        assert [equal.lr_at(step, Batches.equal(8, 16)) for step in range(13)] == [
            equal.lr_at(step) for step in range(13)
        ]
