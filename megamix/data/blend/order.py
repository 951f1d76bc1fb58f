"""The order in which domains take turns while their weights stay the same, as a pure function of position.

Legend: K domains; p a position (a whole number of samples since the weights were set); s a clock, near p; w_i the
weight of domain i (sum 1); d_i its deficit when the weights were set: the sum of its weight over all earlier positions
minus the samples it had given; x_i(s) what it would have given by clock s if samples could be split; L(s) a level.

Rule (water-filling): the domains that lag most take turns until all that lag are level; then all continue together. So
domain i waits until the level has fallen to its deficit, d_i + w_i s = L(s). From then on it stays at that level, x_i =
d_i + w_i s - L(s), where L(s) is such that the x_i of all domains sum to s. Hence the turns of waiting domains are
shared equally, not by weight: with m domains taking turns and a weight V waiting, domain i gives w_i + V/m a tick and L
falls by V/m. Sample j of domain i is *due* when x_i reaches j + 1/2; all samples sorted by (due, domain, j) are the
order. A domain of weight 0 is never due.

Bound: at every position, for any sequence of weights, no domain is more than (K - 1)/2 samples from the sum of its
weight (plus rounding; Blend accepts weights that sum to 1 within 1e-12, which may add as much a position). The set
that deficits never leave is smaller: no k of the K domains ever lag by more than k (K - k)/2 together. Proof: let
d be in that set, e the deficits at a position p >= 1 of this order, s the clock when its last sample was due, and
suppose e is outside. Among the sets of domains T that exceed k (K - k)/2 by most, k = |T|, take one of the fewest
domains. Let A be those in T of weight above 0, a = |A|, and B those outside T that take turns, b = |B|. If A is empty,
T gave nothing and was owed nothing; if B is empty, T gave all p samples; in both cases T lags no more than it did in d.
Otherwise taking A out of T makes it exceed by less, and adding B by no more, so that mean_A e - mean_B e > (a + b)/2.
But e_i = f_i + r_i - w_i R, with f_i = min(L, d_i + w_i s), r_i = x_i - samples given, in [-1/2, 1/2] and 0 for those
that wait, and R = s - p = sum of r. As f <= L on A, f = L on B, and R = r(A) + r(B) (sums over a set),
    mean_A e - mean_B e <= r(A) [(1 - w(A))/a + w(B)/b] - r(B) [(1 - w(B))/b + w(A)/a]
                        <= 1 + [w(B) (a/b - 1) + w(A) (b/a - 1)]/2  <=  (a + b)/2:
linear in w(A), w(B) >= 0 with w(A) + w(B) <= 1, and at the corners 1, (a + b)/2b and (a + b)/2a. A contradiction.
The bound is tight: tests/data/test_blend.py comes within 2 % of it. Serving the greatest deficit at every position has
the same bound, but no closed form.

A domain that joins the blend or leaves it has weight 0 before or after. The order of the others does not change: it is
of the domains of weight above 0 alone, and depends on the differences of their deficits only. So the proof holds with K
the number of domains that ever were: the bound is (K' - 1)/2 for the K' present domains, plus 1/2 for each that left.

A *phase* lies between two domains' joining the turns. In it everything is linear in s, and a segment has at most K
phases. The number of samples due before a clock has a closed form up to rounding, and s is within K/2 of p. So a window
is computed from lower and upper bounds of each domain's samples: O(K + window log K) work at any position, after
O(K log K) for the phases (times the rounds of `_phases`, nearly always a few). A due time is computed from (weights,
deficits, i, j) alone, with float64 additions, products and quotients in a fixed order (sums by `cumsum`, which adds one
by one; `np.sum` may group terms differently on another machine), so every window and every machine has the same bits.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEVER = 2.0**62  # a clock that no run reaches
_HALVES = [2**power for power in range(62, -1, -1)]


class Order:
    """The order of one segment.

    Args:
        weights: float64 [K], not negative, sum 1.
        deficits: float64 [K], in samples.
    """

    def __init__(self, weights: Floats, deficits: Floats) -> None:
        self._num_domains = weights.size
        self._domains = (weights > 0).nonzero()[0]  # internal arrays are of these alone
        self._each = np.arange(self._domains.size)
        self._weights = weights.take(self._domains)
        self._deficits = deficits.take(self._domains)
        self._starts, self._levels, self._shares = _phases(self._weights, self._deficits)
        self._last = self._shares.size - 1
        self._start_list = self._starts[: self._last + 1].tolist()  # a list is searched faster
        self._settled = np.inf  # from this position on, all samples are known to be due in the last phase

    def window(self, start: int, stop: int, given: Ints | None = None) -> tuple[Ints, Ints]:
        """Positions [start, stop) of the order, 0 <= start <= stop.

        Args:
            given: `counts_at` of ``start`` if known, which saves work.

        Returns:
            (domain, ordinal), int64 [stop - start] each: sample number ``ordinal`` of ``domain``, counted from where
            the weights were set.
        """
        if given is None:
            low = self._below(start)
            skip = start - int(low.sum())
            index, ordinal = self._sorted(low, start, stop, False)
        else:
            skip = 0
            index, ordinal = self._sorted(given.take(self._domains), start, stop, start >= self._settled)
        return self._domains.take(index[skip : skip + stop - start]), ordinal[skip : skip + stop - start]

    def counts_at(self, position: int) -> Ints:
        """int64 [K]: the samples of each domain in the first ``position`` positions."""
        low = self._below(position)
        index, _, due = self._candidates(low, position, position, False)
        counts = np.zeros(self._num_domains, np.int64)
        if number := position - int(low.sum()):
            # No need to sort: those due before the last one, and of those due with it the first in order of domains.
            last = np.partition(due, number - 1)[number - 1]
            before = index[due < last]
            low = low + np.bincount(before, minlength=low.size)
            low += np.bincount(index[due == last][: number - before.size], minlength=low.size)
        counts[self._domains] = low
        return counts

    def _sorted(self, low: Ints, start: int, stop: int, settled: bool) -> tuple[Ints, Ints]:
        """(index into the domains of weight above 0, ordinal) of the samples from ``low`` on, at least as far as
        position ``stop``, in order; ``low`` are no more samples than given before ``start``."""
        index, ordinal, due = self._candidates(low, start, stop, settled)
        # Stable: equal due times stay sorted by domain, then by sample. Due times are above 0, so their bits sort like
        # the numbers, but faster.
        order = due.view(np.int64).argsort(kind="stable")
        return index.take(order), ordinal.take(order)

    def _candidates(self, low: Ints, start: int, stop: int, settled: bool) -> tuple[Ints, Ints, Floats]:
        """(index, ordinal) as of `_sorted`, but by domain, then by sample; and their due times."""
        high = np.maximum(self._above(stop), low)
        number = high - low
        index = self._each.repeat(number)
        ordinal = (high - number.cumsum()).repeat(number)
        ordinal += np.arange(index.size)
        first, last = (self._last, self._last) if settled else self._phases_between(low, high, start, stop)
        return index, ordinal, self._due(index, ordinal, first, last)

    def _due(self, index: Ints, ordinal: Ints, first: int, last: int) -> Floats:
        """Due times of samples that are due in phases ``first`` to ``last``; the result does not depend on these, and
        within a domain it never falls with the ordinal."""
        height = self._deficits.take(index)  # of the sample's line, which meets the level when due
        height -= ordinal + 0.5
        if first == last:
            begin, weights = self._start_list[first], self._weights
            height += (weights * begin).take(index)
            due = self._levels.item(first) - height
            due /= (weights + self._shares.item(first)).take(index)
            due += begin
            return np.minimum(due, self._starts[first + 1], out=due)
        weight = self._weights.take(index)
        phase = np.full(index.size, first)
        for step in _HALVES[-(last - first).bit_length() :]:
            later = phase + step
            phase += step * (height + weight * self._starts.take(later) <= self._levels.take(later))
        begin = self._starts.take(phase)
        with np.errstate(over="ignore"):
            way = (self._levels.take(phase) - (height + weight * begin)) / (weight + self._shares.take(phase))
        return np.minimum(begin + way, self._starts.take(phase + 1))

    def _phases_between(self, low: Ints, high: Ints, start: int, stop: int) -> tuple[int, int]:
        """The first and last phase in which samples [low_i, high_i) may be due: by the clock, unless a sample at the
        edge was rounded to another phase; then all phases."""
        first, last = self._phase_at(self._early(start)), self._phase_at(self._late(stop))
        if first:
            height = self._deficits - (low + 0.5)
            if not (height + self._weights * self._start_list[first] <= self._levels.item(first)).all():
                first = 0
            elif first == self._last:
                # Later positions have no samples before those of low.
                self._settled = min(self._settled, start)
        if last < self._last:
            height = self._deficits - (high - 0.5)
            if (height + self._weights * self._start_list[last + 1] <= self._levels.item(last + 1)).any():
                last = self._last
        return first, last

    def _below(self, position: int) -> Ints:
        """Close lower bound of each domain's samples in the first ``position`` positions."""
        return self._due_by(self._early(position), -_rounding(position))

    def _above(self, position: int) -> Ints:
        """Close upper bound of each domain's samples in the first ``position`` positions."""
        return self._due_by(self._late(position), _rounding(position))

    def _early(self, position: int) -> float:
        """A clock by which at most ``position`` samples are due: the x_i sum to it, and each rounds up by 1/2."""
        return max(0.0, position - (1.0 + 1e-11 * position + self._domains.size / 2))

    def _late(self, position: int) -> float:
        """A clock by which at least ``position`` samples are due."""
        return position + (1.0 + 1e-11 * position + self._domains.size / 2)

    def _due_by(self, clock: float, slack: float) -> Ints:
        """Samples of each domain due by ``clock``, where ``slack`` more counts as due."""
        phase = self._phase_at(clock)
        level = self._levels.item(phase) - self._shares.item(phase) * (clock - self._start_list[phase])
        number = self._weights * clock
        number += self._deficits
        number -= level + 0.5 - slack
        np.ceil(number, out=number)
        return np.maximum(number, 0.0, out=number).astype(np.int64)

    def _phase_at(self, clock: float) -> int:
        return bisect.bisect_right(self._start_list, clock) - 1


