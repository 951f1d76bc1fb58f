"""The blend: domain and sample at every position of a run, with weights that may change on the way.

    blend = Blend(num_samples=[1000, 50], weights=[0.7, 0.3], seed=1234)
    domain, sample = blend.take(480)        # the next 480 samples
    blend.set_weights([0.5, 0.5])           # from here on, or at=position
    blend.forget_before(blend.position)     # past weights, which would take memory for every change

A run is a list of *segments*, ranges of positions with constant weights. A segment starts with the deficits and counts
that the segments before it left, and within it the order is a pure function of position (`megamix.data.blend.order`).
So a weight change costs O(K log K), any window can be computed at any time, and batch sizes do not matter. Whatever the
changes, no domain is ever more than (K - 1)/2 samples from the sum of its weight.

With ``sampling="iid"`` the domains are drawn independently instead (`megamix.data.blend.iid`): counts then deviate from
the weights randomly, and a position far from those taken costs counting up to it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.core.errors import InputError
from megamix.data.blend.iid import Draws
from megamix.data.blend.order import Order
from megamix.data.blend.permute import MAX_SIZE, divide, epoch_keys, grid, hash_words, permute
from megamix.data.blend.rest import Rest
from megamix.data.blend.segment import Segment

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Sampling = Literal["low_discrepancy", "iid"]

MAX_ORDERS = 256  # cached, of segments that were not forgotten


class Blend:
    """An endless sequence of (domain, sample) in which each domain's share follows its weight.

    Args:
        num_samples: [K], samples each domain has per epoch.
        weights: [K], the sampling weights from position 0 on; not negative, normalised to sum 1 here.
        seed: fixes the order within each domain, with ``domain_keys`` and the epoch.
        domain_keys: [K] different integers (default 0..K-1). Keys derived from names keep a domain's order when others
            are added or removed.
        sampling: ``"low_discrepancy"``: counts stay within a bound of the weights; ``"iid"``: the domain of every
            position is drawn independently.
        rests: by domain, the rest of an epoch begun with samples of another length; its sample i is ``num_samples`` +
            i.

    Raises:
        InputError: a length, weight or count that cannot be used, or another kind of sampling.
    """

    def __init__(
        self,
        num_samples: Sequence[int] | Ints,
        weights: ArrayLike,
        seed: int,
        *,
        domain_keys: Sequence[int] | None = None,
        sampling: Sampling = "low_discrepancy",
        rests: Mapping[int, Rest] | None = None,
    ) -> None:
        self.num_samples = np.array(num_samples, np.int64)
        if self.num_samples.ndim != 1 or self.num_samples.size == 0:
            raise InputError(f"num_samples has shape {self.num_samples.shape}, expected [K] with K >= 1.")
        for domain, number in enumerate(self.num_samples):
            if not 1 <= number <= MAX_SIZE:
                raise InputError(f"domain {domain} has {number} samples per epoch, expected 1 to 2**52.")
        if sampling not in get_args(Sampling):
            raise InputError(f"sampling is {sampling!r}, expected one of {', '.join(get_args(Sampling))}.")
        self.sampling: Sampling = sampling
        self.seed = int(seed)
        # Python integers: numpy would turn keys on both sides of 2**63 into floats.
        self.domain_keys = [int(key) for key in (range(self.num_domains) if domain_keys is None else domain_keys)]
        words = [key & (2**64 - 1) for key in self.domain_keys]
        if len(words) != self.num_domains or len(set(words)) != self.num_domains:
            raise InputError(f"domain_keys must be {self.num_domains} different integers, got {self.domain_keys}.")
        key_words = np.array(words, np.uint64)
        self.domain_hashes = hash_words(np.uint64(self.seed & (2**64 - 1)), key_words)
        grids = np.array([grid(int(number)) for number in self.num_samples], np.int64)
        self._rows, self._columns = grids[:, 0], grids[:, 1]
        zeros = np.zeros(self.num_domains)
        counts = zeros.astype(np.int64)
        self.rests = dict(rests or {})
        self._rest_starts, self._rest_ends, self._extra = counts.copy(), counts.copy(), counts.copy()
        for domain, rest in self.rests.items():
            self._rest_starts[domain], self._rest_ends[domain], self._extra[domain] = rest.start, rest.end, rest.extra
        self._orders: dict[int, Order | Draws] = {}  # by the start of their segment
        self._stand([Segment(0, self._checked(weights), zeros, counts)], 0, counts)

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
        return self.segment_at(self._position).weights.copy()

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
        """float64 [K]: the sum of each weight over the positions so far (since the domain joined), minus the samples
        taken."""
        return self.segment_at(self._position).then(self._position, self._counts, self.weights).deficits

    @property
    def ledger(self) -> list[tuple[int, list[float]]]:
        """(position, weights) of every change that was not forgotten, future ones included."""
        return [(segment.start, segment.weights.tolist()) for segment in self._segments]

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: the samples of each domain in positions [0, position)."""
        segment = self.segment_at(position)
        # Bounds ask for the counts where weights change, and the change asks again.
        if self._counted is None or self._counted[:2] != (position, segment.start):
            counts = segment.counts + self._order_of(segment).counts_at(position - segment.start)
            self._counted = position, segment.start, counts
        return self._counted[2].copy()

    def segment_at(self, position: int) -> Segment:
        """The segment that contains ``position``."""
        return self._segments[self._index_at(position)]

    def take(self, number: int) -> tuple[Ints, Ints]:
        """The next ``number`` samples; advances.

        Returns:
            (domain, sample), int64 [number] each, with sample in [0, num_samples[domain]).
        """
        domain, ordinal = self._ordered(self._position, number, self._counts)
        self._position += number
        self._counts = self._counts + np.bincount(domain, minlength=self.num_domains)
        return domain, self._samples(domain, ordinal)

    def window(self, start: int, number: int) -> tuple[Ints, Ints]:
        """Like `take`, for any positions [start, start + number); does not advance."""
        domain, ordinal = self._ordered(start, number)
        return domain, self._samples(domain, ordinal)

    def set_weights(self, weights: ArrayLike, at: int | None = None) -> bool:
        """Changes the weights from position ``at`` on (default: the current position).

        Returns:
            Whether they differ from the weights before.

        Raises:
            InputError: unusable weights, or a position that was taken or precedes an earlier change.
        """
        at = self._position if at is None else int(at)
        checked = self._checked(weights)
        if at < self._position:
            raise InputError(f"weights cannot change at position {at}: the blend already stands at {self._position}.")
        last = self._segments[-1]
        if at < last.start:
            raise InputError(f"weights cannot change at position {at}: a change at {last.start} was made before.")
        if (checked == last.weights).all():
            return False
        if at == last.start:
            self._segments[-1] = Segment(at, checked, last.deficits, last.counts)
            self._orders.pop(at, None)
            self._counted = None
        else:
            counts = self._counts if at == self._position else self.counts_at(at)
            self._segments.append(last.then(at, counts, checked))
        return True

    def with_domains(
        self,
        num_samples: Sequence[int] | Ints,
        domain_keys: Sequence[int],
        sources: Sequence[int | None],
        rescale: Callable[[Floats], ArrayLike],
        *,
        restarted: Collection[int] = (),
    ) -> Blend:
        """The blend of another set of K' domains that continues from the current position, without the past.

        A kept domain continues with its next sample and its deficit. A new one starts with both at 0. Announced changes
        stay at their positions.

        The samples equal those of a blend of all domains that ever were, with weight 0 for the absent ones. So each
        domain that left, or was restarted, adds 1/2 to the bound of (K' - 1)/2.

        Args:
            num_samples, domain_keys: [K'], see `Blend`.
            sources: [K'], the number of each domain in this blend; None for a new one.
            rescale: maps weights of this blend, float64 [K], to weights of the new one, [K']; not negative.
            restarted: new domains, 0..K'-1, that start again although they have a source: their data changed.

        Raises:
            InputError: a kept domain has another number of samples or another key, so that samples would be lost or
                repeated; two domains have the same source; unusable lengths or weights.
        """
        kept = [None if new in restarted else source for new, source in enumerate(sources)]
        blend = Blend(
            num_samples,
            np.ones(len(num_samples)),
            self.seed,
            domain_keys=domain_keys,
            sampling=self.sampling,
            rests={new: self.rests[old] for new, old in enumerate(kept) if old in self.rests},
        )
        self._check_kept(blend, kept)
        counts, deficits = np.zeros(len(kept), np.int64), np.zeros(len(kept))
        new = [index for index, source in enumerate(kept) if source is not None]
        old = [source for source in kept if source is not None]
        counts[new], deficits[new] = self._counts[old], self.deficits[old]
        weights = blend._checked(rescale(self.weights))
        blend._stand([Segment(self._position, weights, deficits, counts)], self._position, counts)
        for segment in self._segments[self._index_at(self._position) + 1 :]:
            blend.set_weights(rescale(segment.weights.copy()), at=segment.start)
        return blend

    def forget_before(self, position: int) -> None:
        """Drops segments that end at or before ``position`` and the current position, so that memory does not grow with
        the number of changes."""
        past = self._index_at(max(self._segments[0].start, min(position, self._position)))
        for segment in self._segments[:past]:
            self._orders.pop(segment.start, None)
        del self._segments[:past]

    def state_dict(self, at: int | None = None) -> dict[str, Any]:
        """Plain numbers and lists from which `from_state_dict` continues exactly, as of position ``at`` (default:
        now)."""
        position = self._position if at is None else int(at)
        counts = self._counts if position == self._position else self.counts_at(position)
        rests = [
            {"domain": domain, **rest.to_json()}
            for domain, rest in self.rests.items()
            if rest.extra or counts[domain] < rest.end
        ]
        return {
            "position": position,
            "counts": counts.tolist(),
            "seed": self.seed,
            "sampling": self.sampling,
            "num_samples": self.num_samples.tolist(),
            "domain_keys": list(self.domain_keys),
            "segments": [segment.to_json() for segment in self._segments[self._index_at(position) :]],
            **({"rests": rests} if rests else {}),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Blend:
        """The blend in the state that `state_dict` gave.

        Raises:
            InputError: the lengths in the state differ.
        """
        segments = [Segment.from_json(segment) for segment in state["segments"]]
        blend = cls.from_segment(
            state["num_samples"],
            segments[0],
            state["seed"],
            domain_keys=state["domain_keys"],
            sampling=state["sampling"],
            rests={rest["domain"]: Rest.from_json(rest) for rest in state.get("rests", ())},
        )
        blend._stand(segments, int(state["position"]), np.asarray(state["counts"], np.int64))
        return blend

    @classmethod
    def from_segment(
        cls,
        num_samples: Sequence[int] | Ints,
        segment: Segment,
        seed: int,
        *,
        domain_keys: Sequence[int] | None = None,
        sampling: Sampling = "low_discrepancy",
        rests: Mapping[int, Rest] | None = None,
    ) -> Blend:
        """A run's blend at the start of a recorded segment (`segment_at`), in O(K); other arguments as in `Blend`.

        Raises:
            InputError: the segment has another number of domains, or an argument is unusable.
        """
        blend = cls(num_samples, segment.weights, seed, domain_keys=domain_keys, sampling=sampling, rests=rests)
        # As recorded, not as the constructor has it: normalising again could move the last bit of a weight.
        blend._stand([segment], segment.start, segment.counts)
        return blend

    def _stand(self, segments: list[Segment], position: int, counts: Ints) -> None:
        """Sets the segments and a position in the first of them, before which the domains gave ``counts``."""
        self._segments, self._position, self._counts = segments, position, counts
        self._counted: tuple[int, int, Ints] | None = None  # position, start of its segment, and the counts there
        self._orders.clear()
        if position > segments[0].start and isinstance(order := self._order_of(segments[0]), Draws):
            order.know(position - segments[0].start, counts - segments[0].counts)

    def _order_of(self, segment: Segment) -> Order | Draws:
        """The order of a segment's positions, of which 0 is its start."""
        order = self._orders.pop(segment.start, None)
        if order is None:
            if self.sampling == "iid":
                order = Draws(self.seed, segment.start, segment.weights)
            else:
                order = Order(segment.weights, segment.deficits)
            if len(self._orders) == MAX_ORDERS:
                del self._orders[next(iter(self._orders))]
        self._orders[segment.start] = order  # last, as the one used last
        return order

    def _check_kept(self, blend: Blend, kept: Sequence[int | None]) -> None:
        """Raises unless every kept domain continues with the same samples in the same order."""
        if len(kept) != blend.num_domains:
            raise InputError(f"sources has {len(kept)} entries, expected {blend.num_domains}, one for each domain.")
        sources = [source for source in kept if source is not None]
        if len(set(sources)) < len(sources) or not all(0 <= source < self.num_domains for source in sources):
            raise InputError(f"sources must be different domains of 0..{self.num_domains - 1}, got {sources}.")
        for new, source in enumerate(kept):
            if source is None:
                continue
            before = int(self.num_samples[source]), self.domain_keys[source]
            after = int(blend.num_samples[new]), blend.domain_keys[new]
            if before != after:
                raise InputError(
                    f"domain {new} is to go on as domain {source} was, but that has (samples, key) {before} and this "
                    f"{after}, which is another order. List it in restarted, or give it the data and the key it had."
                )

    def _ordered(self, start: int, number: int, given: Ints | None = None) -> tuple[Ints, Ints]:
        """(domain, ordinal), int64 [number] each, of positions [start, start + number); ordinals count a domain's
        samples from position 0. ``given``: the counts before ``start``, if known."""
        if number < 0:
            raise InputError(f"cannot take {number} samples, expected 0 or more.")
        stop, index = start + number, self._index_at(start)
        pieces = []
        while start < stop or not pieces:
            segment = self._segments[index]
            end = min(stop, self._segments[index + 1].start) if index + 1 < len(self._segments) else stop
            known = None if given is None else given - segment.counts
            domain, ordinal = self._order_of(segment).window(start - segment.start, end - segment.start, known)
            pieces.append((domain, ordinal + segment.counts.take(domain)))
            start, index, given = end, index + 1, None
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([domain for domain, _ in pieces]), np.concatenate([ordinal for _, ordinal in pieces])

    def _samples(self, domain: Ints, ordinal: Ints) -> Ints:
        """int64 [number]: the sample of the domain at each ordinal."""
        size = self.num_samples[domain]
        if not self.rests:
            return self._windows(domain, ordinal, size)
        is_rest, own = ordinal < self._rest_ends[domain], np.maximum(ordinal - self._extra[domain], 0)
        return np.where(is_rest, size + ordinal - self._rest_starts[domain], self._windows(domain, own, size))

    def _windows(self, domain: Ints, ordinal: Ints, size: Ints) -> Ints:
        epoch = divide(ordinal, size)
        key = epoch_keys(self.domain_hashes[domain], epoch)
        return permute(ordinal - epoch * size, size, self._rows[domain], self._columns[domain], key)

    def _index_at(self, position: int) -> int:
        """Index of the segment that contains ``position``."""
        if position >= self._segments[-1].start:
            return len(self._segments) - 1
        index = bisect.bisect_right(self._segments, position, key=lambda segment: segment.start) - 1
        if index < 0:
            raise InputError(
                f"position {position} lies before {self._segments[0].start}, where this blend's record starts."
            )
        return index

    def _checked(self, weights: ArrayLike) -> Floats:
        array = np.array(weights, np.float64)  # a copy: the caller may go on to change theirs
        if array.shape != (self.num_domains,):
            raise InputError(f"weights have shape {array.shape}, expected [{self.num_domains}], one for each domain.")
        values = array.tolist()
        # Of some hundred numbers, Python finds the least in less time than numpy.
        if array.size < 512:
            least, largest = min(values), max(values)
        else:
            least, largest = float(array.min()), float(array.max())
        if not (least >= 0 and 1e-200 < largest < 1e200):
            largest = self._largest(array)
            array /= largest  # so that the sum of huge weights is finite and tiny ones keep their digits
            values = array.tolist()
        total = math.fsum(values)  # exact, so the same on every machine
        if math.isnan(total):
            self._largest(array)
        # Normalised weights stay the same to the last bit, so that setting them again is no change.
        return array if abs(total - 1.0) <= 1e-12 else array / total

    def _largest(self, array: Floats) -> float:
        """The largest weight; raises unless all are finite and not negative, and one is above 0."""
        bad = np.flatnonzero(~((array >= 0) & (array < np.inf)))
        if bad.size:
            raise InputError(
                f"the weight of domain {bad[0]} is {array[bad[0]]}, expected a finite number that is not negative."
            )
        if not array.any():
            raise InputError(f"the weights of all {self.num_domains} domains are 0, expected at least one above 0.")
        return float(array.max())
