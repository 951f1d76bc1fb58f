"""Up to 300 domains and 10**10 positions, by jumping: counts against the integral of the weights in exact arithmetic,
and windows, cuts and resumes where nobody has walked. Then very many changes."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any, SupportsIndex

import numpy as np
from blends import WEIGHT, assert_near_the_weights, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from megamix.data import Blend
from megamix.data.blend.blend import MAX_ORDERS

FAR = 10**10


@st.composite
def blends(draw: st.DrawFn) -> Blend:
    """A blend with changes announced up to position 10**10, some of them dense."""
    num_domains = draw(st.one_of(st.integers(1, 8), st.integers(1, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = rng.integers(1, draw(st.sampled_from([4, 40, 10**6])), num_domains, endpoint=True)
    few = draw(st.lists(WEIGHT, min_size=1, max_size=8))

    def weights() -> np.ndarray:
        kind = draw(st.sampled_from(["equal", "random", "few"]))
        if kind == "few":
            chosen = rng.choice(few, num_domains)
            chosen[rng.integers(num_domains)] += 0.5
            return chosen
        return np.ones(num_domains) if kind == "equal" else rng.random(num_domains) ** 8 + 1e-9

    blend = Blend(sizes, weights(), seed=3)
    at = 0
    for _ in range(draw(st.integers(0, 6))):
        at += draw(st.one_of(st.integers(1, 500), st.integers(1, FAR // 6)))
        blend.set_weights(weights(), at=at)
    return blend


def exact_deficits(blend: Blend, position: int) -> tuple[np.ndarray, float]:
    """(integral of the weights minus counts, how far the integral of their sum is from ``position``), computed with
    fractions from the ledger."""
    ledger = [change for change in blend.ledger if change[0] < max(position, 1)]
    ends = [start for start, _ in ledger[1:]] + [position]
    integral = [Fraction(0)] * blend.num_domains
    for (start, weights), end in zip(ledger, ends, strict=True):
        integral = [sum_ + Fraction(weight) * (end - start) for sum_, weight in zip(integral, weights, strict=True)]
    counts = blend.counts_at(position).tolist()
    deficits = [float(sum_ - count) for sum_, count in zip(integral, counts, strict=True)]
    return np.array(deficits), float(abs(sum(integral) - position))


@settings(max_examples=300, deadline=None)
@given(blends(), st.data())
def test_far_positions(blend: Blend, data: st.DataObject) -> None:
    starts = [start for start, _ in blend.ledger]
    near = st.sampled_from(starts).flatmap(lambda start: st.integers(max(0, start - 300), start + 300))
    position = data.draw(st.one_of(near, st.integers(0, FAR)))
    # Weights are floats that sum to 1 within a few roundings, and so are the deficits that a change hands on: at 10**10
    # that is some 1e-4 of a sample.
    deficits, excess = exact_deficits(blend, position)
    assert excess < 1e-2
    assert_near_the_weights(deficits, 1e-3 + excess * blend.num_domains)
    number = data.draw(st.integers(1, 600))
    domain, sample = blend.window(position, number)
    before, after = blend.counts_at(position), blend.counts_at(position + number)
    assert before.sum() == position
    assert np.bincount(domain, minlength=blend.num_domains).tolist() == (after - before).tolist()
    for at in (position, position + number - 1):
        weights = blend.segment_at(at).weights
        assert weights[domain[at - position]] > 0
    # Each sample once per epoch, and whole epochs are whole.
    for one in np.unique(domain).tolist():
        size, mine = int(blend.num_samples[one]), sample[domain == one]
        for start in range(-int(before[one] % size), mine.size, size):
            epoch = mine[max(0, start) : start + size]
            assert np.unique(epoch).size == epoch.size
            assert epoch.size < size or np.sort(epoch).tolist() == list(range(size))
    # Cut anywhere, or resumed there.
    cut = data.draw(st.integers(0, number))
    assert pairs(blend.window(position, cut)) + pairs(blend.window(position + cut, number - cut)) == pairs(
        (domain, sample)
    )
    resumed = Blend.from_state_dict(json.loads(json.dumps(blend.state_dict(at=position + cut))))
    assert resumed.counts.tolist() == blend.counts_at(position + cut).tolist()
    assert pairs(resumed.take(number - cut)) == pairs((domain, sample))[cut:]
    assert resumed.counts.tolist() == after.tolist()


def test_forgetting_keeps_many_changes_small() -> None:
    """A change at every step: what the blend holds, and its state, do not grow with their number."""
    rng = np.random.default_rng(0)
    for sampling in ("low_discrepancy", "iid"):
        blend = Blend([1000] * 5, [1] * 5, 1, sampling=sampling)
        held = []
        for step in range(800):
            blend.set_weights(rng.random(5) + 0.1, at=blend.position + 16)  # announced two steps ahead
            blend.take(8)
            blend.counts_at(blend.position - 4)
            blend.forget_before(blend.position - 8)
            if step >= 10:
                held.append((len(blend._segments), len(blend._orders)))
        assert len(blend.ledger) <= 5
        assert max(segments for segments, _ in held) <= 5
        assert max(orders for _, orders in held) <= 5
        assert len(json.dumps(blend.state_dict())) < 3000


class CountedList(list[Any]):
    """Counts how often an element is looked up."""

    reads = 0

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        CountedList.reads += 1
        return super().__getitem__(index)


def test_many_changes_kept_are_not_all_worked_out() -> None:
    """Nobody forgets: of each segment four short arrays stay, and what was worked out from them for the last ones."""
    rng = np.random.default_rng(0)
    blend = Blend([1000] * 3, [1] * 3, 1)
    taken = []
    for _ in range(MAX_ORDERS + 50):
        blend.set_weights(rng.random(3) + 0.1)
        taken += pairs(blend.take(3))
    assert len(blend._segments) == MAX_ORDERS + 50
    assert len(blend._orders) == MAX_ORDERS
    assert pairs(blend.window(0, len(taken))) == taken
    assert len(blend._orders) == MAX_ORDERS


def test_many_changes_kept_are_searched_by_halves() -> None:
    """10**5 changes that nobody forgot: taking looks at the last, and any other position at some 17 of them."""
    blend = Blend([1000, 1000], [1, 1], 1)
    segment = blend.segment_at(0).to_json()
    weights = [[0.25, 0.75], [0.75, 0.25]]
    state = blend.state_dict()
    state["segments"] = [
        {**segment, "start": 4 * number, "weights": weights[number % 2], "counts": [2 * number, 2 * number]}
        for number in range(10**5)
    ]
    blend = Blend.from_state_dict({**state, "position": 0})
    segments = CountedList(blend._segments)
    blend._segments = segments
    for position in (0, 17, 200_001, 399_990, 10**6):
        CountedList.reads = 0
        domain, _ = blend.window(position, 4)
        assert CountedList.reads < 60
        assert domain.size == 4
    CountedList.reads = 0
    assert blend.set_weights([1, 2], at=10**6)
    assert CountedList.reads < 60
