"""The order within a domain: a bijection for every size, without favourites, the same on every machine."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

from megamix.data.blend.permute import MAX_RANKED, MAX_SIZE, divide, epoch_keys, grid, hash_next, hash_words, permute

Ints = NDArray[np.int64]


def places(index: ArrayLike, size: int, key: ArrayLike) -> Ints:
    """`permute` for one size; ``index`` and ``key`` broadcast."""
    indices, keys = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(key, np.uint64))
    rows, columns = grid(size)
    sizes, all_rows, all_columns = (np.full(indices.size, value, np.int64) for value in (size, rows, columns))
    flat = permute(indices.ravel().copy(), sizes, all_rows, all_columns, keys.ravel().copy())
    return flat.reshape(indices.shape)


def reference_place(index: int, size: int, key: int) -> int:
    """`permute` above `MAX_RANKED`, in Python integers: no float, no wrapping around unseen."""
    word = 2**64 - 1
    square = math.isqrt(size - 1) + 1
    columns = min(range(square, square + min(square // 8, 4096) + 1), key=lambda one: (-size % one, one))
    limits = [-(-size // columns), columns]
    while True:
        halves = list(divmod(index, columns))
        for turn in range(8):
            target = turn % 2
            mixed = (halves[1 - target] + key + turn * 0x9E3779B97F4A7C15) & word
            mixed = (mixed * 0xBF58476D1CE4E5B9) & word
            mixed = ((mixed ^ (mixed >> 32)) * 0x94D049BB133111EB) & word
            halves[target] = (halves[target] + ((mixed >> 32) * limits[target] >> 32)) % limits[target]
        index = halves[0] * columns + halves[1]
        if index < size:
            return index


def keys(number: int, seed: int = 5) -> NDArray[np.uint64]:
    return hash_words(seed, np.arange(number))


def p_value(counts: ArrayLike) -> float:
    """Of the hypothesis that all cells are equally likely."""
    observed = np.asarray(counts, np.float64)
    expected = observed.mean()
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), observed.size - 1))


@pytest.mark.parametrize("first", range(1, 301, 50))
def test_bijection_for_every_size(first: int) -> None:
    for size in range(first, first + 50):
        for key in keys(3, seed=size):
            assert np.array_equal(np.sort(places(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [10**4, 99_991, 2**17, 2**17 + 1])
def test_bijection_for_large_sizes(size: int) -> None:
    assert np.array_equal(np.sort(places(np.arange(size), size, keys(1)[0])), np.arange(size))


@pytest.mark.parametrize("size", [10**6, 10**6 + 3, 2**31 - 1, 10**10 + 19, 10**12, MAX_SIZE])
def test_injective_over_a_sample_of_huge_sizes(size: int) -> None:
    rng = np.random.default_rng(size)
    index = np.unique(np.concatenate([rng.integers(0, size, 10**5), np.arange(10**4), size - 1 - np.arange(10**4)]))
    result = places(index, size, keys(1)[0])
    assert np.unique(result).size == index.size
    assert result.min() >= 0
    assert result.max() < size
    assert 0.49 < result.mean() / size < 0.51


@pytest.mark.parametrize("size", [65, 66, 100, 4099, 10**6 + 3, 2**31 - 1, 10**12, MAX_SIZE - 1, MAX_SIZE])
def test_places_in_exact_integers(size: int) -> None:
    rng = np.random.default_rng(size)
    index = [0, 1, size - 2, size - 1, *rng.integers(0, size, 40).tolist()]
    for key in keys(2, seed=size % 1000).tolist():
        assert places(index, size, key).tolist() == [reference_place(one, size, key) for one in index]


def test_divide_is_exact() -> None:
    """Also just below and at a multiple, where a quotient is nearest to being rounded up."""
    rng = np.random.default_rng(0)
    divisor = np.concatenate([2 ** rng.integers(0, 52, 20000), rng.integers(1, 2**51, 20000)])
    divisor += rng.integers(0, 3, divisor.size)
    multiple = rng.integers(0, 2**52 // divisor, endpoint=True) * divisor
    for dividend in (multiple, np.maximum(multiple - 1, 0)):
        assert np.array_equal(divide(dividend, divisor), dividend // divisor)


@pytest.mark.parametrize("size", [65, 1000, 10**6, 10**6 + 7, 10**10])
def test_grid_is_nearly_square_with_few_cells_to_spare(size: int) -> None:
    """Each cell to spare is a chance that a batch goes through the cipher twice. From 10**6 samples on there are more
    than 100 grids to choose from."""
    rows, columns = grid(size)
    assert 0 <= rows * columns - size < columns
    assert 1 <= columns / rows < 1.5
    if size >= 10**6:
        assert (rows * columns - size) / size < 1e-4


def test_sizes_mixed_in_one_call_as_alone() -> None:
    """A vector of samples of different domains, tiny ones and large ones, is ordered as each domain alone."""
    sizes = [1, 2, 7, MAX_RANKED, MAX_RANKED + 1, 1000, 10**9]
    rng = np.random.default_rng(3)
    which = rng.integers(0, len(sizes), 2000)
    size = np.array(sizes)[which]
    index = rng.integers(0, size)
    grids = np.array([grid(one) for one in sizes])[which]
    key = keys(len(sizes))[which]
    mixed = permute(index, size, grids[:, 0].copy(), grids[:, 1].copy(), key)
    for number, one in enumerate(sizes):
        chosen = which == number
        assert np.array_equal(mixed[chosen], places(index[chosen], one, keys(len(sizes))[number]))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_sizes_favour_no_order(size: int) -> None:
    """Over 20000 keys every one of the size! orders appears, all equally often within chance."""
    orders = places(np.arange(size), size, keys(20000)[:, None])
    code = orders @ (size ** np.arange(size))
    seen, counts = np.unique(code, return_counts=True)
    possible = [np.dot(order, size ** np.arange(size)) for order in itertools.permutations(range(size))]
    assert set(seen.tolist()) == {int(one) for one in possible}
    assert p_value(counts) > 1e-3


@pytest.mark.parametrize("size", [7, 9, 16, 61, 64, 65, 100, 256, 300])
def test_uniform_over_keys(size: int) -> None:
    """Where the first sample lands, and how far apart neighbours in a row and in a column of the grid land."""
    orders = places(np.arange(size), size, keys(120_000 // size)[:, None])
    assert p_value(np.bincount(orders[:, 0], minlength=size)) > 1e-3
    for step in {1, grid(size)[1]}:
        distance = (orders[:, step:] - orders[:, :-step]) % size
        assert p_value(np.bincount(distance.ravel(), minlength=size)[1:]) > 1e-3


@pytest.mark.parametrize("size", [7, 12])
def test_pairs_of_places_are_uniform(size: int) -> None:
    orders = places([0, 1], size, keys(60_000)[:, None])
    counts = np.bincount(orders @ [size, 1], minlength=size * size).reshape(size, size)
    assert not counts.diagonal().any()
    assert p_value(counts[~np.eye(size, dtype=bool)]) > 1e-3


@pytest.mark.parametrize("apart", ["one", "epoch"])
@pytest.mark.parametrize("size", [50, 1000])
def test_keys_give_unrelated_orders(size: int, apart: str) -> None:
    """Keys one or one epoch apart, as different in the order as any: about one fixed point between each two."""
    numbers = np.arange(40)
    some = numbers.astype(np.uint64) if apart == "one" else epoch_keys(keys(1), numbers)
    orders = places(np.arange(size), size, some[:, None])
    same = [(first == second).sum() for first, second in itertools.combinations(orders, 2)]
    assert 0.8 < np.mean(same) < 1.2
    assert max(same) < 10


@pytest.mark.parametrize("size", [10, 65, 100, 1000])
def test_epochs_are_independent(size: int) -> None:
    """Where a sample stands in the next epoch says nothing about where it stood in this one."""
    orders = places(np.arange(size), size, epoch_keys(keys(1), np.arange(400_000 // size))[:, None])
    assert p_value(np.bincount(((orders[1:] - orders[:-1]) % size).ravel(), minlength=size)) > 1e-3
    assert p_value(np.bincount(orders[:, -1], minlength=size)) > 1e-3


def test_golden_places() -> None:
    """Pinned (computed with Python integers), so that another machine or numpy version is seen to disagree."""
    key = hash_words(1234, 0, 0)
    assert int(key) == 14429899377425696178
    assert places(np.arange(10), 10, key).tolist() == [0, 8, 6, 4, 7, 9, 3, 2, 1, 5]
    assert places(np.arange(10), 1000, key).tolist() == [245, 168, 316, 673, 683, 269, 759, 163, 850, 48]
    assert places([0, 1, 10**12 - 1], 10**12, key).tolist() == [378553377567, 158361780895, 981397437819]


def test_hash_words() -> None:
    """Depends on every word and on their order, broadcasts, and can be continued."""
    table = {int(hash_words(*words)) for words in itertools.product(range(-3, 4), repeat=3)}
    assert len(table) == 7**3
    assert np.array_equal(hash_words(7, np.arange(5)), [hash_words(7, number) for number in range(5)])
    assert np.array_equal(hash_next(hash_words(7, 8), np.arange(5)), hash_words(7, 8, np.arange(5)))
    bits = np.unpackbits(hash_words(np.arange(2000)).view(np.uint8).reshape(-1, 8), axis=1)
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 0.06)
