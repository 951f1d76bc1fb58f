"""Independent draws: those of exact arithmetic, with the weights as probabilities, independent over positions and
seeds; and the work done for them. That cuts, windows and resumes change nothing is tested in test_blend_state.py."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from megamix.data import Blend
from megamix.data.blend import iid
from megamix.data.blend.iid import RECENT, STRIDE, Draws
from megamix.data.blend.segment import Segment

WORD = 2**64 - 1


def reference_hash(*words: int) -> int:
    """`hash_words` in Python integers."""
    state = 0
    for word in words:
        state = mixed(((state + 0x9E3779B97F4A7C15) & WORD) ^ word)
    return state


def mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def reference_draws(seed: int, weights: Sequence[float], start: int, number: int) -> list[int]:
    """The domains of ``number`` positions from ``start`` on, for weights that sum to 1."""
    stream = reference_hash(seed, 0x64726177, 0)
    bounds = list(itertools.accumulate(Fraction(weight) * 2**53 for weight in weights))
    drawn = []
    for position in range(start, start + number):
        value = mixed((stream + position * 0x9E3779B97F4A7C15) & WORD) >> 11
        drawn.append(bisect.bisect_right(bounds, value))
        # So far from the bounds that rounding these to whole numbers makes no difference.
        assert min(abs(bound - value) for bound in bounds[max(0, drawn[-1] - 1) : drawn[-1] + 1]) > 64
    return drawn


@pytest.mark.parametrize("start", [0, 1000, 10**12])
@pytest.mark.parametrize("num_domains", [1, 2, 22, 300])
def test_draws_in_exact_arithmetic(num_domains: int, start: int) -> None:
    """Opened far along, with some weights 0 or tiny; ordinals count the draws of a domain."""
    rng = np.random.default_rng(num_domains)
    weights = rng.dirichlet(np.full(num_domains, 0.5)) + 0.01
    weights[rng.random(num_domains) < 0.3] *= rng.choice([0.0, 1e-9])
    weights[rng.integers(num_domains)] += 1.0
    weights /= weights.sum()
    zeros = np.zeros(num_domains)
    blend = Blend.from_segment(
        [10**9] * num_domains, Segment(start, weights, zeros, zeros.astype(int)), 7, sampling="iid"
    )
    domain, sample = blend.take(500)
    assert domain.tolist() == reference_draws(7, weights.tolist(), start, 500)
    assert blend.counts.tolist() == np.bincount(domain, minlength=num_domains).tolist()
    # The samples within a domain are those that a blend of any other order gives.
    other = Blend([10**9] * num_domains, np.ones(num_domains), 7)
    others, places = other.take(500 * num_domains)
    for number in range(num_domains):
        mine = sample[domain == number].tolist()
        assert mine == places[others == number].tolist()[: len(mine)]


@pytest.mark.parametrize(
    ("weights", "first", "last"),
    [
        ([0.0, 0.5, 0.5, 0.0], 1, 2),
        ([1.0, 1e-300], 0, 0),
        ([1e-9, 1.0, 1e-9, 0.0], 0, 2),
        ([1, 1, 1], 0, 2),
        ([2], 0, 0),
    ],
)
def test_the_outermost_numbers(weights: list[float], first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest number draws the first domain of weight above 0, the highest the last, never one of weight 0."""
    for word, expected in ((0, first), (WORD, last)):
        monkeypatch.setattr(iid, "mix64", lambda value, word=word: np.full(value.shape, word, np.uint64))
        domain, _ = Blend([5] * len(weights), weights, 1, sampling="iid").take(3)
        assert domain.tolist() == [expected] * 3


def domains(seed: int, weights: Sequence[float], number: int) -> NDArray[np.int64]:
    return Draws(seed, 0, np.array(weights)).window(0, number)[0]


def p_value(observed: NDArray[np.int64], expected: NDArray[np.float64], degrees: int) -> float:
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), degrees))


WEIGHTS = np.array([0.4, 0.3, 0.15, 0.1, 0.049, 0.001])


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_chance(seed: int) -> None:
    number = 10**6
    counts = Draws(seed, 0, WEIGHTS).counts_at(number)
    assert 1e-3 < p_value(counts, number * WEIGHTS, WEIGHTS.size - 1) < 1 - 1e-3
    assert np.array_equal(counts, np.bincount(domains(seed, WEIGHTS.tolist(), number)))


