"""Steering from the command line: a command is checked, added to the journal, and its answer waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import first_problem, validate
from megamix.core.errors import InputError, MegamixError
from megamix.core.paths import expand
from megamix.core.text import listed
from megamix.core.yaml_text import parse_yaml
from megamix.mixing.mixers import RecordedConfig, StaticConfig, normalise_weights
from megamix.mixing.sources import weights_by_domain
from megamix.mixing.steering.command import SteerCommand
from megamix.mixing.steering.course import Course, Place, steered
from megamix.mixing.steering.journal import IGNORED, NOTICED, append_command, read_answers
from megamix.mixing.steering.rule import RuleMaker
from megamix.mixing.weight_files import read_weights
from megamix.training.mixture import DocumentsMixture
from megamix.training.steer.steered_run import SteeredRun

POLL_SECONDS = 0.5
MOST_SHOWN = 8


@dataclass(frozen=True)
class Wishes:
    """The options of ``megamix steer``, as they were given."""

    set: Sequence[str] = ()
    mixture: str | None = None
    pin: Sequence[str] = ()
    unpin: Sequence[str] = ()
    bounds: Sequence[str] = ()
    hold: bool | None = None
    mixer: str | None = None
    undo: bool = False
    at_step: int | None = None
    ramp: float | None = None
    note: str = ""


def steer(folder: Path, wishes: Wishes, timeout: float | None) -> Iterator[str]:
    """Gives a run a command; yields what is to be said.

    Args:
        timeout: seconds to wait for the answer; None: not at all.

    Raises:
        InputError: the command cannot be done; or the run has ignored it.
        MegamixError: no answer in time.
    """
    run = SteeredRun.open(folder)
    parts = _parts(run, wishes)
    yield from _checked(run, parts)
    command = append_command(folder, parts)
    when = f" after step {command.at_step}" if command.at_step else ""
    yield f"command {command.id}{when}: {command.describe()}"
    if timeout is None:
        yield "not waited for: `megamix inspect` and steered.jsonl say when it takes effect"
        return
    yield _answer(run, command, timeout)


def _parts(run: SteeredRun, wishes: Wishes) -> dict[str, Any]:
    """The keys of the command."""
    parts: dict[str, Any] = {
        "set": _weights("--set", wishes.set),
        "pin": _weights("--pin", wishes.pin),
        "unpin": tuple(wishes.unpin),
        "bounds": {name: _bounds(name, value) for name, value in _by_domain("--bounds", wishes.bounds)},
    }
    parts = {key: value for key, value in parts.items() if value}
    if wishes.hold is not None:
        parts["hold"] = wishes.hold
    if wishes.mixture is not None:
        parts["mixture"] = dict(zip(run.names, _mixture(run, wishes.mixture).tolist(), strict=True))
    if wishes.mixer is not None:
        given = parse_yaml(wishes.mixer, "--mixer")
        if not isinstance(given, dict):
            raise InputError(
                f"--mixer {wishes.mixer}: expected a mixer as in a config, such as {{name: odm, preset: paper}}."
            )
        parts["mixer"] = given
    if wishes.undo:
        if not run.commands:
            raise InputError(f"{run.folder} was given no command that could be taken back.")
        parts["undo"] = run.commands[-1].id
    if wishes.at_step is not None:
        parts["at_step"] = wishes.at_step
    if wishes.ramp is not None:
        if not math.isfinite(wishes.ramp):
            raise InputError(f"--ramp is {wishes.ramp}, expected a number of tokens.")
        parts["ramp_tokens"] = wishes.ramp
    return {**parts, "note": wishes.note}


def _by_domain(option: str, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for text in given:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value:
            raise InputError(f"{option} {text}: expected DOMAIN=VALUE, such as {option} code=0.3.")
        if name in seen:
            raise InputError(f"{option} names the domain '{name}' twice. Name it once.")
        seen.add(name)
        yield name, value


def _weights(option: str, given: Sequence[str]) -> dict[str, float]:
    return {name: _number(f"{option} {name}", value) for name, value in _by_domain(option, given)}


def _bounds(name: str, value: str) -> tuple[float, float]:
    low, dots, high = value.partition("..")
    if not dots:
        raise InputError(f"--bounds {name}={value}: expected LOW..HIGH, such as 0.1..0.4, 0.1.. or ..0.4.")
    option = f"--bounds {name}"
    pair = (_number(option, low) if low else 0.0, _number(option, high) if high else 1.0)
    if pair[0] > pair[1]:
        raise InputError(f"{option}: {pair[0]:g} is above {pair[1]:g}. Give the lower bound first.")
    return pair


def _number(option: str, text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= 1:
        raise InputError(f"{option}={text}: expected a number from 0 to 1.")
    return found


def _mixture(run: SteeredRun, given: str) -> NDArray[np.float64]:
    """float64 [K], sum 1."""
    if given == "natural":
        return run.natural()
    if given == "uniform":
        return np.full(len(run.names), 1 / len(run.names))
    if given.lstrip().startswith("{"):
        weights = parse_yaml(given, "--mixture")
        if isinstance(weights, dict) and weights.keys() == {"documents"}:
            return validate(DocumentsMixture, weights, "--mixture").weights(run.frame(), "--mixture")
        weights = weights_by_domain(weights, "--mixture") if isinstance(weights, dict) else weights
    else:
        weights = read_weights(Path(expand(given)), run.names)
    return normalise_weights(weights, run.names, "--mixture")


def _checked(run: SteeredRun, parts: Mapping[str, Any]) -> Iterator[str]:
    """Refuses a command that the run would ignore; yields what its user should know."""
    try:
        command = SteerCommand(id="new", **parts)
    except ValueError as problem:
        raise InputError(first_problem(problem).removeprefix("it: Value error, ")) from problem
    steps, first = run.config.train.steps, run.first_step()
    if run.has_ended and first >= steps:
        raise InputError(f"{run.folder} is done: all its {steps} steps are. Give it more (train.steps) first.")
    if command.at_step is not None and not first < command.at_step < steps:
        raise InputError(
            f"--at-step {command.at_step}: the run stands after step {first} and ends after step {steps}. Give a step between."
        )
    if command.undo is not None:
        return
    place = run.place()
    before = run.course(place)
    after = steered(before, command, run.weights, place)
    _check_rule(run, command, before, after)
    if command.mixer is None:
        yield _moves(run, after, place)
    left = run.config.batches.tokens(steps) - run.config.batches.tokens(command.at_step or first)
    if command.ramp_tokens > left:
        yield f"the run ends within the ramp: of its {command.ramp_tokens:g} tokens about {max(left, 0):,} are left"
    rule = command.mixer or before.mixer or {"name": getattr(run.config.mixer, "name", "")}
    if (command.set or command.mixture) and not after.held and rule.get("name") != StaticConfig().name:
        yield (
            f"the rule {rule.get('name')} goes on from there at its next update; --pin keeps a weight, --hold keeps all of "
            "them"
        )


def _check_rule(run: SteeredRun, command: SteerCommand, before: Course, after: Course) -> None:
    """Raises InputError where the run's rule cannot be what the command asks for."""
    own = run.config.mixer
    if isinstance(own, RecordedConfig) or (command.mixer is None and not after.left_out):
        return  # a custom mixer's code may be elsewhere: the run answers
    make = RuleMaker(own, run.names, None)
    make(after, make.first(before, run.weights, ()))


