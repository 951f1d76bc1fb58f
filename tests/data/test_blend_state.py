"""A blend in use: cut, jumped into, resumed or made to forget, it gives the same samples; weights change where they
may, and bad ones are refused."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from blends import FEW, SAMPLINGS, Change, follow, make, pairs, random_weights, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from megamix.core.errors import InputError
from megamix.data import Blend
from megamix.data.blend.blend import Sampling
from megamix.data.blend.segment import Segment


@FEW
@given(runs(), st.sampled_from(SAMPLINGS), st.data())
def test_cuts_and_windows_change_nothing(run: list[Change], sampling: Sampling, data: st.DataObject) -> None:
    """Announced changes ahead or made in passing, cut anywhere, or read by `window` in any order: the same samples."""
    _, taken, _ = follow(run, 37, sampling)
    blend, at = make(len(run[0][1]), run[0][1], 37, sampling), 0
    for length, weights in run:
        blend.set_weights(weights, at=at)
        at += length
    cuts = sorted({0, at, *data.draw(st.lists(st.integers(0, at), max_size=6))})
    spans = list(itertools.pairwise(cuts))
    for start, stop in data.draw(st.permutations(spans)):
        assert pairs(blend.window(start, stop - start)) == taken[start:stop]
        counts = np.bincount([domain for domain, _ in taken[:stop]], minlength=blend.num_domains)
        assert blend.counts_at(stop).tolist() == counts.tolist()
    assert blend.position == 0
    assert [pair for start, stop in spans for pair in pairs(blend.take(stop - start))] == taken
    assert blend.position == at
    assert blend.counts.tolist() == blend.counts_at(at).tolist()


@pytest.mark.parametrize("position", [10**6, 10**8, 10**10])
@pytest.mark.parametrize("seed", range(4))
def test_jump(position: int, seed: int) -> None:
    """A far position is opened without walking there, and holds what sorting the due times around it says."""
    rng = np.random.default_rng(seed)
    weights = random_weights(rng, [2, 6, 22, 300][seed])
    blend = make(len(weights), weights)
    blend = Blend.from_state_dict(blend.state_dict(at=position))
    held: list[float] = blend.weights.tolist()
    low = [max(0, int(weight * position) - 60) if weight else 0 for weight in held]
    high = [int(weight * position) + 60 if weight else 0 for weight in held]
    due = sorted(
        ((j + 0.5) / held[domain], domain, j) for domain in range(len(held)) for j in range(low[domain], high[domain])
    )
    skip = position - 15 - sum(low)
    expected = [(domain, j) for _, domain, j in due[skip : skip + 40]]
    domain, sample = blend.window(position - 15, 40)
    assert domain.tolist() == [domain for domain, _ in expected]
    counts = blend.counts_at(position)
    assert blend.counts.tolist() == counts.tolist()
    assert counts.sum() == position
    for number, j in expected[15:]:
        assert j >= counts[number]
    assert np.abs(counts - np.array(held) * position).max() <= 1 + 1e-5
    assert pairs(blend.take(25)) == list(zip(domain[15:].tolist(), sample[15:].tolist(), strict=True))
    # A change there keeps the counts, and its own future is as near to the weights.
    blend.set_weights([weight + 1e-3 for weight in weights])
    blend.set_weights(weights, at=2 * position)
    assert np.abs(blend.counts_at(2 * position) - np.array(blend._segments[-1].counts)).max() == 0
    assert np.abs(blend._segments[-1].deficits).max() < 2


@FEW
@given(runs(), st.sampled_from(SAMPLINGS), st.data())
def test_state_continues_exactly(run: list[Change], sampling: Sampling, data: st.DataObject) -> None:
    """Through JSON, at any retained position, with changes announced ahead, before or after forgetting the past."""
    total = sum(length for length, _ in run)
    blend, at = make(len(run[0][1]), run[0][1], 11, sampling), 0
    for length, weights in run:
        blend.set_weights(weights, at=at)
        at += length
    whole = pairs(blend.window(0, total + 30))
    blend.take(data.draw(st.integers(0, total)))
    at = data.draw(st.integers(0, blend.position))
    if data.draw(st.booleans()):
        blend.forget_before(at)
    states = [(blend.position, blend.state_dict()), (at, blend.state_dict(at=at))]
    for position, state in states:
        resumed = Blend.from_state_dict(json.loads(json.dumps(state)))
        assert resumed.position == position
        assert resumed.state_dict() == state
        assert resumed.counts.tolist() == blend.counts_at(position).tolist()
        assert resumed.ledger == [entry for entry in blend.ledger if entry in resumed.ledger]
        assert pairs(resumed.take(total + 30 - position)) == whole[position:]
        segment = Segment.from_json(json.loads(json.dumps(blend.segment_at(position).to_json())))
        opened = Blend.from_segment(blend.num_samples, segment, blend.seed, sampling=sampling)
        assert opened.position == segment.start
        assert opened.counts.tolist() == segment.counts.tolist()
        end = min([start for start, _ in blend.ledger if start > position], default=total + 30)
        assert pairs(opened.window(position, end - position)) == whole[position:end]
        resumed.set_weights(run[0][1][::-1] if any(run[0][1]) else run[0][1])
        same = Blend.from_state_dict(resumed.state_dict())
        assert pairs(same.take(20)) == pairs(resumed.take(20))
    assert pairs(blend.take(total + 30 - blend.position)) == whole[states[0][0] :]


def test_forgetting_keeps_what_follows() -> None:
    blend, whole = make(3, [1, 2, 3]), make(3, [1, 2, 3])
    for number in range(10):
        for one in (blend, whole):
            one.set_weights([1, number, 2 * number % 5])
            one.take(10)
    whole.set_weights([3, 2, 1], at=120)
    blend.set_weights([3, 2, 1], at=120)
    blend.forget_before(75)
    assert blend.ledger == [entry for entry in whole.ledger if entry[0] >= 70]
    assert blend.state_dict(at=75) == whole.state_dict(at=75)
    for call in (lambda: blend.window(69, 1), lambda: blend.counts_at(69), lambda: blend.state_dict(at=69)):
        with pytest.raises(InputError, match="position 69 lies before 70"):
            call()
    blend.forget_before(3)  # long gone
    assert blend.ledger[0][0] == 70
    blend.forget_before(10**6)
    assert [start for start, _ in blend.ledger] == [90, 120]
    assert pairs(blend.take(60)) == pairs(whole.take(60))
    assert blend.counts.tolist() == whole.counts.tolist()


def test_where_weights_may_change() -> None:
    """At the position, ahead, again at the same place; not before it, nor before a change that was announced."""
    blend = make(2, [1, 3])
    assert blend.ledger == [(0, [0.25, 0.75])]
    blend.take(10)
    assert blend.set_weights([1, 1])
    assert blend.set_weights([3, 1])
    assert not blend.set_weights([0.75, 0.25])
    assert not blend.set_weights(blend.weights)
    assert blend.set_weights([1, 4], at=25)
    assert blend.ledger == [(0, [0.25, 0.75]), (10, [0.75, 0.25]), (25, [0.2, 0.8])]
    assert blend.weights.tolist() == [0.75, 0.25]
    with pytest.raises(InputError, match="position 9: the blend already stands at 10"):
        blend.set_weights([1, 1], at=9)
    with pytest.raises(InputError, match="position 24: a change at 25 was made before"):
        blend.set_weights([1, 1], at=24)
    with pytest.raises(InputError, match="position 10: a change at 25"):
        blend.set_weights([1, 1])
    blend.take(15)
    assert blend.weights.tolist() == [0.2, 0.8]


def test_only_the_last_change_at_a_position_counts() -> None:
    """Made there or announced: the others leave no trace, and the deficits before them stay."""
    for ahead in (0, 4):
        blend, once = make(3, [0.5, 0.3, 0.2]), make(3, [0.5, 0.3, 0.2])
        for one in (blend, once):
            one.take(7)
        for weights in ([0.0, 0.0, 1.0], [1.0, 1e-9, 0.0], [0.2, 0.2, 0.6]):
            assert blend.set_weights(weights, at=7 + ahead)
        once.set_weights([0.2, 0.2, 0.6], at=7 + ahead)
        assert blend.state_dict() == once.state_dict()
        assert np.abs(blend.state_dict()["segments"][-1]["deficits"]).max() > 0.05
        assert pairs(blend.take(50)) == pairs(once.take(50))


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_weights_read_back_are_no_change(weights: list[float]) -> None:
    """Normalising again would move the last bit and enter a change in the ledger at every step."""
    blend = make(len(weights), weights)
    assert math.isclose(math.fsum(blend.weights), 1.0, rel_tol=1e-12)
    assert np.allclose(blend.weights, np.array(weights) / math.fsum(weights), rtol=1e-12, atol=0)
    blend.take(3)
    assert not blend.set_weights(blend.weights)
    assert len(blend.ledger) == 1


def test_arrays_stay_the_callers() -> None:
    """Neither changing what was given nor what was returned reaches the blend."""
    weights, sizes = np.array([0.5, 0.5]), np.array([10, 10])
    blend, other = Blend(sizes, weights, 1), Blend([10, 10], [0.5, 0.5], 1)
    weights[:], sizes[:] = [1.0, 0.0], 1
    blend.counts[:] = 5
    blend.weights[:] = 0
    assert pairs(blend.take(30)) == pairs(other.take(30))
    assert blend.counts.tolist() == [15, 15]
    assert blend.epochs.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, math.nan, 0.5], "weight of domain 1 is nan"),
        ([0.5, 0.7, -0.2], r"weight of domain 2 is -0\.2"),
        ([math.inf, 0.7, 0.2], "weight of domain 0 is inf"),
        ([0.5, 0.5], r"shape \(2,\), expected \[3\]"),
        ([[0.5, 0.5, 0.0]], r"shape \(1, 3\), expected \[3\]"),
        ([0.0, 0.0, 0.0], "weights of all 3 domains are 0"),
    ],
)
def test_bad_weights(weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(3, weights)
    blend = make(3, [1, 1, 2])
    with pytest.raises(InputError, match=message):
        blend.set_weights(weights)
    assert blend.ledger == [(0, [0.25, 0.25, 0.5])]


def test_bad_segments() -> None:
    """Of other lengths than each other, or than the domains."""
    good = make(3, [1, 1, 2]).segment_at(0).to_json()
    with pytest.raises(InputError, match=r"position 0 has .*\(3,\), \(3,\), \(2,\)"):
        Segment.from_json({**good, "counts": [0, 0]})
    with pytest.raises(InputError, match=r"shape \(3,\), expected \[2\]"):
        Blend.from_segment([5, 5], Segment.from_json(good), seed=7)


def test_extreme_weights_are_normalised() -> None:
    assert make(2, [1e308, 1e308]).weights.tolist() == [0.5, 0.5]
    assert make(2, [5e-324, 5e-324]).weights.tolist() == [0.5, 0.5]


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="domain 1 has 0 samples"):
        Blend([4, 0], [1, 1], seed=0)
    with pytest.raises(InputError, match=f"domain 0 has {2**52 + 1} samples"):
        Blend([2**52 + 1], [1], seed=0)
    with pytest.raises(InputError, match=r"num_samples has shape \(0,\)"):
        Blend([], [], seed=0)
    with pytest.raises(InputError, match=r"2 different integers, got \[3, 3\]"):
        Blend([4, 4], [1, 1], seed=0, domain_keys=[3, 3])
    with pytest.raises(InputError, match="sampling is 'random', expected one of low_discrepancy, iid"):
        Blend([4], [1], seed=0, sampling="random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot take -1"):
        make(1, [1]).take(-1)
    with pytest.raises(InputError, match="position -1 lies before 0"):
        make(1, [1]).window(-1, 2)
