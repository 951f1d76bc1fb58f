"""What the guard makes of the sums of a step: when it ends a run, and what it says and keeps."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from records import lines
from small_config import small

from megamix.core.config import validate
from megamix.data.sampler import StepSamples
from megamix.interop.trainers.host import HostRun
from megamix.mixing.mixers import DomainStats, make_mixer
from megamix.training.checkpoints.state import GuardState
from megamix.training.config import MixConfig, RunConfig
from megamix.training.guard import RECORD, BadStep, Guard
from megamix.training.plan import make_data_plan
from megamix_kernels import DomainSums

DOMAINS = ("web", "code", "law")
VOCAB, BATCH = 100, 8
NOTHING = torch.zeros(0, 4, dtype=torch.int64)


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def config(run_dir: Path, *overrides: str) -> RunConfig:
    return small(f"run_dir={run_dir}", f"train.global_batch={BATCH}", *overrides)


def make(run_dir: Path, *overrides: str, **options: Any) -> Guard:
    run = config(run_dir, *overrides)
    return Guard(run.guard, DOMAINS, VOCAB, run=run, **options)


def sums(*losses: tuple[int, float]) -> torch.Tensor:
    """Those of one token for each (domain, loss)."""
    domain, loss = zip(*losses, strict=True)
    return DomainSums(len(DOMAINS)).add(torch.tensor(domain), torch.tensor(loss)).buffer


def samples(step: int, domains: list[int]) -> StepSamples:
    """Samples 100, 101, ... of these domains, in micro-batches of two: the first of the step."""
    domain, sample = np.array(domains), np.arange(len(domains)) + 100
    return StepSamples(step, step * BATCH, domain.reshape(-1, 2), sample.reshape(-1, 2), domain, sample)


def test_finite_steps_leave_nothing_behind(group: Any, tmp_path: Path) -> None:
    guard = make(tmp_path)
    guard.keep(0, samples(0, [0, 1]), torch.zeros(1, 2, dtype=torch.int32))
    guard.judge(0, sums((0, 3.0), (1, 4.0)), NOTHING, group)
    guard.took()
    assert not (tmp_path / RECORD).exists()
    assert guard.state() == GuardState(skips=0, in_a_row=0)


@pytest.mark.parametrize("more", [0, 2])
def test_stop_names_domains_samples_and_tokens(group: Any, tmp_path: Path, more: int) -> None:
    """This rank's part of the batch begins at its fourth sample, or of a larger batch at its sixth; the last
    micro-batch of step 2 is bad."""
    guard = make(tmp_path, data_rank=1)
    counts = torch.tensor([[0, 0]] * (more // 2) + [[0, 0], [1, 2]], dtype=torch.int32)
    guard.keep(2, samples(2, [0] * more + [0, 1, 2, 1]), counts)
    at, sample = 22 + 2 * more, 102 + more
    with pytest.raises(BadStep) as error:
        guard.judge(2, sums((0, 2.0), (2, math.nan), (1, math.inf), (1, -math.inf)), NOTHING, group)
    text = str(error.value)
    assert "step 3: the loss is not finite in 'code' (2 tokens), 'law' (1 tokens);" in text
    assert (
        f"at position {at} (sample {sample} of 'law', 1 tokens), {at + 1} (sample {sample + 1} of 'code', 2 tokens);"
        in text
    )
    assert f"`megamix inspect {tmp_path} --sample {at}`" in text
    assert "guard.non_finite=skip" in text
    assert error.value.exit_code == 1
    assert lines(tmp_path / RECORD) == [
        {
            "step": 3,
            "policy": "stop",
            "tokens": {"code": 2, "law": 1},
            "samples": [
                {"position": at, "domain": "law", "sample": sample, "tokens": 1},
                {"position": at + 1, "domain": "code", "sample": sample + 1, "tokens": 2},
            ],
        }
    ]


def test_the_end_stays_the_end(group: Any, tmp_path: Path) -> None:
    """Steps under way when a run ends are judged too: they end it for the same reason, and are not on record."""
    guard = make(tmp_path)
    with pytest.raises(BadStep, match="step 1"):
        guard.judge(0, sums((0, math.nan)), NOTHING, group)
    for step, loss in ((1, math.nan), (2, 1.0)):
        with pytest.raises(BadStep, match=r"step 1: the loss is not finite in 'web' \(1 tokens\), which is all of"):
            guard.judge(step, sums((0, loss)), NOTHING, group)
    assert len(lines(tmp_path / RECORD)) == 1


def test_many_bad_samples_are_all_on_record(group: Any, tmp_path: Path) -> None:
    guard = make(tmp_path)
    guard.keep(0, samples(0, [0] * 6), torch.ones(3, 2, dtype=torch.int32))
    with pytest.raises(BadStep, match=rf"3 \(sample 103 of 'web', 1 tokens\) and 2 more \(see {RECORD}\);"):
        guard.judge(0, sums(*[(0, math.nan)] * 6), NOTHING, group)
    assert [bad["position"] for bad in lines(tmp_path / RECORD)[0]["samples"]] == list(range(6))


def test_ranks_that_share_a_sample_add_up(group: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with context parallelism, where each has some of its tokens; and positions come in order."""
    parts: list[Any] = []

    def gather(gathered: list[Any], mine: Any, group: Any) -> None:
        parts.append(mine)
        gathered[:] = parts

    monkeypatch.setattr(dist, "all_gather_object", gather)
    ranks = [make(tmp_path / str(rank), "guard.non_finite=skip") for rank in range(3)]
    for guard, counts in zip(ranks, ([0, 5], [2, 3], None), strict=True):
        if counts is not None:
            guard.keep(0, samples(0, [0, 1]), torch.tensor([counts], dtype=torch.int32))
        guard.judge(0, sums((0, math.nan)), NOTHING, group)
    found = [(bad["position"], bad["tokens"]) for bad in lines(tmp_path / "2" / RECORD)[0]["samples"]]
    assert found == [(0, 2), (1, 8)]