def _moves(run: SteeredRun, after: Course, place: Place) -> str:
    """The weights before and after, as far as they can be told from here."""
    target = Course(after.free, after.left_out, after.pins, after.bounds).weights(place)
    order = np.argsort(-np.abs(target - run.weights), kind="stable").tolist()
    moved = [
        f"{run.names[k]} {run.weights[k]:.4f} -> {target[k]:.4f}"
        for k in order
        if abs(target[k] - run.weights[k]) > 5e-5
    ]
    return f"weights: {listed(moved, MOST_SHOWN)}" if moved else "weights stay as they are"


def _answer(run: SteeredRun, command: SteerCommand, timeout: float) -> str:
    """Waits for the run's answer; returns it in words."""
    deadline = time.monotonic() + timeout
    while True:
        is_trained = run.is_trained  # before its answers are read: what it says as it ends is not missed
        answer = next((each for each in reversed(read_answers(run.folder)) if each.get("id") == command.id), None)
        if answer is not None:
            return _in_words(answer)
        if is_trained is False:
            return f"nobody trains {run.folder} now: the command takes effect when it is started again"
        if time.monotonic() >= deadline:
            raise MegamixError(
                f"no answer from {run.folder} in {timeout:g} seconds. Command {command.id} stays in its journal and takes effect "
                "when the run reads it; `megamix steer RUN --undo` takes it back."
            )
        time.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.01)))


def _in_words(answer: Mapping[str, Any]) -> str:
    if answer["outcome"] == IGNORED:
        raise InputError(f"the run has ignored command {answer['id']}: {answer['text']}")
    if answer["outcome"] == NOTICED:
        return f"the run has it: it takes effect after step {answer['effective_step']}"
    return f"in force from step {answer['effective_step'] + 1} on (sample {answer['position']:,})"
