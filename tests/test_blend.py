"""The blend against an exact reference: order, cuts, weight changes, epochs, deviation, state."""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamix.data import Blend
from megamix.errors import InputError

Change = tuple[int, list[float]]  # samples to take, then the weights from there on

FEW = settings(max_examples=60, deadline=None)
WEIGHT = st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.0, 1e-9, 1e-300, 0.25, 1.0]))


def some_weights(num_domains: int) -> st.SearchStrategy[list[float]]:
    return st.lists(WEIGHT, min_size=num_domains, max_size=num_domains).filter(any)


@st.composite
def runs(draw: st.DrawFn, max_domains: int = 6, max_length: int = 60, max_changes: int = 8) -> list[Change]:
    """A run as (samples, weights in effect for them) stretches."""
    num_domains = draw(st.integers(1, max_domains))
    one = st.tuples(st.integers(0, max_length), some_weights(num_domains))
    return draw(st.lists(one, min_size=1, max_size=max_changes))


def random_weights(rng: np.random.Generator, num_domains: int) -> list[float]:
    """Continuous, so that exact arithmetic and floats agree on the order; some are 0 or 1e-9."""
    kind = rng.choice(4, num_domains, p=[0.6, 0.2, 0.1, 0.1])
    values = [rng.random(num_domains), rng.random(num_domains) ** 8, np.zeros(num_domains), np.full(num_domains, 1e-9)]
    weights = np.choose(kind, np.stack(values))
    weights[rng.integers(num_domains)] = 0.1 + rng.random()
    return weights.tolist()


def make(num_domains: int, weights: Sequence[float], size: int = 10**6) -> Blend:
    return Blend([size] * num_domains, weights, seed=7)


def pairs(window: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(window[0].tolist(), window[1].tolist(), strict=True))


class Reference:
    """The order of one segment in exact arithmetic, domain after domain joining as `megamix.data.schedule` says."""

    def __init__(self, weights: Sequence[float], deficits: Sequence[Any]) -> None:
        lines = {i: (Fraction(d), Fraction(w)) for i, (d, w) in enumerate(zip(deficits, weights, strict=True)) if w > 0}
        self.lines, waiting = lines, dict(lines)
        self.joined: dict[int, int] = {}  # the first phase that a domain takes part in
        self.phases: list[tuple[Fraction, Fraction, Fraction]] = []  # start, and L = level - fall * s
        level, fall = max(d for d, _ in lines.values()), Fraction(0)
        while waiting:
            joins = {i: (level - d) / (w + fall) for i, (d, w) in waiting.items()}
            first = min(joins, key=lambda i: joins[i])
            self.joined[first] = len(self.joined)
            del waiting[first]
            level = sum((lines[i][0] for i in self.joined), Fraction(0)) / len(self.joined)
            fall = sum((w for _, w in waiting.values()), Fraction(0)) / len(self.joined)
            self.phases.append((joins[first], level, fall))

    def due(self, domain: int, ordinal: int) -> Fraction:
        """When the domain's line, lowered by the samples it has given, meets L."""
        deficit, weight = self.lines[domain]
        ends = [start for start, _, _ in self.phases[1:]] + [math.inf]
        for index in range(self.joined[domain], len(self.phases)):
            _, level, fall = self.phases[index]
            time = (ordinal + Fraction(1, 2) - deficit + level) / (weight + fall)
            if time <= ends[index]:
                return time
        raise AssertionError("the last phase has no end")

    def amount(self, domain: int, time: Fraction) -> Fraction:
        """What the domain would have given by then if samples could be split; below 0 while it waits."""
        deficit, weight = self.lines[domain]
        return deficit + weight * time - max(level - fall * time for _, level, fall in self.phases)

    def order(self, number: int) -> list[tuple[Fraction, int]]:
        """(due, domain) of the first ``number`` samples."""
        nexts = [(self.due(i, 0), i, 0) for i in self.lines]
        heapq.heapify(nexts)
        result = []
        for _ in range(number):
            time, domain, ordinal = nexts[0]
            result.append((time, domain))
            heapq.heapreplace(nexts, (self.due(domain, ordinal + 1), domain, ordinal + 1))
        return result


def follow(run: list[Change], size: int = 10**6) -> tuple[Blend, list[tuple[int, int]], list[tuple[int, list[float]]]]:
    """Takes ``run``; returns the blend, all it gave, and the stretches with the weights as the blend holds them."""
    blend = make(len(run[0][1]), run[0][1], size)
    taken, stretches = [], []
    for length, weights in run:
        blend.set_weights(weights)
        taken += pairs(blend.take(length))
        stretches.append((length, blend.ledger[-1][1]))
    return blend, taken, stretches


