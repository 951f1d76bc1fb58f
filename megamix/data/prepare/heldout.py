"""Which documents are held out: a keyed hash of where a document stands in its domain, and nothing else.

So it depends neither on the number of workers nor on the number of jobs that share the work.
"""

from __future__ import annotations

import hashlib

import numpy as np

from megamix.data.permute import GOLDEN, mix64


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
        # Outputs of SplitMix64, started at the key, of these numbers.
        return mix64((places.astype(np.uint64) + np.uint64(1)) * GOLDEN + np.uint64(int.from_bytes(key, "little")))

    def take(self, hashes: np.ndarray, *, first: bool) -> np.ndarray:
        """Whether each document is held out, bool [documents]; ``first``: they are the domain's first block."""
        mask = hashes < self._limit
        if first and not self._limit:
            mask[:1] = True
        return mask
