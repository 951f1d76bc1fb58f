"""Sizes of global batches: which step a position is in, and back, against counting sample by sample."""

from __future__ import annotations

import numpy as np
import pytest

from megamix.data.batches import Batches

PAST = [(), ((5, 1),), ((5, 2), (1, 4)), ((2, 3), (7, 9))]
SIZES = [((0, 4),), ((0, 1),), ((0, 2), (3, 5)), ((0, 7), (1, 3), (4, 8)), ((0, 6), (5, 2))]


@pytest.mark.parametrize("past", PAST)
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_positions_and_tokens_are_those_of_counting(
    sizes: tuple[tuple[int, int], ...], past: tuple[tuple[int, int], ...]
) -> None:
    batches = Batches(sizes, 3, past)
    by_step = [next(size for first, size in reversed(sizes) if step >= first) for step in range(12)]
    lengths = [next((length for length, end in past if step < end), 3) for step in range(12)]
    owner = [step for step, size in enumerate(by_step) for _ in range(size)]
    starts = [owner.index(step) for step in range(12)]
    before = [sum(lengths[step] for step in owner[:position]) for position in range(len(owner))]
    tokens_of = [size * length for size, length in zip(by_step, lengths, strict=True)]
    assert [batches.size(step) for step in range(12)] == by_step
    assert [batches.length(step) for step in range(12)] == lengths
    assert [batches.position(step) for step in range(12)] == starts
    assert batches.positions(np.arange(12)).tolist() == starts
    assert [batches.step(position) for position in range(len(owner))] == owner
    assert [batches.is_start(position) for position in range(len(owner))] == [p in starts for p in range(len(owner))]
    assert [batches.tokens_at(position) for position in range(len(owner))] == before
    assert [batches.tokens(step) for step in range(12)] == [before[start] for start in starts]
    assert [batches.tokens_of(step) for step in range(12)] == tokens_of
    for tokens in range(before[starts[-1]]):
        assert batches.first_step_from(tokens) == next(s for s in range(12) if before[starts[s]] >= tokens)
        away = [abs(before[start] - tokens) for start in starts]
        assert away[batches.nearest_step(tokens)] == min(away)
    assert batches.tokens_after(2.5) == (batches.tokens(2) + batches.tokens(3)) / 2


@pytest.mark.parametrize("past", PAST)
def test_stages_begin_after_their_tokens_whatever_the_lengths_of_samples(past: tuple[tuple[int, int], ...]) -> None:
    for ends in ((10, 50), (1, 2000), (33, 34)):
        stages, batches = list(zip((2, 4), ends, strict=True)), None
        tokens, sizes = 0, []
        for step in range(400):
            size = next((size for size, end in stages if tokens < end), 8)
            sizes.append(size)
            tokens += size * next((length for length, end in past if step < end), 3)
        if all(size in sizes for size, _ in stages):
            batches = Batches.ramp(stages, 8, 3, past)
            assert [batches.size(step) for step in range(400)] == sizes
        else:
            with pytest.raises(ValueError, match="has no step"):
                Batches.ramp(stages, 8, 3, past)


def test_large_numbers_are_exact() -> None:
    batches = Batches(((0, 3), (10**11, 10**7)), 2**20)
    step = 10**11 + 12345
    assert batches.position(step) == 3 * 10**11 + 12345 * 10**7
    assert batches.step(batches.position(step)) == step
    assert batches.step(batches.position(step) - 1) == step - 1
    assert batches.tokens(step) == batches.position(step) * 2**20
