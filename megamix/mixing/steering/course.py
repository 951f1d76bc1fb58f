"""Course: what steering has in force at a moment of a run, and how a command changes it. Pure functions.

    free weights (the rule's last ones, or those a command gave) --pins, bounds--> target --ramp--> weights

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megamix.core.errors import InputError, check_known
from megamix.core.text import listed
from megamix.data.batches import Batches
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.ramps import Ramp
from megamix.mixing.source_bounds import check_sources
from megamix.mixing.steering.command import SteerCommand, shares_text

Floats = NDArray[np.float64]
_SLACK = 1e-9


@dataclass(frozen=True)
class Place:
    """Where weights take effect.

    Attributes:
        own: the constraints of the run.
        counts: int64 [K], samples taken from each domain before ``position``.
        seq_length: tokens of a sample.
        batches: of the run; None: its samples have one length.
    """

    own: Constraints
    counts: ArrayLike
    position: int
    seq_length: int
    batches: Batches | None = None

    def on_the_way(self, ramp: Ramp) -> float:
        """The position, if all samples since the start of ``ramp`` had the length of the first of them."""
        batches, start = self.batches, ramp.start
        if batches is None or not batches.past:
            return self.position
        tokens = batches.tokens_at(self.position) - batches.tokens_at(start)
        return start + tokens / batches.length(batches.step(start))


@dataclass(frozen=True)
class Course:
    """What is in force.

    Attributes:
        free: float64 [K], the weights before pins, bounds and constraints; None: those sampled with.
        left_out: domains that the rule does not mix.
        pins: weights that stay, by domain.
        bounds: least and largest weight, by domain.
        held: whether the rule's weights are passed over.
        mixer: config of the rule; None: the run's.
        rule_changes: how often the rule has set ``free``.
    """

    free: Floats | None = None
    left_out: tuple[str, ...] = ()
    pins: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    held: bool = False
    mixer: Mapping[str, Any] | None = None
    ramp: Ramp | None = None
    rule_changes: int = 0

    def weights(self, place: Place) -> Floats:
        """float64 [K]: the weights that hold from a place on."""
        assert self.free is not None
        target = bounded(place.own, self.pins, self.bounds).apply(self.free, place.counts, place.position)
        if self.ramp is None:
            return target
        return place.own.apply(self.ramp.towards(target, place.on_the_way(self.ramp)), place.counts, place.position)

    def record(self) -> dict[str, Any]:
        """What is in force, for a line of weights.jsonl."""
        found: dict[str, Any] = {
            "pins": dict(self.pins),
            "bounds": {name: list(two) for name, two in self.bounds.items()},
        }
        found |= {"held": self.held, "ramp": None if self.ramp is None else [self.ramp.start, self.ramp.samples]}
        return {key: value for key, value in found.items() if value}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; floats keep every bit through JSON."""
        ramp = self.ramp and {
            "start": self.ramp.start,
            "samples": self.ramp.samples,
            "origin": self.ramp.origin.tolist(),
        }
        return {
            "free": None if self.free is None else self.free.tolist(),
            "left_out": list(self.left_out),
            "pins": dict(self.pins),
            "bounds": {name: list(pair) for name, pair in self.bounds.items()},
            "held": self.held,
            "mixer": None if self.mixer is None else dict(self.mixer),
            "ramp": ramp,
            "rule_changes": self.rule_changes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Course:
        """The course that `to_json` wrote."""
        ramp = data["ramp"]
        return cls(
            free=None if data["free"] is None else np.array(data["free"], np.float64),
            left_out=tuple(data["left_out"]),
            pins=dict(data["pins"]),
            bounds={name: (float(low), float(high)) for name, (low, high) in data["bounds"].items()},
            held=bool(data["held"]),
            mixer=data["mixer"],
            ramp=ramp and Ramp(int(ramp["start"]), float(ramp["samples"]), np.array(ramp["origin"], np.float64)),
            rule_changes=int(data["rule_changes"]),
        )


def steered(course: Course, command: SteerCommand, current: Floats, place: Place) -> Course:
    """The course after a command that is no undo.

    Args:
        current: float64 [K], the weights that would hold without it.

    Raises:
        InputError: an unknown domain, or weights and bounds that cannot be met.
    """
    own = place.own
    for names in (command.unpin, command.set, command.pin, command.bounds):
        check_known(names, own.names, "there is no domain")
    for name in command.unpin:
        if name not in course.pins:
            raise InputError(f"domain '{name}' is not pinned (pinned: {listed(course.pins) or 'none'}).")
    if course.ramp is not None and command.hold:  # pins that it has not reached stay where they are
        here = dict(zip(own.names, current.tolist(), strict=True))
        course = replace(course, pins={name: here[name] for name in course.pins})
    pins = {name: pin for name, pin in course.pins.items() if name not in command.unpin}
    bounds = {name: pair for name, pair in {**course.bounds, **command.bounds}.items() if pair != (0.0, 1.0)}
    free, left_out = course.free, set(course.left_out)
    if command.hold:
        free = current
    if command.mixture is not None:
        free = normalise_weights(command.mixture, own.names, "mixture")
    if command.set:
        free = _set(command.set, pins, bounds, current if command.mixture is None else free, place)
    if free is not None and (command.set or command.mixture is not None):
        zero = {name for name, weight in zip(own.names, free.tolist(), strict=True) if weight == 0}
        left_out = {name for name in zero if name not in pins or name in left_out}
    pins |= command.pin
    left_out -= {name for name, weight in pins.items() if weight > 0} | {
        name for name, (low, _) in bounds.items() if low
    }
    _check(own, pins, bounds, left_out)
    return replace(
        course,
        free=free,
        left_out=tuple(name for name in own.names if name in left_out),
        pins=pins,
        bounds=bounds,
        held=course.held if command.hold is None else command.hold,
        mixer=course.mixer if command.mixer is None else command.mixer,
        ramp=ramp_of(command, current, place),
    )


def ramp_of(command: SteerCommand, current: Floats, place: Place) -> Ramp | None:
    """The ramp that a command asks for; without one it ends any before it."""
    return Ramp(place.position, command.ramp_tokens / place.seq_length, current) if command.ramp_tokens else None


def bounded(own: Constraints, pins: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> Constraints:
    """The constraints of a run with pins and bounds."""
    if not pins and not bounds:
        return own
    floor, cap = own.floor.copy(), own.cap.copy()
    place = {name: index for index, name in enumerate(own.names)}
    for name, (low, high) in bounds.items():
        k = place[name]
        floor[k], cap[k] = max(floor[k], low), min(cap[k], high)
    for name, weight in pins.items():
        floor[place[name]] = cap[place[name]] = weight
    return replace(own, floor=floor, cap=cap)


def _set(
    given: Mapping[str, float],
    pins: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    base: Floats | None,
    place: Place,
) -> Floats:
    """float64 [K]: ``base`` with some weights as given and pinned ones where they are; the others keep their ratios, as
    far as bounds allow."""
    own = place.own
    both = [name for name in given if name in pins]
    if both:
        raise InputError(
            f"domain '{both[0]}' is pinned at {pins[both[0]]:g}. Unpin it in the same command, or pin it at another weight."
        )
    fixed = {**pins, **given}
    assert base is not None
    _check(own, fixed, bounds, set())
    others = [weight for name, weight in zip(own.names, base.tolist(), strict=True) if name not in fixed]
    rest = 1 - sum(fixed.values())
    if rest > _SLACK and sum(others) == 0:
        raise InputError(
            f"{shares_text(fixed)} leaves {rest:.6g} of the weights, and {'there is no other domain' if not others else 'all others are 0'}"
            ". Set weights that sum to 1, or give a domain more."
        )
    return bounded(own, fixed, bounds).apply(base, place.counts, place.position)


def _check(
    own: Constraints, pins: Mapping[str, float], bounds: Mapping[str, tuple[float, float]], left_out: set[str]
) -> None:
    """Raises InputError unless there are weights within pins and bounds."""
    within = bounded(own, {}, bounds)
    for k, name in enumerate(own.names):
        low, high = within.floor[k], within.cap[k]
        if low > high and name not in pins:
            raise InputError(
                f"domain '{name}': {_interval(bounds[name])} and data.min_weight {own.floor[k]:g}, data.max_weight {own.cap[k]:g} "
                "leave it no weight. Give bounds that overlap."
            )
        if name in pins and not low - _SLACK <= pins[name] <= high + _SLACK:
            raise InputError(
                f"domain '{name}' cannot be {pins[name]:g}: its bounds are {_interval((low, high))}. Give a weight within them, or "
                "other bounds."
            )
    whole = bounded(own, pins, bounds)
    least = {name: float(low) for name, low in zip(own.names, whole.floor, strict=True) if low > 0}
    if sum(least.values()) > 1 + _SLACK:
        raise InputError(
            f"pins and lower bounds sum to {sum(least.values()):.6g}, more than 1: {shares_text(least)}. Lower some of them."
        )
    most = {
        name: float(high)
        for name, high in zip(own.names, whole.cap, strict=True)
        if name not in left_out or name in pins
    }
    if sum(most.values()) < 1 - _SLACK:
        out = f" (weight 0: {listed(sorted(left_out))})" if left_out else ""
        raise InputError(
            f"pins and upper bounds sum to {sum(most.values()):.6g}, less than 1: {shares_text(most)}{out}. Raise some of them."
        )
    check_sources(whole.floor, np.array([most.get(name, 0.0) for name in own.names]), own.sources)


def _interval(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}..{pair[1]:g}"
