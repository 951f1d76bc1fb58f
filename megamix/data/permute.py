"""A keyed bijection of [0, size): the order of samples within a domain, with no array to store.

A generalised Feistel cipher (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): an index is written as
(row, column) of a nearly square grid of ``rows x columns >= size`` cells, the two coordinates are mixed alternately by
a hash of the other, and an index that lands outside [0, size) is sent through again ("cycle walking"; at most one cell
in ``columns`` is outside, so almost none is). Only integer arithmetic modulo 2**64 is used, so that every machine
computes the same order.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words that scatters them."""
    value = value ^ (value >> np.uint64(30))
    value = value * _MULTIPLIER_1
    value = value ^ (value >> np.uint64(27))
    value = value * _MULTIPLIER_2
    return value ^ (value >> np.uint64(31))


def hash_words(*words: ArrayLike) -> NDArray[np.uint64]:
    """One 64-bit hash of several integers (arrays broadcast); the order of the words matters."""
    result = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            result = mix64((result + _GOLDEN) ^ np.asarray(word).astype(np.uint64))
    return result


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
        size: int64 [n], the size of the domain each index belongs to.
        rows, columns: int64 [n], `grid` of that size.
        key: uint64 [n].

    Returns:
        int64 [n], each in [0, size[n]).
    """
    result = _encrypt(index.astype(np.uint64), rows.astype(np.uint64), columns.astype(np.uint64), key)
    limit = size.astype(np.uint64)
    outside = np.flatnonzero(result >= limit)
    while outside.size:
        again = _encrypt(
            result[outside], rows[outside].astype(np.uint64), columns[outside].astype(np.uint64), key[outside]
        )
        result[outside] = again
        outside = outside[again >= limit[outside]]
    return result.astype(np.int64)


def _encrypt(
    value: NDArray[np.uint64], rows: NDArray[np.uint64], columns: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    row, column = np.divmod(value, columns)
    with np.errstate(over="ignore"):
        for _ in range(ROUNDS // 2):
            row = (row + mix64(column + key) % rows) % rows
            key = key + _GOLDEN
            column = (column + mix64(row + key) % columns) % columns
            key = key + _GOLDEN
        return row * columns + column
