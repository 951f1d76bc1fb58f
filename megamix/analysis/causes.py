"""Causes of a change of weights: the run's own mixer, run again from the record on losses that were altered.

A change follows from the losses of an interval of steps, from what the mixer knew before, from the bounds and from
steering. The mixer is brought to the state before the interval and given it several times over:

    usual     with every domain's loss as it usually is
    others    with the other domains' losses as they were, the domain's own as it usually is
    own       with all losses as they were
    bounded   what the bounds leave of that
    allowed   what steering makes of that; in force

The differences between neighbours, and from the weight before to ``usual``, add up to the change. Nothing is assumed
about the mixer, so this holds for one of a user's own.

A usual loss is the median over the last 20 steps before the interval in which the domain was seen; its spread is 1.4826
times the median distance from that, which is the standard deviation of losses that are normally distributed.

Legend: K domains, n steps of the interval.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamix.analysis.replayable import ReplayableRun
from megamix.data.blend.blend import Segment
from megamix.mixing.mixers import DomainStats
from megamix.mixing.shadow import Shadow

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_USUAL_STEPS = 20
_FEWEST = 3
_MOST_OTHERS = 16


@dataclass(frozen=True)
class Usual:
    """Losses before an interval, float64 [K], nats per token; NaN where a domain was seen in fewer than 3 steps.

    Attributes:
        loss: the median.
        spread: see the module's docstring.
        num_steps: int64 [K], of how many steps.
    """

    loss: Floats
    spread: Floats
    num_steps: NDArray[np.int64]


@dataclass(frozen=True)
class Causes:
    """The weight of one domain, as each cause leaves it; see the module's docstring.

    Attributes:
        steps: the steps of the interval, counted from 1: first and last.
        loss: float64 [K], mean nats per token over the interval; NaN where a domain was absent.
        tokens: int64 [K].
        usual_loss: before the interval.
        other: the other domain whose unusual loss moved the weight most, and by how much; None where none did.
        is_stage: the change is a later stage of the mixture, before the mixer's first.
        is_steered: steering had a part in it; else ``bounded`` is ``allowed``.
    """

    steps: tuple[int, int]
    loss: Floats
    tokens: NDArray[np.int64]
    usual_loss: Usual
    before: float
    usual: float
    others: float
    own: float
    bounded: float
    allowed: float
    other: tuple[int, float] | None
    is_stage: bool
    is_steered: bool


def find_causes(
    replayable: ReplayableRun, step: int, domain: int, before: float, *, is_steered: bool = False
) -> Causes:
    """Takes the change that follows from ``step`` (counted from 1) apart.

    Args:
        domain: its place among the K.
        before: its weight in force before the change.
        is_steered: whether the line of the change has steering.

    Raises:
        InputError: the mixer needs what is not on record.
    """
    config = replayable.run.config.mixer
    replayable.check(config)
    shadow = replayable.shadow("own", config)
    first = max(step - int(getattr(config, "update_every", 1)) + 1, 1)
    for earlier in range(1, first):
        shadow.update(_stats(replayable, earlier), earlier - 1)
    interval = range(first, step + 1)
    sums = replayable.statistics
    tokens = sums.tokens[first - 1 : step].sum(axis=0)
    nats = sums.nats[first - 1 : step].sum(axis=0)
    loss = np.divide(nats, tokens, out=np.full(len(nats), np.nan), where=tokens > 0)
    usual = _usual(replayable, first)

    def given(altered: Bools) -> _Outcome:
        return _outcome(replayable, shadow, interval, domain, np.where(altered, usual.loss, np.nan))

    everyone = np.ones(len(nats), np.bool_)
    end = given(~everyone)
    return Causes(
        steps=(first, step),
        loss=loss,
        tokens=tokens,
        usual_loss=usual,
        before=before,
        usual=given(everyone).wanted,
        others=given(np.arange(len(nats)) == domain).wanted,
        own=end.wanted,
        bounded=end.bounded if is_steered else end.allowed,
        allowed=end.allowed,
        other=_other(given, usual, loss, domain, end.wanted),
        is_stage=end.is_stage,
        is_steered=is_steered,
    )


def _stats(replayable: ReplayableRun, step: int, losses: Floats | None = None) -> DomainStats:
    """The sums of a step, with other ``losses`` (float64 [K]) where these are numbers."""
    stats = replayable.statistics.step(step, replayable.drawn_with[step - 1])
    if losses is None:
        return stats
    nats = np.where(np.isfinite(losses), losses * stats.tokens, stats.nats)
    excess = stats.excess_nats
    if excess is not None:
        # The reference's loss of these tokens stays; an excess is not negative.
        excess = np.maximum(excess + (nats - stats.nats), 0.0)
    return DomainStats(nats, stats.tokens, excess, stats.weights)


def _usual(replayable: ReplayableRun, first: int) -> Usual:
    sums = replayable.statistics
    num_domains = sums.tokens.shape[1]
    middle, spread = np.full(num_domains, np.nan), np.full(num_domains, np.nan)
    counts = np.zeros(num_domains, np.int64)
    for domain in range(num_domains):
        seen = np.flatnonzero(sums.tokens[: first - 1, domain])[-_USUAL_STEPS:]
        counts[domain] = seen.size
        if seen.size >= _FEWEST:
            losses = sums.nats[seen, domain] / sums.tokens[seen, domain]
            middle[domain] = np.median(losses)
            spread[domain] = 1.4826 * np.median(np.abs(losses - middle[domain]))
    return Usual(middle, spread, counts)


@dataclass(frozen=True)
class _Outcome:
    """The weight of a domain that the run asks for after an interval, what the bounds and then steering make of it, and
    whether it is a stage's."""

    wanted: float
    bounded: float
    allowed: float
    is_stage: bool


def _outcome(replayable: ReplayableRun, shadow: Shadow, steps: range, domain: int, losses: Floats) -> _Outcome:
    shadow = copy.deepcopy(shadow)
    segment: Segment | None = None
    for step in steps:
        for change in shadow.update(_stats(replayable, step, losses), step - 1):
            segment = change.segment
    policy = replayable.policy
    effective_step = policy.effective_step(steps[-1] - 1)
    is_stage = not shadow.mixer.has_updated and policy.stages.changes_at(effective_step)
    asked = policy.stages.at(effective_step) if is_stage else shadow.mixer.weights
    bounded = asked if segment is None else policy.allowed(asked, segment.counts, segment.start)
    wanted = float(asked[domain])
    allowed = wanted if segment is None else float(segment.weights[domain])
    return _Outcome(wanted, float(bounded[domain]), allowed, is_stage)


def _other(
    given: Callable[[Bools], _Outcome], usual: Usual, loss: Floats, domain: int, wanted: float
) -> tuple[int, float] | None:
    """The other domain whose loss, had it been usual, would have left the weight furthest from ``wanted``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        strange = np.abs(loss - usual.loss) / np.where(usual.spread > 0, usual.spread, 1.0)
    strange[domain] = np.nan
    most = [int(k) for k in np.argsort(-np.nan_to_num(strange, nan=-1.0))[:_MOST_OTHERS] if np.isfinite(strange[k])]
    moved = {k: wanted - given(np.arange(len(loss)) == k).wanted for k in most}
    largest = max(moved, key=lambda k: abs(moved[k]), default=None)
    return None if largest is None or moved[largest] == 0 else (largest, moved[largest])