@FEW
@given(runs())
def test_order_is_that_of_all_due_times_sorted(run: list[Change]) -> None:
    """Up to rounding: the sample at every position is due just then, give or take 1e-9 samples."""
    blend, taken, stretches = follow(run)
    assert [sample for sample, _ in stretches] == [length for length, _ in run]
    for segment, end in zip(blend._segments, [*(start for start, _ in blend.ledger[1:]), blend.position], strict=True):
        reference = Reference(segment.weights.tolist(), segment.deficits.tolist())
        given = [0] * blend.num_domains
        expected = reference.order(end - segment.start)
        for (time, _), (domain, _) in zip(expected, taken[segment.start : end], strict=True):
            assert abs(reference.amount(domain, time) - given[domain] - Fraction(1, 2)) <= 1e-9
            given[domain] += 1
    assert blend.position == sum(length for length, _ in run)
    assert blend.counts.tolist() == np.bincount([d for d, _ in taken], minlength=blend.num_domains).tolist()


@pytest.mark.parametrize("num_domains", [1, 2, 3, 4, 5, 6])
def test_order_in_exact_arithmetic(num_domains: int) -> None:
    rng = np.random.default_rng(num_domains)
    for _ in range(6):
        run = [(int(rng.integers(1, 40)), random_weights(rng, num_domains)) for _ in range(6)]
        _, taken, stretches = follow(run)
        deficits, expected = [Fraction(0)] * num_domains, []
        for length, weights in stretches:
            order = [domain for _, domain in Reference(weights, deficits).order(length)]
            expected += order
            deficits = [
                d + Fraction(w) * length - order.count(i)
                for i, (d, w) in enumerate(zip(deficits, weights, strict=True))
            ]
        assert [domain for domain, _ in taken] == expected


def test_equal_due_times_go_by_domain() -> None:
    blend = make(4, [0.25, 0.25, 0.5, 0.0])
    assert blend.take(8)[0].tolist() == [2, 0, 1, 2, 2, 0, 1, 2]
    # Deficits of half a sample in domain 1, owed by domain 0; both weights then the same.
    blend = make(2, [0.5, 0.5])
    blend.take(1)
    assert blend.deficits.tolist() == [-0.5, 0.5]
    assert blend.take(4)[0].tolist() == [1, 0, 1, 0]


