"""The blend: which sample of which domain stands at every position of the run, whatever the weights do on the way.

    blend = Blend(num_samples=[1000, 50], weights=[0.7, 0.3], seed=1234)
    domain, sample = blend.take(480)        # the next 480 samples
    blend.set_weights([0.5, 0.5])           # from here on, or at=position

A run is a list of *segments*, stretches of positions with the same weights. A segment starts with the deficits and
counts that the ones before it left, and within it the order is a pure function of position (`megamix.data.schedule`),
so a weight change costs O(K), any window can be asked for at any time, and nothing depends on how the positions were
cut into batches. Whatever the changes, no domain is ever more than (K - 1)/2 samples from the sum of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.data.permute import grid, hash_next, hash_words, permute
from megamix.data.schedule import Order
from megamix.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """A stretch of positions with constant weights.

    Attributes:
        start: its first position.
        weights: float64 [K], sum 1.
        deficits: float64 [K], in samples, at ``start``: the sum of each weight over all earlier positions minus the
            samples given.
        counts: int64 [K], the samples each domain gave before ``start``.
    """

    start: int
    weights: Floats
    deficits: Floats
    counts: Ints

    @cached_property
    def order(self) -> Order:
        """The order of its positions, of which 0 is ``start``."""
        return Order(self.weights, self.deficits)

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: samples given before ``position``, which lies in this segment or at its end."""
        return self.counts + self.order.counts_at(position - self.start)

    def then(self, position: int, weights: Floats) -> Segment:
        """The segment that follows when the weights become ``weights`` at ``position``."""
        return self.then_from(self.counts_at(position), position, weights)

    def then_from(self, counts: Ints, position: int, weights: Floats) -> Segment:
        """`then`, where ``counts``, the samples given before ``position``, are known already."""
        deficits = self.deficits + self.weights * float(position - self.start) - (counts - self.counts)
        return Segment(position, weights, deficits, counts)

    def to_json(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "weights": self.weights.tolist(),
            "deficits": self.deficits.tolist(),
            "counts": self.counts.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Segment:
        return cls(
            int(data["start"]),
            np.asarray(data["weights"], np.float64),
            np.asarray(data["deficits"], np.float64),
            np.asarray(data["counts"], np.int64),
        )


class Blend:
    """An endless sequence of (domain, sample) in which each domain's share follows its weight.

    Args:
        num_samples: [K], samples each domain has per epoch.
        weights: [K], the sampling weights from position 0 on; not negative, normalised to sum 1 here.
        seed: with ``domain_keys`` and the epoch it fixes the order within each domain.
        domain_keys: [K] integers that name the domains to the random order (default 0..K-1). Keys taken from the
            domains' names keep a domain's order when others are added or removed.

    Raises:
        InputError: a length, weight or count that cannot be used.
    """

    def __init__(
        self,
        num_samples: Sequence[int] | Ints,
        weights: ArrayLike,
        seed: int,
        *,
        domain_keys: Sequence[int] | None = None,
    ) -> None:
        self.num_samples = np.array(num_samples, np.int64)
        if self.num_samples.ndim != 1 or self.num_samples.size == 0:
            raise InputError(f"num_samples has shape {self.num_samples.shape}, expected [K] with K >= 1.")
        for domain, number in enumerate(self.num_samples):
            if number < 1:
                raise InputError(f"domain {domain} has {number} samples per epoch, expected at least 1.")
        self.seed = int(seed)
        # Python integers: numpy would turn keys on both sides of 2**63 into floats.
        self.domain_keys = [int(key) for key in (range(self.num_domains) if domain_keys is None else domain_keys)]
        words = [key & (2**64 - 1) for key in self.domain_keys]
        if len(words) != self.num_domains or len(set(words)) != self.num_domains:
            raise InputError(f"domain_keys must be {self.num_domains} different integers, got {self.domain_keys}.")
        key_words = np.array(words, np.uint64)
        self._domain_hashes = hash_words(np.uint64(self.seed & (2**64 - 1)), key_words)
        grids = np.array([grid(int(number)) for number in self.num_samples], np.int64)
        self._rows, self._columns = grids[:, 0], grids[:, 1]
        zeros = np.zeros(self.num_domains)
        self._segments = [Segment(0, self._checked(weights), zeros, zeros.astype(np.int64))]
        self._position = 0
        self._counts = self._segments[0].counts  # before the current position

    @property
    def num_domains(self) -> int:
        return self.num_samples.size

    @property
    def position(self) -> int:
        """The number of samples taken so far."""
        return self._position

    @property
    def weights(self) -> Floats:
        """float64 [K]: the weights in effect at the current position."""
        return self._segment_at(self._position).weights.copy()

    @property
    def counts(self) -> Ints:
        """int64 [K]: the samples taken from each domain so far."""
        return self._counts.copy()

    @property
    def epochs(self) -> Floats:
        """float64 [K]: how often each domain has been read so far."""
        return self.counts / self.num_samples

    @property
    def deficits(self) -> Floats:
        """float64 [K]: the integral of each weight over the positions so far, minus the samples taken."""
        return self._segment_at(self._position).then_from(self._counts, self._position, self.weights).deficits

    @property
    def ledger(self) -> list[tuple[int, list[float]]]:
        """(position, weights) of every change that has not been forgotten, also those still ahead."""
        return [(segment.start, segment.weights.tolist()) for segment in self._segments]

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: the samples that positions [0, position) hold of each domain."""
        return self._segment_at(position).counts_at(position)

    def segment_at(self, position: int) -> Segment:
        """The stretch of constant weights that ``position`` lies in."""
        return self._segment_at(position)

    def take(self, number: int) -> tuple[Ints, Ints]:
        """The next ``number`` samples; advances.

        Returns:
            (domain, sample), int64 [number] each: which domain, and which of its samples, in [0, num_samples[domain]).
        """
        domain, ordinal = self._order(self._position, number, self._counts)
        self._position += number
        self._counts = self._counts + np.bincount(domain, minlength=self.num_domains)
        return domain, self._samples(domain, ordinal)

    def window(self, start: int, number: int) -> tuple[Ints, Ints]:
        """Like `take`, for positions [start, start + number) wherever the blend stands; does not advance."""
        domain, ordinal = self._order(start, number)
        return domain, self._samples(domain, ordinal)

    def set_weights(self, weights: ArrayLike, at: int | None = None) -> bool:
        """Changes the weights from position ``at`` on (default: the current position).

        Returns:
            Whether they differ from those in effect before, or announced for the same position.

        Raises:
            InputError: weights that cannot be used, or a position that was already taken or precedes a change made
                before.
        """
        at = self._position if at is None else int(at)
        checked = self._checked(weights)
        if at < self._position:
            raise InputError(f"weights cannot change at position {at}: the blend already stands at {self._position}.")
        last = self._segments[-1]
        if at < last.start:
            raise InputError(f"weights cannot change at position {at}: a change at {last.start} was made before.")
        if np.array_equal(checked, last.weights):
            return False
        if at == last.start:
            self._segments[-1] = Segment(at, checked, last.deficits, last.counts)
        else:
            counts = self._counts if at == self._position else last.counts_at(at)
            self._segments.append(last.then_from(counts, at, checked))
        return True

    def forget_before(self, position: int) -> None:
        """Drops segments that end at or before ``position``, so that memory does not grow with the number of changes;
        never what lies ahead of the current position."""
        del self._segments[: self._index_at(min(position, self._position))]

    def state_dict(self, at: int | None = None) -> dict[str, Any]:
        """Plain numbers and lists from which `from_state_dict` continues exactly, as of position ``at`` (default: the
        current one)."""
        position = self._position if at is None else int(at)
        return {
            "position": position,
            "seed": self.seed,
            "num_samples": self.num_samples.tolist(),
            "domain_keys": list(self.domain_keys),
            "segments": [segment.to_json() for segment in self._segments[self._index_at(position) :]],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Blend:
        """The blend that `state_dict` described."""
        segments = [Segment.from_json(segment) for segment in state["segments"]]
        blend = cls(state["num_samples"], segments[0].weights, state["seed"], domain_keys=state["domain_keys"])
        # Not through the constructor: normalising again could move the last bit of a weight.
        blend._segments = segments
        blend._position = int(state["position"])
        blend._counts = blend.counts_at(blend._position)
        return blend

    def _order(self, start: int, number: int, given: Ints | None = None) -> tuple[Ints, Ints]:
        """(domain, ordinal), int64 [number] each, of positions [start, start + number); an ordinal counts a domain's
        samples from position 0. ``given`` are the counts before ``start``, where they are known."""
        if number < 0:
            raise InputError(f"cannot take {number} samples, expected 0 or more.")
        stop, index = start + number, self._index_at(start)
        domains, ordinals = [], []
        while start < stop or not domains:
            segment = self._segments[index]
            end = min(stop, self._segments[index + 1].start) if index + 1 < len(self._segments) else stop
            known = None if given is None else given - segment.counts
            domain, ordinal = segment.order.window(start - segment.start, end - segment.start, known)
            domains.append(domain)
            ordinals.append(segment.counts[domain] + ordinal)
            start, index, given = end, index + 1, None
        return np.concatenate(domains), np.concatenate(ordinals)

    def _samples(self, domain: Ints, ordinal: Ints) -> Ints:
        size = self.num_samples[domain]
        epoch, index = np.divmod(ordinal, size)
        key = hash_next(self._domain_hashes[domain], epoch)
        return permute(index, size, self._rows[domain], self._columns[domain], key)

    def _index_at(self, position: int) -> int:
        """The index of the segment that ``position`` lies in; nearly always the last or one of the last."""
        for index in range(len(self._segments) - 1, -1, -1):
            if self._segments[index].start <= position:
                return index
        raise InputError(
            f"position {position} lies before {self._segments[0].start}, where this blend's record starts."
        )

    def _segment_at(self, position: int) -> Segment:
        return self._segments[self._index_at(position)]

    def _checked(self, weights: ArrayLike) -> Floats:
        array = np.array(weights, np.float64)  # a copy: the caller may go on to change theirs
        if array.shape != (self.num_domains,):
            raise InputError(f"weights have shape {array.shape}, expected [{self.num_domains}], one for each domain.")
        bad = np.flatnonzero(~((array >= 0) & (array < np.inf)))
        if bad.size:
            raise InputError(
                f"the weight of domain {bad[0]} is {array[bad[0]]}, expected a finite number that is not negative."
            )
        largest = array.max()
        if largest == 0:
            raise InputError(f"the weights of all {self.num_domains} domains are 0, expected at least one above 0.")
        with np.errstate(over="ignore"):
            total = np.cumsum(array)[-1]  # one by one: np.sum may group terms differently from machine to machine
        # Weights that were normalised before stay what they are to the last bit, so that setting them again is no
        # change.
        if abs(total - 1.0) <= 1e-12:
            return array
        array /= largest  # first, so that the sum of huge weights is finite and tiny ones keep their digits
        return array / np.cumsum(array)[-1]