@pytest.mark.parametrize("apart", [1, 2, 480, "seed"])
def test_pairs_are_independent(apart: int | str) -> None:
    """Of positions one, two or a batch apart, and of one position under seeds one apart."""
    number = 10**6
    one = domains(5, WEIGHTS.tolist(), number)
    other = domains(6, WEIGHTS.tolist(), number) if isinstance(apart, str) else np.roll(one, apart)
    table = np.bincount(one * WEIGHTS.size + other, minlength=WEIGHTS.size**2).reshape(WEIGHTS.size, -1)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / number
    assert 1e-3 < p_value(table, expected, (WEIGHTS.size - 1) ** 2) < 1 - 1e-3


def test_counts_stray_over_seeds_as_binomials_do() -> None:
    """Mean and variance of a domain's count in 1000 positions, over 2000 seeds; a low-discrepancy order would have
    next to no variance."""
    number, seeds = 1000, 2000
    counts = np.array([Draws(seed, 0, WEIGHTS).counts_at(number) for seed in range(seeds)])
    spread = number * WEIGHTS * (1 - WEIGHTS)
    scores = (counts.mean(axis=0) - number * WEIGHTS) / np.sqrt(spread / seeds)
    assert np.abs(scores).max() < 4
    ratio = counts.var(axis=0) / spread
    assert np.abs(ratio - 1).max() < 0.15


def test_each_sample_once_per_epoch() -> None:
    blend = Blend([11, 300, 4], [0.2, 0.7, 0.1], 3, sampling="iid")
    domain, sample = blend.take(4000)
    for number, size in enumerate(blend.num_samples.tolist()):
        mine = sample[domain == number]
        for start in range(0, mine.size - size, size):
            assert np.unique(mine[start : start + size]).tolist() == list(range(size))


def test_what_was_taken_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work, in positions drawn: none beyond those taken; none at the ends of the last takes; at most `STRIDE` anywhere
    in the past; none when resumed. The marks that make it so stay few."""
    drawn = 0
    original = Draws._drawn

    def counted(self: Draws, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        nonlocal drawn
        drawn += stop - start
        return original(self, start, stop)

    monkeypatch.setattr(Draws, "_drawn", counted)
    blend = Blend([1000] * 6, WEIGHTS, 1, sampling="iid")
    size, takes = 10**5, 45
    ends = {}
    for _ in range(takes):
        blend.take(size)
        ends[blend.position] = blend.counts.tolist()
    assert drawn == takes * size
    for position in list(ends)[-RECENT:]:
        assert blend.counts_at(position).tolist() == ends[position]
    assert drawn == takes * size
    state = blend.state_dict(at=(takes - 2) * size)
    resumed = Blend.from_state_dict(state)
    resumed.take(2 * size)
    assert resumed.counts.tolist() == blend.counts.tolist()
    assert drawn == (takes + 2) * size
    fine = Draws(1, 0, WEIGHTS)
    for start in range(0, 3 * STRIDE, STRIDE // 128):
        fine.window(start, start + STRIDE // 128)
    drawn = 0
    fine.counts_at(STRIDE + 77)
    assert drawn <= STRIDE
    assert len(fine._marks) <= RECENT + 5


def test_counting_far_ahead_agrees_with_going_there() -> None:
    """Across marks that a walk leaves behind, in any order."""
    draws, number = Draws(2, 10**9, WEIGHTS), 2 * STRIDE + 12345
    ahead = draws.counts_at(number)
    domain, ordinal = Draws(2, 10**9, WEIGHTS).window(0, number)
    assert ahead.tolist() == np.bincount(domain).tolist()
    for position in (STRIDE + 5, 17, 2 * STRIDE - 1, STRIDE):
        assert draws.counts_at(position).tolist() == np.bincount(domain[:position], minlength=6).tolist()
        late = draws.window(position, position + 50)
        assert np.array_equal(late, (domain[position : position + 50], ordinal[position : position + 50]))
