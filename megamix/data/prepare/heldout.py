"""Which documents are held out: a keyed hash of where a document stands in its domain, and nothing else.

So it depends neither on the number of workers nor on the number of jobs that share the work.
"""

from __future__ import annotations

import hashlib

import numpy as np


class HeldOut:
    """The choice for one domain.

    Args:
        name: The domain.
        seed: Another seed chooses other documents.
        fraction: Share of the documents to hold out, 0 to 0.5. At 0 it is the first document of the first block, if
            that has one, so that the domain need not be gone through again for a single document.
    """

    def __init__(self, name: str, seed: int, fraction: float) -> None:
        self._name, self._seed = name, seed
        self._limit = np.uint64(fraction * 2.0**64)

    def hashes(self, file: int, places: np.ndarray) -> np.ndarray:
        """A number for each document, uniform over uint64 [documents].

        Args:
            file: Number of their file in the domain.
            places: Where they begin in it; see `Documents`.
        """
        key = hashlib.blake2b(f"{self._seed}/{self._name}/{file}".encode(), digest_size=8).digest()
        return _mix(int.from_bytes(key, "little"), places.astype(np.uint64))

    def take(self, hashes: np.ndarray, *, first: bool) -> np.ndarray:
        """Whether each document is held out, bool [documents]; ``first``: they are the domain's first block."""
        mask = hashes < self._limit
        if first and not self._limit:
            mask[:1] = True
        return mask


def _mix(key: int, places: np.ndarray) -> np.ndarray:
    """Outputs of splitmix64 (Steele et al. 2014), started at ``key``, of the given numbers."""
    z = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
