"""The order of a blend: that of an exact reference, each sample once per epoch, and counts that no sequence of weights
drives further from the weights than the proven bound."""

from __future__ import annotations

import functools
import heapq
import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from blends import FEW, Change, assert_near_the_weights, follow, make, pairs, random_weights, runs, some_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from megamix.data import Blend
from megamix.data.blend.order import Order


class Reference:
    """The order of one segment in exact arithmetic, domain after domain joining as `megamix.data.blend.order` says."""

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


@FEW
@given(runs())
def test_order_is_that_of_all_due_times_sorted(run: list[Change]) -> None:
    """Up to rounding: no sample comes before another that is due by then, give or take 1e-9 samples."""
    blend, taken, stretches = follow(run)
    assert [sample for sample, _ in stretches] == [length for length, _ in run]
    for segment, end in zip(blend._segments, [*(start for start, _ in blend.ledger[1:]), blend.position], strict=True):
        reference = Reference(segment.weights.tolist(), segment.deficits.tolist())
        given = [0] * blend.num_domains
        earlier: list[tuple[Fraction, int, int]] = []
        for domain, _ in [*taken[segment.start : end], *((domain, None) for domain in reference.lines)]:
            due = reference.due(domain, given[domain])
            for time, other, ordinal in earlier:
                assert time <= due or reference.amount(other, due) - ordinal >= Fraction(1, 2) - Fraction(1, 10**9)
            if len(earlier) < end - segment.start:  # after these, what would come next of each domain
                earlier.append((due, domain, given[domain]))
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
        [(0, 86), (2, 329), (1, 0), (0, 77), (0, 62), (2, 644), (0, 83), (1, 4)],
        [(2, 150), (1, 2), (1, 1), (1, 3), (1, 6), (0, 26), (1, 5), (1, 2)],
    )


def test_domains_that_are_alike_are_in_order_after_few_rounds() -> None:
    """After a change from weights of a few kinds to equal ones, as at the start of a rule; rounding told them apart."""
    number = 3000
    first = np.arange(number) % 7 + 1.0
    blend = make(number, (first / first.sum()).tolist())
    blend.take(512)
    sorts = 0

    def count(frame: object, event: str, called: object) -> None:
        nonlocal sorts
        sorts += event == "c_call" and getattr(called, "__name__", "") == "argsort"

    deficits = blend.deficits
    sys.setprofile(count)
    try:
        Order(np.full(number, 1 / number), deficits)
    finally:
        sys.setprofile(None)
    assert len(np.unique(deficits.round(9))) < 30
    assert 2 <= sorts < 20  # 415 where each had to keep its place
