"""Documents of a stream of token ids, by the token that ends each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from megamix.core.errors import InputError

_LONGEST = 2**31 - 1  # an index holds lengths in 32 bits


class Cutter:
    """Lengths of the documents of a stream that comes in pieces. What follows the last end is a document, too.

    Args:
        eod_id: The token that ends every document.
        source: Name of the stream, for messages.

    Attributes:
        num_ends: Documents that ended with ``eod_id`` so far.
    """

    def __init__(self, eod_id: int, source: object) -> None:
        self.num_ends = 0
        self._eod_id, self._source = eod_id, source
        self._open = 0

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Lengths of the documents that end in the next tokens of the stream, int64 [documents]."""
        ends = np.flatnonzero(tokens == self._eod_id) + 1
        if not ends.size:
            self._open += len(tokens)
            self._check(self._open)
            return ends
        lengths = np.diff(ends, prepend=-self._open)
        self._open = len(tokens) - int(ends[-1])
        self._check(int(lengths[0]))
        self.num_ends += len(ends)
        return lengths

    def rest(self) -> np.ndarray:
        """Length of the last document, if it has no end, int64 [0 or 1]."""
        return np.array([self._open] if self._open else [], np.int64)

    def lengths(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Lengths of all documents of a stream."""
        for tokens in pieces:
            yield self.add(tokens)
        yield self.rest()

    def documents(self, pieces: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole documents of a stream: concatenated tokens and their lengths. Memory: a piece, or the longest one."""
        held: list[np.ndarray] = []
        for tokens in pieces:
            lengths = self.add(tokens)
            end = len(tokens) - self._open
            if not lengths.size:
                held.append(tokens)
                continue
            yield np.concatenate([*held, tokens[:end]]), lengths
            held = [tokens[end:]]
        if self._open:
            yield np.concatenate(held), self.rest()

    def _check(self, length: int) -> None:
        if length > _LONGEST:
            raise InputError(
                f"{self._source} has {length:,} tokens without token {self._eod_id}, which ends documents; a document may"
                f" have {_LONGEST:,}. Name the token that ends them with --eod."
            )