def _rounding(position: int) -> float:
    """More than all rounding errors in a number of samples due near ``position``, here and in the due times."""
    return 1e-9 + 1e-14 * position


def _phases(weights: Floats, deficits: Floats) -> tuple[Floats, Floats, Floats]:
    """The phases of n domains of weight above 0: phase m - 1 is where m of them take turns.

    Domain i joins where its line d_i + w_i s meets L. For any set of m other domains, with a weight V outside it, L is
    never below (sum of their d - V s) / m, so that meeting this line is no later than joining; for those that join
    before i, it is joining. Hence: put the domains in some order, let each meet the line of those before it, keep the
    latest time found for each, sort by these times, and repeat until the order stands. Every round settles at least
    the next domain to join, and mostly nearly all.

    Returns:
        (starts, levels, shares), float64: the clock where each phase starts, L there, and how fast it falls. Phases
        that start at `NEVER` or later are left out; infinities follow the starts and levels, for a search by halves.
    """
    number = weights.size
    earlier = np.arange(float(number))

    def in_order(weight: Floats, deficit: Floats) -> tuple[Floats, Floats, Floats]:
        """Deficits summed so far, weights summed from there on, and when each domain meets those before it."""
        total = deficit.cumsum()
        # From the end: 1 - (the weight of those that joined) would lose tiny weights.
        waiting = weight[::-1].cumsum()[::-1]
        # (mean of those before - deficit) / (weight + share), both times the number before.
        return total, waiting, (total - deficit - earlier * deficit) / (waiting + earlier * weight)

    with np.errstate(over="ignore"):
        times = np.zeros(number)
        order = (-deficits).argsort(kind="stable")
        weight, deficit = weights.take(order), deficits.take(order)
        total, waiting, joins = in_order(weight, deficit)
        for _ in range(number):
            times[order] = np.maximum(times.take(order), joins)
            order, before = times.argsort(kind="stable"), (weight, deficit)
            weight, deficit = weights.take(order), deficits.take(order)
            # Domains alike in both may change places, by rounding and for thousands of rounds, which changes nothing.
            if np.array_equal(weight, before[0]) and np.array_equal(deficit, before[1]):
                break
            total, waiting, joins = in_order(weight, deficit)
    joins = np.maximum.accumulate(joins)
    shares = np.zeros(number)
    shares[:-1] = waiting[1:]
    phases = int(joins.searchsorted(NEVER))
    members, joins, shares = earlier[:phases] + 1.0, joins[:phases], shares[:phases]
    shares /= members
    starts = np.full(2 * phases + 1, np.inf)
    starts[:phases] = joins
    levels = -starts
    levels[:phases] = np.minimum.accumulate(total[:phases] / members - shares * joins)
    return starts, levels, shares