def test_skip_counts_and_gives_up(group: Any, tmp_path: Path) -> None:
    """Two in a row, then a good one, then three in a row, which are too many; with the state handed on half-way."""
    run, overrides = tmp_path / "run", ("guard.non_finite=skip", "guard.max_skips=3")
    guard, steps = make(run, *overrides), itertools.count()
    said = []
    for kind in ("loss", "gradient", "good", "loss"):
        step = next(steps)
        guard.judge(step, sums((0, math.nan if kind == "loss" else 1.0)), NOTHING, group)
        if kind == "good":
            guard.took()
        else:
            said.append(guard.left_out(step))
    assert said[0].startswith("step 1 left out, 1 in a row: the loss is not finite in 'web' (1 tokens)")
    assert said[1] == "step 2 left out, 2 in a row: the gradient is not finite, though every loss is"
    assert said[2].startswith("step 4 left out, 1 in a row: the loss")
    state = guard.state()
    assert state == GuardState(skips=3, in_a_row=1)
    guard = make(run, *overrides, state=state)
    guard.judge(4, sums((0, math.nan)), NOTHING, group)
    guard.left_out(4)
    guard.judge(5, sums((0, 1.0)), NOTHING, group)
    with pytest.raises(BadStep, match=r"step 6: the gradient .* the last of 3 steps in a row .*guard.max_skips 3"):
        guard.left_out(5)
    assert [(line["step"], line["tokens"]) for line in lines(run / RECORD)] == [
        (1, {"web": 1}), (2, {}), (4, {"web": 1}), (5, {"web": 1}), (6, {}),
    ]  # fmt: skip


def test_a_step_left_out_for_the_loss_scale_is_counted_and_no_fault(group: Any, tmp_path: Path) -> None:
    """Unless a loss was not finite, which lowers the scale, too."""
    guard = make(tmp_path)
    assert guard.scaled(3, None) is None
    for step in range(4, 20):
        guard.judge(step, sums((0, 3.0)), NOTHING, group)
        assert guard.scaled(step, "its gradients exceed fp16") == f"step {step + 1} left out: its gradients exceed fp16"
    assert guard.state() == GuardState(skips=16, in_a_row=0)
    assert not (tmp_path / RECORD).exists()
    guard = make(tmp_path, "guard.non_finite=skip")
    guard.judge(4, sums((0, math.nan)), NOTHING, group)
    assert guard.scaled(4, "its gradients exceed fp16") is None
    assert "step 5 left out, 1 in a row: the loss is not finite in" in guard.left_out(4)


def test_after_a_row_of_steps_left_out_the_checkpoint_before_it_is_named(group: Any, tmp_path: Path) -> None:
    """Those of steps 2 and 3 were saved in the row; that of step 1 is the last one before it."""
    for step in (0, 1, 2, 3):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    guard = make(tmp_path, "guard.non_finite=skip", "guard.max_skips=3")
    for step in range(1, 4):
        guard.judge(step, sums((0, 1.0)), NOTHING, group)
        if step < 3:
            guard.left_out(step)
    with pytest.raises(BadStep, match=rf"checkpoint\.resume={tmp_path}/checkpoints/step_1, or an earlier one"):
        guard.left_out(3)


def test_a_bad_gradient_stops_too(group: Any, tmp_path: Path) -> None:
    guard = make(tmp_path)
    guard.judge(6, sums((0, 1.0)), NOTHING, group)
    with pytest.raises(BadStep, match=r"step 7: the gradient is not finite, though every loss is\. Lower train\.lr"):
        guard.left_out(6)


