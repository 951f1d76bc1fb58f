"""A keyed bijection of [0, size): the order of samples within a domain, with no array to store.

A generalised Feistel cipher (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): an index is written as
(row, column) of a nearly square grid of ``rows x columns >= size`` cells, the two coordinates are mixed alternately by
a hash of the other, and an index that lands outside [0, size) is sent through again ("cycle walking"; at most one cell
in ``columns`` is outside, so almost none is). A Feistel cipher of few cells favours some orders however many rounds it
has (on 3 x 3 cells it makes even permutations only), so up to `MAX_RANKED` samples are ordered by the ranks of their
hashes instead, which favours none. Only integer arithmetic modulo 2**64 is used, so that every machine computes the
same order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
MAX_RANKED = 64
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_ONE, _27, _30, _31 = (np.uint64(number) for number in (1, 27, 30, 31))


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
    """The grid (rows, columns) for a domain of ``size`` samples: rows * columns >= size, with less than one row to
    spare."""
    columns = max(1, math.isqrt(size - 1) + 1) if size > 1 else 1
    return -(-size // columns), columns


def permute(
    index: NDArray[np.int64],
    size: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    key: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Maps ``index[n]`` in [0, size[n]) to its place under ``key[n]``; for a fixed size and key a bijection.

    Args:
        index: int64 [n].
        size: int64 [n], the size of the domain each index belongs to, below 2**62.
        rows, columns: int64 [n], `grid` of that size.
        key: uint64 [n].

    Returns:
        int64 [n], each in [0, size[n]).
    """
    # Not copies: no number here is negative.
    num_rows, num_columns, limit = rows.view(np.uint64), columns.view(np.uint64), size.view(np.uint64)
    result = _encrypt(index.view(np.uint64), num_rows, num_columns, key)
    outside = np.flatnonzero(result >= limit)
    while outside.size:
        result[outside] = _encrypt(result[outside], num_rows[outside], num_columns[outside], key[outside])
        outside = outside[result[outside] >= limit[outside]]
    places = result.view(np.int64)
    ranked = np.flatnonzero(size <= MAX_RANKED)
    if ranked.size:
        places[ranked] = _rank(index[ranked], size[ranked], key[ranked])
    return places


def _encrypt(
    value: NDArray[np.uint64], rows: NDArray[np.uint64], columns: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    row, column = np.divmod(value, columns)
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS // 2):
            # Half a hash, so that the sum cannot wrap around.
            row = (row + (mix64(column + key) >> _ONE)) % rows
            key = key + GOLDEN
            column = (column + (mix64(row + key) >> _ONE)) % columns
            key = key + GOLDEN
        return row * columns + column


def _rank(index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many of the hashes of 0, ..., size - 1 are below that of ``index``. No two are equal: `mix64` is a
    bijection."""
    others = np.arange(size.max())
    with np.errstate(over="ignore"):
        hash_ni = mix64(key[:, None] + others.astype(np.uint64) * GOLDEN)
    own_n1 = np.take_along_axis(hash_ni, index[:, None], axis=1)
    return ((hash_ni < own_n1) & (others < size[:, None])).sum(axis=1)
