"""Keyed bijection of [0, size): the order of samples within a domain, without a stored array.

A generalised Feistel cipher (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). An index is (row,
column) of a nearly square grid of ``rows x columns >= size`` cells; in each round a hash of one coordinate is added to
the other, modulo its range; and an index that lands outside [0, size) goes through again ("cycle walking"; the grid
leaves less than one row of cells outside, and as few as possible). A Feistel cipher of few cells favours some orders
whatever its rounds (on 3 x 3 cells it makes even permutations only), so up to `MAX_RANKED` samples are ordered by the
ranks of their hashes instead. Only integer arithmetic modulo 2**64 and float64 quotients with an exact floor are used,
so that every machine computes the same order.

numpy takes 8 ns for an integer division and less than 1 for any other operation, so nothing here divides integers: a
hash is mapped to [0, rows) as the upper half of 32 of its bits times ``rows`` (Lemire, "Fast Random Integer Generation
in an Interval", 2019; even within rows / 2**32), and a sum below 2 rows by one subtraction.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
MAX_RANKED = 64
_GRIDS = 4096  # to choose from
MAX_SIZE = 2**52  # floors of float64 quotients are exact below
# Arrays of no dimension: numpy takes these 0.3 us faster than its scalars, a third of an operation on a small batch.
GOLDEN, _MULTIPLIER_1, _MULTIPLIER_2, _EPOCH = (
    np.array(number, np.uint64)
    for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1342543DE82EF95)
)
_27, _30, _31, _32 = (np.array(number, np.uint64) for number in (27, 30, 31, 32))


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words that scatters them."""
    value = value ^ (value >> _30)
    value *= _MULTIPLIER_1
    value ^= value >> _27
    value *= _MULTIPLIER_2
    value ^= value >> _31
    return value


def hash_words(*words: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit hash of several integers (arrays broadcast); the order of the words matters."""
    result = np.zeros((), np.uint64)
    for word in words:
        result = hash_next(result, word)
    return result


def hash_next(state: NDArray[np.uint64], word: ArrayLike) -> NDArray[np.uint64]:
    """`hash_words` of the words that gave ``state`` and one more."""
    with np.errstate(over="ignore"):
        return mix64((state + GOLDEN) ^ np.asarray(word).astype(np.uint64))


def grid(size: int) -> tuple[int, int]:
    """The grid (rows, columns) for a domain of ``size`` samples: among some nearly square ones, the one with the fewest
    spare cells, rows * columns - size < columns. A single walking index costs a small batch as much as all others."""
    square = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = square + np.arange(min(square // 8, _GRIDS) + 1)
    best = int(columns[(-size % columns).argmin()])
    return -(-size // best), best


def divide(dividend: NDArray[np.int64], divisor: NDArray[np.int64]) -> NDArray[np.int64]:
    """Floor of the quotient of numbers >= 0 and > 0, each below 2**52. A quotient below a whole number q is at least
    1/divisor below it, which is more than q / 2**53, so it is not rounded up to q."""
    return (dividend / divisor).astype(np.int64)


def epoch_keys(key: NDArray[np.uint64], epoch: NDArray[np.int64]) -> NDArray[np.uint64]:
    """uint64 [n]: keys of a domain's epochs for `permute`, from the domain's key, a hash. Multiples of an odd constant
    keep the rounds of different epochs apart."""
    return key + epoch.view(np.uint64) * _EPOCH


def permute(
    index: NDArray[np.int64],
    size: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    key: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Maps ``index[n]`` in [0, size[n]) to its place under ``key[n]``; for a fixed size and key a bijection.

    Args:
        index, size: int64 [n], an index and the size of its domain, at most `MAX_SIZE`.
        rows, columns: int64 [n], `grid` of that size.
        key: uint64 [n].
    """
    places = _encrypt(index, rows, columns, key)
    outside = np.flatnonzero(places >= size)
    while outside.size:
        places[outside] = _encrypt(places[outside], rows[outside], columns[outside], key[outside])
        outside = outside[places[outside] >= size[outside]]
    ranked = np.flatnonzero(size <= MAX_RANKED)
    if ranked.size:
        places[ranked] = _rank(index[ranked], size[ranked], key[ranked])
    return places


def _encrypt(
    value: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    quotient = divide(value, columns)
    # Not copies: no number here is negative.
    row, column = quotient.view(np.uint64), (value - quotient * columns).view(np.uint64)
    num_rows, num_columns = rows.view(np.uint64), columns.view(np.uint64)
    round_key, mixed, shifted = key.copy(), np.empty_like(row), np.empty_like(row)
    for _ in range(ROUNDS // 2):
        _add_hash(row, column, round_key, num_rows, mixed, shifted)
        round_key += GOLDEN
        _add_hash(column, row, round_key, num_columns, mixed, shifted)
        round_key += GOLDEN
    row *= num_columns
    row += column
    return row.view(np.int64)


def _add_hash(
    target: NDArray[np.uint64],
    source: NDArray[np.uint64],
    key: NDArray[np.uint64],
    limit: NDArray[np.uint64],
    mixed: NDArray[np.uint64],
    shifted: NDArray[np.uint64],
) -> None:
    """Adds a hash of ``source`` to ``target``, modulo ``limit``; the last two arrays are buffers."""
    np.add(source, key, out=mixed)
    np.multiply(mixed, _MULTIPLIER_1, out=mixed)
    np.right_shift(mixed, _32, out=shifted)
    np.bitwise_xor(mixed, shifted, out=mixed)
    np.multiply(mixed, _MULTIPLIER_2, out=mixed)
    np.right_shift(mixed, _32, out=mixed)
    np.multiply(mixed, limit, out=mixed)
    np.right_shift(mixed, _32, out=mixed)
    np.add(target, mixed, out=target)
    # Where target < limit the difference wraps around to a larger number.
    np.subtract(target, limit, out=shifted)
    np.minimum(target, shifted, out=target)


def _rank(index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rank of the hash of ``index`` among the hashes of 0, ..., size - 1; all differ, as `mix64` is a bijection."""
    others = np.arange(size.max())
    with np.errstate(over="ignore"):
        hash_ni = mix64(key[:, None] + others.astype(np.uint64) * GOLDEN)
    own_n1 = np.take_along_axis(hash_ni, index[:, None], axis=1)
    return ((hash_ni < own_n1) & (others < size[:, None])).sum(axis=1)