@FEW
@given(runs(), st.data())
def test_cuts_and_windows_change_nothing(run: list[Change], data: st.DataObject) -> None:
    """Announced changes ahead or made in passing, cut anywhere, or read by `window` in any order: the same samples."""
    _, taken, _ = follow(run, size=37)
    blend, at = make(len(run[0][1]), run[0][1], 37), 0
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
@given(st.integers(1, 300), st.integers(0, 2**32), st.sampled_from([1, 7, 100]), st.booleans())
def test_each_sample_once_per_epoch_and_counts_near_the_weights(
    num_domains: int, seed: int, length: int, sparse: bool
) -> None:
    """Random changes at every step. The realised counts stay within (K - 1)/2 samples of the integral of the weights,
    and a domain of weight 0 is not read."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, num_domains)
    blend = Blend(sizes, rng.random(num_domains) + 1e-3, seed=seed)
    domains, samples = [], []
    for _ in range(40):
        weights = rng.random(num_domains) * (rng.random(num_domains) < (0.3 if sparse else 1.0))
        weights[rng.integers(num_domains)] += 1.0
        blend.set_weights(weights)
        domain, sample = blend.take(int(rng.integers(1, length + 1)))
        assert not (weights[domain] == 0).any()
        domains.append(domain)
        samples.append(sample)
        assert_near_the_weights(blend.deficits)
    assert np.allclose(blend.deficits, integral(blend) - blend.counts, rtol=0, atol=1e-8)
    domain, sample = np.concatenate(domains), np.concatenate(samples)
    for number, size in enumerate(sizes.tolist()):
        mine = sample[domain == number]
        for start in range(0, mine.size, size):
            epoch = mine[start : start + size]
            assert np.unique(epoch).size == epoch.size
            assert 0 <= epoch.min() <= epoch.max() < size


def integral(blend: Blend) -> np.ndarray:
    """Each weight summed over the positions so far, from the ledger."""
    ledger = [change for change in blend.ledger if change[0] < blend.position]
    ends = [start for start, _ in ledger[1:]] + [blend.position]
    pieces = [np.array(w) * (end - start) for (start, w), end in zip(ledger, ends, strict=True)]
    return functools.reduce(np.add, pieces, np.zeros(blend.num_domains))


def assert_near_the_weights(deficits: np.ndarray) -> None:
    """No k of K domains lag by more than k (K - k)/2 together: what `megamix.data.schedule` proves. So none is more
    than (K - 1)/2 off."""
    number = np.arange(1, deficits.size + 1)
    assert (np.sort(deficits)[::-1].cumsum() <= number * (deficits.size - number) / 2 + 1e-6).all()
    assert np.abs(deficits).max() <= (deficits.size - 1) / 2 + 1e-6


def lead(blend: Blend, weights: list[float], length: int) -> None:
    """Takes ``length`` samples with these weights, looks at the deviation along the way, and forgets the past."""
    blend.set_weights(weights)
    domain, _ = blend.take(length)
    assert not (np.array(weights)[domain] == 0).any()
    assert_near_the_weights(blend.deficits)
    blend.forget_before(blend.position)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(2, 6))
def test_no_cycle_of_weights_drives_the_counts_away(data: st.DataObject, num_domains: int) -> None:
    """The same few changes over and over: what a rule gives away in one cycle it would lose in every one."""
    stretch = st.tuples(some_weights(num_domains), st.one_of(st.integers(1, 5), st.integers(1, 5000)))
    cycle = data.draw(st.lists(stretch, min_size=2, max_size=4))
    blend = make(num_domains, cycle[0][0])
    for _ in range(120):
        for weights, length in cycle:
            lead(blend, weights, length)


def test_no_adversary_drives_the_counts_away() -> None:
    """One that looks at the deficits: domain 2 gathers a debt at the cost of 1, and collects it from 0. Due times at
    which those in debt wait, and the others share their turns by weight, part 0 and 1 by 0.47 samples a cycle."""
    blend = make(3, [0.0, 0.999, 0.001])
    for _ in range(300):
        for _ in range(20):
            if blend.deficits[2] <= 0.45:
                lead(blend, [0.0, 0.999, 0.001], 49)
        for _ in range(20):
            if blend.deficits[2] >= 0.05:
                lead(blend, [0.99, 0.0, 0.01], 7)


@pytest.mark.parametrize("num_domains", [2, 3, 6, 12])
def test_bound_is_reached(num_domains: int) -> None:
    """One sample at a time to the two domains whose deficits are nearest, just enough weight on the first that the
    second is served: they part to one sample, as far as possible, and so in the end do all neighbours."""
    blend = make(num_domains, [1.0] * num_domains)
    for _ in range(4 * num_domains**3):
        deficits = blend.deficits
        order = np.argsort(deficits, kind="stable")
        low = int(np.argmin(np.round(np.diff(deficits[order]), 6)))
        gap = deficits[order[low + 1]] - deficits[order[low]]
        weights = np.zeros(num_domains)
        weights[order[low + 1]] = (1 - gap) / 2 - 1e-9
        weights[order[low]] = 1 - weights[order[low + 1]]
        lead(blend, weights.tolist(), 1)
        if np.abs(blend.deficits).max() > 0.98 * (num_domains - 1) / 2:
            return
    raise AssertionError(f"no deficit above {np.abs(blend.deficits).max()}")


@FEW
@given(runs(), st.data())
def test_state_continues_exactly(run: list[Change], data: st.DataObject) -> None:
    """Through JSON, at any retained position, with changes announced ahead, before or after forgetting the past."""
    total = sum(length for length, _ in run)
    blend, at = make(len(run[0][1]), run[0][1], 11), 0
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


def test_order_within_a_domain_follows_seed_key_and_epoch() -> None:
    """A domain's own order is the same whatever else is in the blend, by its key; another seed, key or epoch is another
    order."""

    def order(sizes: list[int], keys: list[int], weights: list[float], key: int, seed: int = 1) -> list[int]:
        domain, sample = Blend(sizes, weights, seed, domain_keys=keys).take(3000)
        return sample[domain == keys.index(key)].tolist()[:200]

    alone = order([100], [2**63 + 5], [1], 2**63 + 5)
    assert order([7, 100, 100], [3, 2**63 + 5, -4], [1, 0.5, 2], 2**63 + 5) == alone
    assert sorted(alone[:100]) == sorted(alone[100:]) == list(range(100))
    others = [
        alone[100:],
        order([7, 100, 100], [3, 2**63 + 5, -4], [1, 0.5, 2], -4)[:100],
        order([100], [2**63 + 5], [1], 2**63 + 5, seed=2)[:100],
        list(range(100)),
    ]
    for other in others:
        assert sum(a == b for a, b in zip(alone, other, strict=False)) < 10


def test_golden_order() -> None:
    """Pinned (computed with Fractions and Python integers), so that no later version reorders runs in silence."""
    blend = Blend([100, 7, 1000], [0.5, 0.2, 0.3], seed=1234)
    first = pairs(blend.take(8))
    blend.set_weights([0.1, 0.8, 0.1])
    assert (first, pairs(blend.take(8))) == (
        [(0, 53), (2, 702), (1, 0), (0, 77), (0, 74), (2, 820), (0, 27), (1, 5)],
        [(2, 855), (1, 3), (1, 6), (1, 4), (1, 1), (0, 91), (1, 2), (1, 2)],
    )


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


def test_extreme_weights_are_normalised() -> None:
    assert make(2, [1e308, 1e308]).weights.tolist() == [0.5, 0.5]
    assert make(2, [5e-324, 5e-324]).weights.tolist() == [0.5, 0.5]


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="domain 1 has 0 samples"):
        Blend([4, 0], [1, 1], seed=0)
    with pytest.raises(InputError, match=r"num_samples has shape \(0,\)"):
        Blend([], [], seed=0)
    with pytest.raises(InputError, match=r"2 different integers, got \[3, 3\]"):
        Blend([4, 4], [1, 1], seed=0, domain_keys=[3, 3])
    with pytest.raises(InputError, match="cannot take -1"):
        make(1, [1]).take(-1)
    with pytest.raises(InputError, match="position -1 lies before 0"):
        make(1, [1]).window(-1, 2)
