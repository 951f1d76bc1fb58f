"""Which samples a rank reads: slices of one global batch, weight changes at stated steps, resuming after dealing
ahead."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend
from megamix.data.sampler import Sampler, Slice, StepSamples

BATCH = 16
NUM_SAMPLES = [50, 7, 1000]
FIRST, SECOND, THIRD = [0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.0, 0.9, 0.1]


def make_blend() -> Blend:
    return Blend(NUM_SAMPLES, FIRST, seed=3)


def pairs(samples: StepSamples) -> list[tuple[int, int]]:
    return list(zip(samples.domain.ravel().tolist(), samples.sample.ravel().tolist(), strict=True))


def taken(blend: Blend, number: int) -> list[tuple[int, int]]:
    domain, sample = blend.take(number)
    return list(zip(domain.tolist(), sample.tolist(), strict=True))


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[BATCH] * 8, [16, 16, 48, 32, 32, 16, 16, 16]])
def test_slices_in_order_are_the_global_batch(data_size: int, micro_batch: int, sizes: list[int]) -> None:
    """Ranks, and micro-batches within a rank, follow one another; the layout changes nothing, weight changes or not,
    nor does a batch that changes."""
    changes = [step for step in range(8) if step == 0 or sizes[step] != sizes[step - 1]]
    batches = Batches(tuple((step, sizes[step]) for step in changes))
    shares = [Slice(BATCH, micro_batch, rank, data_size) for rank in range(data_size)]
    ranks = [Sampler(make_blend(), share, batches=batches) for share in shares]
    reference = make_blend()
    for step, size in enumerate(sizes):
        dealt = [sampler.deal() for sampler in ranks]
        assert {samples.step for samples in dealt} == {step}
        assert {samples.position for samples in dealt} == {sum(sizes[:step])}
        assert {samples.domain.shape for samples in dealt} == {(size // micro_batch // data_size, micro_batch)}
        assert [pair for samples in dealt for pair in pairs(samples)] == taken(reference, size)
        if step == 3:
            for sampler in ranks:
                sampler.set_weights(SECOND, step=6)
            reference.set_weights(SECOND, at=sum(sizes[:6]))


def test_change_takes_effect_at_its_step() -> None:
    """A domain of weight 0 is dealt up to the last sample of the step before, and not from the first sample on."""
    sampler = Sampler(make_blend(), Slice(BATCH, 4))
    assert sampler.set_weights([0.0, 0.0, 1.0], step=2)
    assert sampler.set_weights(THIRD, step=4)
    assert not sampler.set_weights(THIRD, step=5)
    domains = [sampler.deal().domain.ravel() for _ in range(6)]
    assert all(set(batch.tolist()) == {0, 1, 2} for batch in domains[:2])
    assert all(set(batch.tolist()) == {2} for batch in domains[2:4])
    assert all(0 not in batch and 1 in batch for batch in domains[4:])
    for step, weights in enumerate([FIRST, FIRST, [0, 0, 1], [0, 0, 1], THIRD, THIRD]):
        assert np.allclose(sampler.weights_at(step), weights, rtol=0, atol=1e-15)
        assert np.array_equal(sampler.counts_at(step), sum(np.bincount(b, minlength=3) for b in [[], *domains[:step]]))


def test_dealing_ahead_and_settling_later() -> None:
    """Weights for steps not dealt yet may be set after others were dealt ahead; for dealt steps they are refused."""
    sampler, reference = Sampler(make_blend(), Slice(BATCH, 4)), make_blend()
    ahead = [sampler.deal() for _ in range(3)]
    assert [samples.step for samples in ahead] == [0, 1, 2]
    with pytest.raises(InputError, match=r"position 32: the blend already stands at 48"):
        sampler.set_weights(SECOND, step=2)
    assert sampler.set_weights(SECOND, step=3)
    ahead.append(sampler.deal())
    expected = taken(reference, 3 * BATCH)
    reference.set_weights(SECOND)
    expected += taken(reference, BATCH)
    assert [pair for samples in ahead for pair in pairs(samples)] == expected


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)])
def test_resume_after_dealing_ahead(ahead: int, layout: tuple[int, int]) -> None:
    """The state of step 5, taken when up to three more were dealt and changes for later steps are known, deals steps 5
    to 14 as the uninterrupted run, on any number of ranks."""
    micro_batch, data_size = layout
    sampler = Sampler(make_blend(), Slice(BATCH, 8))
    for _ in range(5):
        sampler.deal()
    sampler.set_weights(SECOND, step=5)
    dealt = [sampler.deal() for _ in range(ahead)]
    sampler.set_weights(THIRD, step=5 + max(1, ahead))
    sampler.forget_before(5)
    state = json.loads(json.dumps(sampler.state_dict(5)))
    dealt += [sampler.deal() for _ in range(10 - ahead)]
    ranks = [Sampler.from_state_dict(state, Slice(BATCH, micro_batch, rank, data_size)) for rank in range(data_size)]
    for samples in dealt:
        resumed = [rank.deal() for rank in ranks]
        assert {one.step for one in resumed} == {samples.step}
        assert [pair for one in resumed for pair in pairs(one)] == pairs(samples)


def test_forgetting_keeps_everything_from_the_step_on() -> None:
    sampler, whole = Sampler(make_blend(), Slice(BATCH, 4)), Sampler(make_blend(), Slice(BATCH, 4))
    for step in range(12):
        for one in (sampler, whole):
            one.set_weights([1.0, step % 3, (step + 1) % 5], step=step)
            one.deal()
    sampler.forget_before(10)
    assert len(sampler.state_dict(11)["blend"]["segments"]) == 1
    for step in (10, 11, 12):
        assert sampler.state_dict(step) == whole.state_dict(step)
    with pytest.raises(InputError, match="position 144 lies before 160"):
        sampler.counts_at(9)
    assert pairs(sampler.deal()) == pairs(whole.deal())


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(InputError, match=r"global_batch 30 .* 4 data-parallel ranks .* micro-batches of 2 \(= 8\)"):
        Slice(30, 2, 0, 4)


def test_state_of_another_global_batch() -> None:
    sampler = Sampler(make_blend(), Slice(24, 4))
    sampler.deal()
    with pytest.raises(InputError, match="position 24 is not at the start of a step of global_batch 16"):
        Sampler.from_state_dict(sampler.state_dict(1), Slice(16, 4))
