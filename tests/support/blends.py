"""Blends to test, and runs of changing weights to take them through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from megamix.data import Blend
from megamix.data.blend.blend import Sampling

Change = tuple[int, list[float]]  # samples to take, then the weights from there on

FEW = settings(max_examples=60, deadline=None)
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)
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


def make(
    num_domains: int, weights: Sequence[float], size: int = 10**6, sampling: Sampling = "low_discrepancy"
) -> Blend:
    return Blend([size] * num_domains, weights, seed=7, sampling=sampling)


def pairs(window: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(window[0].tolist(), window[1].tolist(), strict=True))


def follow(
    run: list[Change], size: int = 10**6, sampling: Sampling = "low_discrepancy"
) -> tuple[Blend, list[tuple[int, int]], list[tuple[int, list[float]]]]:
    """Takes ``run``; returns the blend, all it gave, and the stretches with the weights as the blend holds them."""
    blend = make(len(run[0][1]), run[0][1], size, sampling)
    taken, stretches = [], []
    for length, weights in run:
        blend.set_weights(weights)
        taken += pairs(blend.take(length))
        stretches.append((length, blend.ledger[-1][1]))
    return blend, taken, stretches


def assert_near_the_weights(deficits: np.ndarray, tolerance: float = 1e-6) -> None:
    """No k of K domains lag by more than k (K - k)/2 together: what `megamix.data.blend.order` proves. So none is more
    than (K - 1)/2 off."""
    number = np.arange(1, deficits.size + 1)
    assert (np.sort(deficits)[::-1].cumsum() <= number * (deficits.size - number) / 2 + tolerance).all()
    assert np.abs(deficits).max() <= (deficits.size - 1) / 2 + tolerance
