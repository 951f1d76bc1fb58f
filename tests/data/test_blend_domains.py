"""A changed set of domains: those kept go on where they were, and the counts stay within the bound that is proven for
all domains there ever were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from blends import FEW, SAMPLINGS, assert_near_the_weights, pairs
from hypothesis import given
from hypothesis import strategies as st

from megamix.core.errors import InputError
from megamix.data import Blend
from megamix.data.blend.blend import Sampling
from megamix.data.blend.segment import Segment

SIZE = 11


def union_of(union: Blend, active: list[int], weights: np.ndarray, joined: int) -> Blend:
    """``union`` with ``joined`` domains more, and a cut at its position, from where only ``active`` have a weight."""
    total = union.num_domains + joined
    all_weights, deficits, counts = np.zeros(total), np.zeros(total), np.zeros(total, np.int64)
    all_weights[active] = weights
    deficits[: -joined or None], counts[: -joined or None] = union.deficits, union.counts
    segment = Segment(union.position, all_weights, deficits, counts)
    return Blend.from_segment([SIZE] * total, segment, union.seed, sampling=union.sampling)


@FEW
@given(st.integers(0, 2**32), st.sampled_from(SAMPLINGS), st.integers(1, 8))
def test_the_same_as_with_weights_of_0(seed: int, sampling: Sampling, num_domains: int) -> None:
    """Domains join, leave and start anew, over and over: the samples, counts and deficits are those of a blend of all
    that ever were. Its deficits, also of those that left, are within the bound of their number."""
    rng = np.random.default_rng(seed)
    weights = rng.random(num_domains) + 0.01
    blend = Blend([SIZE] * num_domains, weights, 9, sampling=sampling)
    union = Blend([SIZE] * num_domains, weights, 9, sampling=sampling)
    active = list(range(num_domains))  # domains of the union
    for _ in range(8):
        for _ in range(int(rng.integers(1, 4))):
            weights = rng.random(len(active)) ** int(rng.choice([1, 6]))
            spread = np.zeros(union.num_domains)
            spread[active] = weights
            blend.set_weights(weights)
            union.set_weights(spread)
            domain, sample = blend.take(int(rng.integers(1, 30)))
            assert pairs((np.array(active)[domain], sample)) == pairs(union.take(domain.size))
            assert blend.deficits.tolist() == union.deficits[active].tolist()
            assert blend.counts.tolist() == union.counts[active].tolist()
            if sampling == "low_discrepancy":
                assert_near_the_weights(union.deficits)
        kept = [index for index in range(len(active)) if rng.random() < 0.7]
        restarted = [index for index in range(len(kept)) if rng.random() < 0.2]
        joined = int(rng.integers(not kept, 3))
        factors = rng.random(len(kept)) + 0.1

        def rescale(old: np.ndarray, kept: list[int] = kept, factors: np.ndarray = factors, new: int = joined) -> Any:
            return np.concatenate([old[kept] * factors + 1e-3, np.full(new, 0.2)])

        known, first = union.num_domains, union.num_domains + len(restarted)
        names = [active[index] for index in kept]
        for number, index in enumerate(restarted):
            names[index] = known + number  # new data: to the union, another domain
        names += range(first, first + joined)
        # In the order of the union, so that sums are rounded alike.
        places = np.argsort(names, kind="stable").tolist()
        sources = [*kept, *[None] * joined]
        blend = blend.with_domains(
            [SIZE] * len(names),
            [names[place] for place in places],
            [sources[place] for place in places],
            lambda old, rescale=rescale, places=places: rescale(old)[places],
            restarted=[places.index(index) for index in restarted],
        )
        active = sorted(names)
        union = union_of(union, active, blend.weights, len(restarted) + joined)


def test_announced_changes_stay_where_they_are() -> None:
    blend = Blend([SIZE] * 3, [1, 1, 2], 5)
    blend.take(10)
    blend.set_weights([0, 1, 1], at=10)
    blend.set_weights([3, 1, 0], at=40)
    changed = blend.with_domains([SIZE, 7], [2, 8], [2, None], lambda weights: [weights[2] / 2 + 0.25, 0.5])
    assert changed.position == 10
    assert changed.ledger == [(10, [0.5, 0.5]), (40, [1 / 3, 2 / 3])]
    assert changed.counts.tolist() == [blend.counts[2], 0]
    assert changed.seed == 5
    # Nothing of the blend it came from has changed.
    assert blend.ledger == [(0, [0.25, 0.25, 0.5]), (10, [0, 0.5, 0.5]), (40, [0.75, 0.25, 0])]
    with pytest.raises(InputError, match="position 9 lies before 10"):
        changed.window(9, 1)
    assert Blend.from_state_dict(changed.state_dict()).state_dict() == changed.state_dict()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_order_within_a_domain_goes_by_its_key(sampling: Sampling) -> None:
    """Whatever its index becomes: its next sample is the one it would have been. With new data it starts over."""
    keys, sizes = [40, 50, 60], [30, 31, 32]
    blend = Blend(sizes, [1, 1, 1], 5, domain_keys=keys, sampling=sampling)
    blend.take(50)
    alone = {key: Blend([size], [1], 5, domain_keys=[key]) for key, size in zip(keys, sizes, strict=True)}
    changed = blend.with_domains(
        [32, 40, 30, 9], [60, 50, 40, 70], [2, 1, 0, None], lambda weights: [1, 1, 1, 1], restarted=[1]
    )
    domain, sample = changed.take(200)
    for number, key in ((0, 60), (2, 40)):
        mine = sample[domain == number]
        start = int(blend.counts[keys.index(key)])
        assert mine.tolist() == alone[key].window(start, mine.size)[1].tolist()
    for number, key, size in ((1, 50, 40), (3, 70, 9)):
        mine = sample[domain == number]
        assert mine.tolist() == Blend([size], [1], 5, domain_keys=[key]).take(mine.size)[1].tolist()


def test_what_cannot_be_kept() -> None:
    blend = Blend([10, 20], [1, 1], 5)

    def change(num_samples: list[int], keys: list[int], sources: list[int | None], weights: list[float]) -> Blend:
        return blend.with_domains(num_samples, keys, sources, lambda _: weights)

    with pytest.raises(InputError, match=r"domain 0 is to go on as domain 1 was.*\(20, 1\) and this \(10, 1\)"):
        change([10], [1], [1], [1])
    with pytest.raises(InputError, match=r"domain 0 is to go on as domain 1 was.*\(20, 1\) and this \(20, 7\)"):
        change([20], [7], [1], [1])
    with pytest.raises(InputError, match=r"different domains of 0\.\.1, got \[0, 0\]"):
        change([10, 10], [0, 5], [0, 0], [1, 1])
    with pytest.raises(InputError, match=r"different domains of 0\.\.1, got \[2\]"):
        change([10], [0], [2], [1])
    with pytest.raises(InputError, match="sources has 1 entries, expected 2"):
        change([10, 10], [0, 5], [0], [1, 1])
    with pytest.raises(InputError, match=r"weights have shape \(2,\), expected \[1\]"):
        change([10], [0], [0], [1, 1])
    assert change([20], [1], [1], [1]).ledger == [(0, [1.0])]