def test_a_bad_evaluation_stops_and_does_not_count_as_a_skip(group: Any, tmp_path: Path) -> None:
    """What a mixer is rewarded by; under skip it sees the finite part."""
    bad = sums((1, math.nan))
    with pytest.raises(BadStep, match=r"the evaluation after step 1: the loss is not finite in 'code' \(1 tokens\)"):
        make(tmp_path / "stop").judge(0, sums((0, 1.0)), bad, group)
    make(tmp_path / "skip", "guard.non_finite=skip").judge(0, sums((0, 1.0)), bad, group)
    assert not (tmp_path / "skip").exists()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_explosion_is_above_so_many_guesses(group: Any, tmp_path: Path, policy: str) -> None:
    """The mean is over all tokens, whatever their domains; the limit itself is no explosion."""
    guess = math.log(VOCAB)
    checkpoints = tmp_path / "checkpoints"
    for step in (2, 4, 9):
        (checkpoints / f"step_{step}").mkdir(parents=True)
    guard = make(tmp_path, f"guard.non_finite={policy}", "guard.explosion=2")
    guard.judge(5, sums((0, 0.0), (1, 3.999 * guess)), NOTHING, group)
    with pytest.raises(BadStep) as error:
        guard.judge(6, sums((0, 0.0), (1, 4.001 * guess)), NOTHING, group)
    text = str(error.value)
    assert f"step 7: the mean loss is {2.0005 * guess:.3f} with a learning rate of " in text
    assert f"above {2 * guess:.3f} (guard.explosion: 2 times the loss of a guess)" in text
    assert f"the highest is that of 'code', {4.001 * guess:.3f}." in text
    assert f"checkpoint.resume={checkpoints}/step_4," in text
    make(tmp_path, "guard.explosion=0").judge(6, sums((0, 1e5)), NOTHING, group)
    with pytest.raises(BadStep, match="the start, as no checkpoint is before it"):
        make(tmp_path / "new").judge(0, sums((0, 1e5)), NOTHING, group)


def test_a_record_that_cannot_be_written_does_not_hide_the_reason(group: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(BadStep, match="the loss is not finite in 'web'"):
        make(tmp_path / "run").judge(0, sums((0, math.nan)), NOTHING, group)


def test_other_trainers_stop_with_the_samples_named(group: Any, data_dir: Path, tmp_path: Path) -> None:
    """Through what all adapters are made of; the second sample of the second micro-batch of step 2 is bad."""
    mix = {
        "data": {"manifest": str(data_dir), "seq_length": 32},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 4},
    }
    plan = make_data_plan(validate(MixConfig, mix, "test"), 1, verify=False)
    run = HostRun(
        plan, data_rank=0, reads_data=True, has_loss=True, device=torch.device("cpu"), record_dir=tmp_path, resumed=None
    )
    reads = []
    for step in range(2):
        batch = run.next_batch()
        assert batch is not None
        reads.append(batch.samples)
        run.begin_step(batch, 2.0)
        for m, (labels, domains) in enumerate(zip(batch.labels, batch.domains, strict=True)):
            logits = torch.zeros(*labels.shape, plan.vocab_size)
            if (step, m) == (1, 1):
                logits[1] = torch.nan
            run.loss(logits, (labels, domains))
    bad = reads[1]
    assert bad is not None
    name, sample = plan.domain_names[bad.domain[1, 1]], bad.sample[1, 1]
    with pytest.raises(
        BadStep, match=rf"at position 13 \(sample {sample} of '{name}', 32 tokens\)\. Lower the learning"
    ):
        run.data.settle()
    run.close()
    assert not (tmp_path / RECORD).exists()


@pytest.mark.parametrize(
    "mixer",
    [
        {"name": "static"},
        *({"name": "odm", "preset": preset} for preset in ("official", "paper", "exp3", "dataflex")),
        {"name": "recommended"},
        {"name": "doremi", "reference": None},
    ],
    ids=lambda mixer: mixer.get("preset", mixer["name"]),
)
@pytest.mark.parametrize("domains", [1, 3])
def test_mixers_take_a_step_without_a_finite_token(mixer: dict[str, Any], domains: int) -> None:
    """Before they have seen anything, after it, and of one domain only: weights and state stay finite numbers."""
    names, even = DOMAINS[:domains], [1 / domains] * domains
    made = make_mixer(mixer, names, even)
    nothing = DomainStats([0.0] * domains, [0] * domains, [0.0] * domains, even, [64] * domains)
    partly = DomainStats([0.0] + [90.0] * (domains - 1), [0] + [30] * (domains - 1), [0.0] * domains, even)
    whole = DomainStats([90.0] * domains, [30] * domains, [9.0] * domains, even)
    for step, stats in enumerate((nothing, whole, nothing, partly, whole, nothing), start=1):
        weights = made.update(stats, step)
        assert np.isfinite(weights).all()
        assert weights.sum() == pytest.approx(1)
        json.dumps([made.state_dict(), made.record()], allow_nan=False)
