"""Independent draws: the domain of every position is random, with the weights as probabilities.

Position n of the run draws with the 53-bit number h(seed, n): domain i where bound_{i-1} <= h < bound_i, the bounds
being the cumulative weights in units of 2**-53, rounded. So the domain is a pure function of (seed, n, weights), a
probability is right within 2**-53, and a domain of weight 0 (or below 2**-54) is never drawn. The numbers are the
stream of SplitMix64 (Steele, Lea and Flood, 2014) that starts at a hash of the seed.

The samples within a domain come in order, each once an epoch, so a position's sample depends on the earlier draws of
its domain. Their number has no closed form: it is counted from the nearest *mark*, a position with known counts. Marks
are the start of the segment, the ends of the last `RECENT` windows, and one every `STRIDE` positions read or counted.
So a sequential run counts nothing; a jump counts at most `STRIDE` positions within what was read, and all beyond, at
about 100 million a second (one core, 22 domains).
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from megamix.data.blend.permute import GOLDEN, hash_words, mix64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RECENT = 64
STRIDE = 2**20  # positions
_CHUNK = 2**15  # positions drawn at once: the arrays stay in the processor's cache
_STREAM = 0x64726177  # keeps these hashes apart from those of domains
_TABLE_SIZE = 2**12
_11, _TABLE_BITS, _TABLE_SHIFT = (np.array(number, np.uint64) for number in (11, 12, 64 - 12))
_STEPS = np.arange(_CHUNK, dtype=np.uint64) * GOLDEN


class Draws:
    """The domains of one segment, drawn independently.

    Args:
        start: the segment's first position; positions in the methods are relative to it.
        weights: float64 [K], not negative, sum 1.
    """

    def __init__(self, seed: int, start: int, weights: Floats) -> None:
        self._start = start
        self._stream = int(hash_words(np.uint64(seed & (2**64 - 1)), _STREAM, 0))
        cumulative = weights.cumsum()
        bounds = np.rint(cumulative / cumulative[-1] * 2.0**53).astype(np.int64)
        self._domains = np.diff(bounds, prepend=0).nonzero()[0]  # that can be drawn
        # Between these domains, for hashes of 64 bits.
        self._bounds = bounds.take(self._domains[:-1]).astype(np.uint64) << _11
        self._table = self._shortcuts(weights.size)
        self._marks = [0]
        self._counts = [np.zeros(weights.size, np.int64)]  # before each mark

    def window(self, start: int, stop: int, given: Ints | None = None) -> tuple[Ints, Ints]:
        """Positions [start, stop) of the segment, 0 <= start <= stop.

        Args:
            given: int64 [K], `counts_at` of ``start`` if known, which saves counting.

        Returns:
            (domain, ordinal), int64 [stop - start] each: sample number ``ordinal`` of ``domain``, counted from the
            segment's start.
        """
        before = self.counts_at(start) if given is None else given
        chunks = [self._drawn(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
        domain = np.concatenate([self._table[:0], *chunks])
        number = np.bincount(domain, minlength=before.size)
        after = before + number
        ordinal = np.empty(domain.size, np.int64)
        ordinal[domain.argsort(kind="stable")] = np.arange(domain.size) + (after - number.cumsum()).repeat(number)
        self.know(stop, after)
        return domain.astype(np.int64), ordinal

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: the samples of each domain in the first ``position`` positions."""
        index = bisect.bisect_right(self._marks, position) - 1
        at, counts = self._marks[index], self._counts[index].copy()
        while at < position:
            # Up to the next multiple, so that marks of different jumps coincide.
            end = min(position, (at // STRIDE + 1) * STRIDE)
            for start in range(at, end, _CHUNK):
                counts += np.bincount(self._drawn(start, min(start + _CHUNK, end)), minlength=counts.size)
            at = end
            self.know(at, counts.copy())
        return counts

    def know(self, position: int, counts: Ints) -> None:
        """Marks ``position``, if it lies after all other marks."""
        if position <= self._marks[-1]:
            return
        self._marks.append(position)
        self._counts.append(counts)
        old = len(self._marks) - 1 - RECENT  # no longer recent
        if old > 0 and self._marks[old] - self._marks[old - 1] < STRIDE:
            del self._marks[old], self._counts[old]

    def _drawn(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """The domains of at most `_CHUNK` positions."""
        first = np.uint64((self._stream + (self._start + start) * int(GOLDEN)) & (2**64 - 1))
        number = mix64(_STEPS[: stop - start] + first)
        domain = self._table.take((number >> _TABLE_SHIFT).view(np.int64))
        unclear = (domain == self._counts[0].size).nonzero()[0]
        domain[unclear] = self._domains.take(self._bounds.searchsorted(number.take(unclear), "right"))
        return domain

    def _shortcuts(self, num_domains: int) -> NDArray[np.unsignedinteger]:
        """[`_TABLE_SIZE`], by the first bits of a hash: the domain drawn, or K where the other bits decide."""
        entry = (self._bounds >> _TABLE_SHIFT).view(np.int64)
        within = (self._bounds << _TABLE_BITS) > 0
        ends = np.append(entry + within, _TABLE_SIZE)
        table = self._domains.repeat(np.diff(ends, prepend=0)).astype(np.min_scalar_type(num_domains))
        table[entry[within]] = num_domains
        return table
