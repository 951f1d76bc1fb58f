"""Samples that are no windows: those that the rest of an epoch was cut into when their length changed.

Such a sample is put together from stretches of its domain's stream. Where two meet, at a *joint*, the label of the
token before is the one that follows it in the stream, as in any other sample, and the next token is another
document's, or of another place of the same: positions, where they count in documents, begin anew.

Legend: S tokens in a sample, m places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.data.blend.rest import Rest
from megamix.data.tokens.stream import DomainTokens

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CutSamples:
    """The samples of a run's domains, windows or not.

    Attributes:
        streams: of the domains.
        rests: by domain, see `Blend`.
    """

    streams: Sequence[DomainTokens]
    seq_length: int
    rests: Mapping[int, Rest]

    def is_cut(self, domain: int, sample: int) -> bool:
        """Whether a sample is no window."""
        return domain in self.rests and sample >= self.streams[domain].num_windows(self.seq_length)

    def pieces(self, domain: int, sample: int) -> list[tuple[int, int]]:
        """The stretches of the stream that a sample's tokens are: (first token, number of tokens); the label of each
        token is the next one of the stream."""
        if not self.is_cut(domain, sample):
            return [(sample * self.seq_length, self.seq_length)]
        return self.rests[domain].pieces(sample - self.streams[domain].num_windows(self.seq_length))

    def read(self, domain: int, sample: int, token_t: np.ndarray) -> None:
        """Fills ``token_t``, integers [S + 1], with the tokens and the label of the last one."""
        place = 0
        for first, number in self.pieces(domain, sample):
            # The last token is overwritten by the piece that follows.
            token_t[place : place + number + 1] = self.streams[domain].read(first, number + 1)
            place += number

    def joints(self, domain: int, sample: int) -> Iterator[tuple[int, int]]:
        """(place, label) of the tokens that the next token of the sample does not follow."""
        place = 0
        for first, number in self.pieces(domain, sample)[:-1]:
            place += number
            yield place - 1, int(self.streams[domain].read(first + number, 1)[0])

    def starts(self, domain: int, sample: int) -> tuple[Ints, NDArray[np.bool_]]:
        """Places where positions in documents begin, int64 [m], 0 to S, ascending; and for each whether the label
        before it is a document's first token."""
        found: dict[int, bool] = {}
        place = 0
        for first, number in self.pieces(domain, sample):
            if place:
                found.setdefault(place, False)
            for start in self.streams[domain].starts_within(first, number + 1).tolist():
                if start > 0:
                    found[place + start] = True
                elif place == 0:
                    found[0] = False
            place += number
        place_m = np.array(sorted(found), np.int64)
        return place_m, np.array([found[each] for each in place_m.tolist()], np.bool_)
