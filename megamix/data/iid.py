"""Independent draws: which domain stands at a position, as a random number with the weights as probabilities.

Position n of the run draws with the 53-bit number h(seed, n): domain i where bound_{i-1} <= h < bound_i, the bounds
being the cumulative weights in units of 2**-53, rounded. So the domain is a pure function of (seed, n, weights), a
probability is right within 2**-53, and a domain of weight 0 (or below 2**-54) is never drawn. The numbers are the
stream of SplitMix64 (Steele, Lea and Flood, 2014) that starts at a hash of the seed.

The samples within a domain still come in order, each once an epoch, so a position's sample needs the draws of its
domain so far. These have no closed form: they are counted, from the nearest place where they are known. Such *marks*
are the start of the segment, the ends of the last `RECENT` windows, and one every `STRIDE` positions that were read or
counted; a run that goes on in sequence counts nothing.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from megamix.data.permute import GOLDEN, hash_words, mix64

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RECENT = 64
STRIDE = 2**20  # positions; at about 50 million counted a second, 20 ms
_CHUNK = 2**15  # positions hashed at once: the arrays stay in the processor's cache
_STREAM = 0x64726177  # keeps these hashes apart from those of domains
_11 = np.uint64(11)
_STEPS = np.arange(_CHUNK, dtype=np.uint64) * GOLDEN


class Draws:
    """The domains of one segment, drawn independently.

    Args:
        seed: with the position it fixes the draw.
        start: the segment's first position; positions below are relative to it.
        weights: float64 [K], not negative, sum 1.
    """

    def __init__(self, seed: int, start: int, weights: Floats) -> None:
        self._start = start
        self._stream = int(hash_words(np.uint64(seed & (2**64 - 1)), _STREAM, 0))
        cumulative = weights.cumsum()
        self._bounds = np.rint(cumulative / cumulative[-1] * 2.0**53).astype(np.uint64)
        self._marks = [0]
        self._counts = [np.zeros(weights.size, np.int64)]  # before each mark

    def window(self, start: int, stop: int, given: Ints | None = None) -> tuple[Ints, Ints]:
        """Positions [start, stop) of the segment, 0 <= start <= stop.

        Args:
            given: int64 [K], `counts_at` of ``start`` where it is known, which saves counting.

        Returns:
            (domain, ordinal), int64 [stop - start] each: sample number ``ordinal`` of ``domain``, counted from the
            segment's start.
        """
        before = self.counts_at(start) if given is None else given
        domain = np.concatenate([self._drawn(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)] or [[]])
        domain = domain.astype(np.int64)
        number = np.bincount(domain, minlength=before.size)
        order = domain.argsort(kind="stable")
        ordinal = np.empty(domain.size, np.int64)
        ordinal[order] = np.arange(domain.size) + (before - (number.cumsum() - number)).repeat(number)
        self.know(stop, before + number)
        return domain, ordinal

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: how many samples each domain has given in the first ``position`` positions (their sum)."""
        index = bisect.bisect_right(self._marks, position) - 1
        at, counts = self._marks[index], self._counts[index].copy()
        while at < position:
            # Up to the next multiple, so that marks of different walks coincide.
            end = min(position, (at // STRIDE + 1) * STRIDE)
            for start in range(at, end, _CHUNK):
                counts += np.bincount(self._drawn(start, min(start + _CHUNK, end)), minlength=counts.size)
            at = end
            self.know(at, counts.copy())
        return counts

    def know(self, position: int, counts: Ints) -> None:
        """Marks ``counts`` as those at ``position``, if it lies after all other marks."""
        if position <= self._marks[-1]:
            return
        self._marks.append(position)
        self._counts.append(counts)
        old = len(self._marks) - 1 - RECENT  # no longer recent
        if old > 0 and self._marks[old] - self._marks[old - 1] < STRIDE:
            del self._marks[old], self._counts[old]

    def _drawn(self, start: int, stop: int) -> Ints:
        """The domains of at most `_CHUNK` positions."""
        first = np.uint64((self._stream + (self._start + start) * int(GOLDEN)) & (2**64 - 1))
        number = mix64(_STEPS[: stop - start] + first) >> _11
        return self._bounds.searchsorted(number, "right")
