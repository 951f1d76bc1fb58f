"""Sizes of global batches: which step a position is in, and back, against counting sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from megamix.data.batches import Batches

SIZES = [((0, 4),), ((0, 1),), ((0, 2), (3, 5)), ((0, 7), (1, 3), (4, 8)), ((0, 6), (5, 2))]


@pytest.mark.parametrize("sizes", SIZES)
def test_steps_and_positions_are_those_of_counting(sizes: tuple[tuple[int, int], ...]) -> None:
    batches = Batches(sizes, seq_length=3)
    by_step = [next(size for first, size in reversed(sizes) if step >= first) for step in range(12)]
    owner = [step for step, size in enumerate(by_step) for _ in range(size)]
    starts = [owner.index(step) for step in range(12)]
    assert [batches.size(step) for step in range(12)] == by_step
    assert [batches.position(step) for step in range(12)] == starts
    assert batches.positions(np.arange(12)).tolist() == starts
    assert [batches.step(position) for position in range(len(owner))] == owner
    assert [batches.is_start(position) for position in range(len(owner))] == [p in starts for p in range(len(owner))]
    assert [batches.tokens(step) for step in range(12)] == [3 * start for start in starts]
    assert [batches.tokens_of(step) for step in range(12)] == [3 * size for size in by_step]
    for tokens in range(3 * starts[-1]):
        assert batches.first_step_from(tokens) == next(s for s in range(12) if 3 * starts[s] >= tokens)
        away = [abs(3 * start - tokens) for start in starts]
        assert away[batches.nearest_step(tokens)] == min(away)
    assert batches.tokens_after(2.5) == (batches.tokens(2) + batches.tokens(3)) / 2


def test_large_numbers_are_exact() -> None:
    batches = Batches(((0, 3), (10**11, 10**7)), 2**20)
    step = 10**11 + 12345
    assert batches.position(step) == 3 * 10**11 + 12345 * 10**7
    assert batches.step(batches.position(step)) == step
    assert batches.step(batches.position(step) - 1) == step - 1
    assert batches.tokens(step) == batches.position(step) * 2**20
