"""Steering of a run: the weights that follow from its rule and from the commands of its journal.

The rule goes on observing whatever is in force. Steering acts on what it asks for, on rank 0's mixing thread; what it
does at a step depends on its state and on the commands due there alone.

Legend: K domains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.mixing.mixers import Mixer
from megamix.mixing.steering.command import SteerCommand
from megamix.mixing.steering.course import Course, Place, ramp_of, steered
from megamix.mixing.steering.journal import APPLIED, CANCELLED, IGNORED, Journal
from megamix.mixing.steering.rule import RuleMaker, left_out_of
from megamix.mixing.weight_policy import WeightPolicy

Floats = NDArray[np.float64]
MOST_UNDONE = 8
"""Commands that can be taken back one after the other."""
Past = tuple[tuple[str, Course], ...]


@dataclass(frozen=True)
class Steered:
    """What follows from a step.

    Attributes:
        mixer: the rule from here on.
        weights: float64 [K].
        record: for the line of weights.jsonl; empty where steering has nothing in force.
    """

    mixer: Mixer
    weights: Floats
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def recorded(self) -> dict[str, Any]:
        """Its key in the line of weights.jsonl."""
        return {"steering": self.record} if self.record else {}


class Steering:
    """The course of a run, on rank 0.

    Args:
        policy: of the run.
        seq_length: tokens of a sample.
        state: of `state_dict`.
    """

    def __init__(
        self,
        policy: WeightPolicy,
        journal: Journal,
        make: RuleMaker,
        seq_length: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._policy, self._journal, self._make, self._seq_length = policy, journal, make, seq_length
        self._course: Course | None = None
        self._past: Past = ()
        self._handled: dict[str, None] = {}
        self._is_stirred = False
        self._notes: list[str] = []
        if state is not None:
            self._handled = dict.fromkeys(state["handled"])
            self._course = None if state["course"] is None else Course.from_json(state["course"])
            self._past = tuple((name, Course.from_json(course)) for name, course in state["past"])
            self._is_stirred = bool(state["stirred"])

    @property
    def course(self) -> Course | None:
        """What is in force; None before the first command."""
        return self._course

    def state_dict(self) -> dict[str, Any]:
        """Everything to continue with exactly, JSON-serialisable."""
        return {
            "handled": list(self._handled),
            "course": None if self._course is None else self._course.to_json(),
            "past": [[name, course.to_json()] for name, course in self._past],
            "stirred": self._is_stirred,
        }

    def adopt(self, changed: Collection[str], *, other_domains: bool) -> None:
        """Goes on in a run that was changed on resume: pins and bounds of domains that are there, and a hold, stay; a
        changed mixture, or other domains, take the place of the free weights, a changed mixer that of the rule.

        Args:
            changed: parts of the fingerprints that differ.
        """
        if "sequence" in changed:
            self._keep_tokens()
        changed = {"mixture", "mixer", "constraints"} & set(changed)
        if self._course is None or not (changed or other_domains):
            return
        course, names = self._course, self._make.domains
        self._course = replace(
            course,
            free=None if other_domains or "mixture" in changed else course.free,
            pins={name: weight for name, weight in course.pins.items() if name in names},
            bounds={name: pair for name, pair in course.bounds.items() if name in names},
            mixer=None if "mixer" in changed else course.mixer,
            ramp=None,
        )
        self._past, self._is_stirred = (), True

    def _keep_tokens(self) -> None:
        """A ramp that begins after a change of the samples' length, and was announced before it, keeps its tokens."""
        course, batches = self._course, self._policy.batches
        if course is None or course.ramp is None or not batches.past:
            return
        length, end_step = batches.past[-1]
        if course.ramp.start >= batches.position(end_step):
            samples = course.ramp.samples * length / batches.seq_length
            self._course = replace(course, ramp=replace(course.ramp, samples=samples))

    def take_notes(self) -> tuple[str, ...]:
        """What people may want to know, since the last call."""
        notes = (*self._journal.take_problems(), *self._notes)
        self._notes = []
        return notes

    def follow(
        self,
        step: int,
        wanted: Floats | None,
        mixer: Mixer,
        in_force: Callable[[], Floats],
        counts: Callable[[], NDArray[np.int64]],
    ) -> Steered | None:
        """The weights that follow from ``step``, which counts from 0; None where nothing was computed anew.

        Args:
            wanted: float64 [K], what the rule asks for; None: nothing new.
            in_force: the weights that hold at the effective step if nothing changes.
            counts: int64 [K], samples of each domain before the effective step.

        Raises:
            InputError: the constraints cannot be met.
        """
        effective_step = self._policy.effective_step(step)
        position = self._policy.effective_position(step)
        due = self._journal.due(step + 1, effective_step, self._handled)
        if self._course is None and not due:
            return follow(None, self._policy, mixer, wanted, step, in_force, counts)
        course = self._course or Course()
        moves, self._is_stirred = self._is_stirred or course.ramp is not None, False
        if wanted is not None and not course.held:
            course, moves = replace(course, free=wanted, rule_changes=course.rule_changes + 1), True
        elif course.free is None:
            course = replace(course, free=in_force())
        self._course = course = replace(course, left_out=left_out_of(mixer))
        if not moves and wanted is None and not due:
            return None
        batches = self._policy.batches
        length = batches.length(effective_step) if batches.past else self._seq_length
        place = Place(self._policy.constraints, counts(), position, length, batches)
        current = course.weights(place) if moves else in_force()
        if course.ramp is not None and course.ramp.share(place.on_the_way(course.ramp)) >= 1:
            self._course = replace(course, ramp=None)
        applied = []
        for command in due:
            heeded = self._heed(command, mixer, current, place, step)
            if heeded is not None:
                mixer, current = heeded
                applied.append(_told(command))
        if not moves and wanted is None and not applied:
            return None
        return Steered(mixer, current, {**({"commands": applied} if applied else {}), **self._course.record()})

    def _heed(
        self, command: SteerCommand, mixer: Mixer, current: Floats, place: Place, step: int
    ) -> tuple[Mixer, Floats] | None:
        """Gives a command its effect; returns rule and weights after it, or None where it has none (yet)."""
        if command.id in self._handled:  # cancelled by one before it
            return None
        assert self._course is not None
        course, past, cancels, weights = self._course, self._past, False, current
        try:
            if command.undo is None:
                course, past = steered(course, command, current, place), (*past, (command.id, course))[-MOST_UNDONE:]
            elif self._journal.is_waiting(command.undo, self._handled):
                cancels = True
            else:
                course, past = self._undone(command, current, place), past[:-1]
            if not cancels:
                weights = course.weights(place)
            if course.mixer != self._course.mixer or course.left_out != self._course.left_out:
                mixer = self._make(course, mixer)
        except Exception as problem:  # of a custom mixer anything; a command must not end a run
            outcome = IGNORED
            text = str(problem) if isinstance(problem, InputError) else f"{type(problem).__name__}: {problem}"
        else:
            outcome, text = APPLIED, command.describe()
        at = (step + 1, self._policy.effective_step(step), place.position)
        if not self._journal.answer(command.id, outcome, *at, text):
            return None
        self._handled[command.id] = None
        self._note(command, f"ignored: {text}" if outcome == IGNORED else f"from step {at[1] + 1} on: {text}")
        if outcome == IGNORED:
            return None
        if cancels and command.undo is not None:
            # After the undo's own answer, so that the same order cancels it again after a resume.
            self._journal.answer(command.undo, CANCELLED, *at, f"undone by {command.id}")
            self._handled[command.undo] = None
        self._course, self._past = course, past
        return mixer, weights

    def _undone(self, command: SteerCommand, current: Floats, place: Place) -> Course:
        """The course of before the last command. Weights that the rule has given since stay."""
        assert self._course is not None
        if not self._past or self._past[-1][0] != command.undo:
            last = f"the last one in force is {self._past[-1][0]}" if self._past else "none can be"
            raise InputError(f"command {command.undo} cannot be taken back: {last}.")
        before, now = self._past[-1][1], self._course
        return replace(
            before,
            free=before.free if before.rule_changes == now.rule_changes else now.free,
            rule_changes=now.rule_changes,
            ramp=ramp_of(command, current, place),
        )

    def _note(self, command: SteerCommand, text: str) -> None:
        why = f" ({command.note})" if command.note else ""
        note = f"steering {command.id} by {command.who or 'somebody'}{why}, {text}"
        if self._journal.is_live:  # a replay goes through the same commands time and again
            get_logger().info("%s", note)
        self._notes.append(note)


def follow(
    steering: Steering | None,
    policy: WeightPolicy,
    mixer: Mixer,
    wanted: Floats | None,
    step: int,
    in_force: Callable[[], Floats],
    counts: Callable[[], NDArray[np.int64]],
) -> Steered | None:
    """`Steering.follow`, or the weights that the rule alone asks for."""
    if steering is not None:
        return steering.follow(step, wanted, mixer, in_force, counts)
    if wanted is None:
        return None
    return Steered(mixer, policy.allowed(wanted, counts(), policy.effective_position(step)))


def _told(command: SteerCommand) -> dict[str, Any]:
    """A command in a line of weights.jsonl."""
    found = {"id": command.id, "who": command.who, "note": command.note, "what": command.describe()}
    return {key: value for key, value in found.items() if value}
