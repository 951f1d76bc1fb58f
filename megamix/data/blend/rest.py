"""Rest of an epoch that was begun with samples of another length.

A domain's samples are windows of its token stream, in a random order. With another length they are other windows, so
the rest of an epoch cannot be a part of the new order: that would read tokens twice and pass others over. It is a part
of the old one: the windows left, one after the other in their order, then the tokens after the last whole window, cut
anew into samples of the new length. The last of these is filled up with the first tokens of the epoch. So every label
of the domain is read in the epoch, and fewer tokens than one sample are read twice. The next epoch has the windows of
the new length. Where a rest is changed once more, it is a shorter rest of the same order.

A *place* counts tokens in this order: place p < N L is token p % L of window permute(p // L), and place p >= N L is
token p of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from megamix.data.blend.permute import epoch_keys, grid, permute


@dataclass(frozen=True)
class Rest:
    """Rest of an epoch of one domain.

    Attributes:
        tokens: of the domain that are a label: all but the first.
        window: L, tokens of a window of the old order.
        epoch: counted from 0.
        key: hash of the domain, see `epoch_keys`.
        place: the first place that is left.
        seq_length: tokens of the samples that the rest is cut into.
        start: the count of the domain's samples where the rest begins.
        extra: by how much the counts after the rest are ahead of the domain's samples in their own order.
    """

    tokens: int
    window: int
    epoch: int
    key: int
    place: int
    seq_length: int
    start: int
    extra: int

    @property
    def num_samples(self) -> int:
        """Samples that the rest is cut into."""
        return -(-(self.tokens - self.place) // self.seq_length)

    @property
    def end(self) -> int:
        """The count of the domain's samples after the rest."""
        return self.start + self.num_samples

    def place_of(self, index: int) -> int:
        """The place where sample ``index`` of the rest begins."""
        return self.place + index * self.seq_length

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """Sample ``index`` of the rest, as stretches of the stream: (first token, number of tokens)."""
        begin = self.place_of(index)
        place_s = np.arange(begin, begin + self.seq_length) % self.tokens
        whole = self.tokens // self.window
        number_s = np.minimum(place_s // self.window, whole - 1)
        number_w, of_s = np.unique(number_s, return_inverse=True)
        token_s = np.where(
            place_s < whole * self.window,
            self._windows(number_w, whole)[of_s.reshape(-1)] * self.window + place_s % self.window,
            place_s,
        )
        first_p = np.flatnonzero(np.diff(token_s, prepend=token_s[0] - 2) != 1)
        length_p = np.diff(first_p, append=token_s.size)
        return list(zip(token_s[first_p].tolist(), length_p.tolist(), strict=True))

    def _windows(self, number_w: np.ndarray, size: int) -> np.ndarray:
        """int64 [w]: the windows that stand at ``number_w`` in the old order of ``size`` windows."""
        rows, columns = grid(size)
        ones = np.ones(number_w.size, np.int64)
        key = epoch_keys(np.full(number_w.size, self.key, np.uint64), ones * self.epoch)
        return permute(number_w, ones * size, ones * rows, ones * columns, key)

    def to_json(self) -> dict[str, int]:
        """Plain numbers; see `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rest:
        """The rest that `to_json` wrote."""
        return cls(**{field.name: int(data[field.name]) for field in fields(cls)})


def stand_of(count: int, tokens: int, seq_length: int, rest: Rest | None) -> tuple[int, int, int]:
    """Where a domain stands in the order that it is read in.

    Args:
        count: its samples so far.
        tokens: see `Rest`.
        seq_length: of the samples that it gives now.
        rest: of its epoch before, or now; None: there was none.

    Returns:
        The epoch, the length of the windows of its order, and the place; 0 where the epoch has not begun.
    """
    if rest is not None and count < rest.end:
        return rest.epoch, rest.window, rest.place_of(count - rest.start)
    epoch, number = divmod(count - (0 if rest is None else rest.extra), tokens // seq_length)
    return epoch, seq_length, number * seq_length
