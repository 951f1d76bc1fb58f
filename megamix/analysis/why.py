"""``megamix why``: what moved a weight of a run, from its record alone.

It finds a change of weights, runs the run's own mixer again on altered losses to take the change apart
(`megamix.analysis.causes`), and names the samples behind the loss that moved most.

Legend: K domains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megamix.analysis.causes import Causes, find_causes
from megamix.analysis.replayable import ReplayableRun
from megamix.analysis.samples import SampleReader
from megamix.core.errors import InputError, did_you_mean
from megamix.core.text import ABSENT, Report, Table, listed, number, plural, shortened
from megamix.training.records.recorded_run import RecordedRun

Floats = NDArray[np.float64]

_EXCERPT = 160
_MOST_SAMPLES = 4
_MOST_MOVES = 5
_KEPT_APART = ("domain_names", "domain_weights")


@dataclass(frozen=True)
class Move:
    """A change of one domain's weight.

    Attributes:
        line: of weights.jsonl, the one that changed it.
        before, after: the weights in force; ``before`` is None where the domain was not there.
    """

    line: Mapping[str, Any]
    earlier: Mapping[str, Any]
    domain: str
    before: float | None
    after: float

    @property
    def size(self) -> float:
        """How far the weight moved, either way."""
        return abs(self.after - (self.before or 0.0))


def why(run_dir: Path, domain: str | None = None, step: int | None = None) -> Report:
    """Explains a change of weights in words and numbers.

    Args:
        domain: whose weight; default: of the change asked for, the one that moved most.
        step: the step (counted from 1, as in weights.jsonl and on the console) from whose losses the change follows, or
            the last change before it; default: the change in which a weight moved most.

    Raises:
        InputError: no such run, domain or step, or no change on record.
    """
    run = RecordedRun.open(run_dir)
    if domain is not None and domain not in run.domain_names:
        raise InputError(f"--domain {domain}: {run_dir} has no such domain." + did_you_mean(domain, run.domain_names))
    moves = _moves(run, domain, step)
    move = max(moves, key=lambda move: move.size)
    parts: list[str | Table] = [_headline(move)]
    causes, missing = _causes(run, move)
    if causes is not None:
        parts += _taken_apart(run, move, causes)
    elif missing:
        parts.append(missing)
    if (terms := _terms(move)) is not None:
        parts.append(terms)
    if step is None and (others := _other_moves(moves, move)) is not None:
        parts.append(others)
    return Report(parts)


def _moves(run: RecordedRun, domain: str | None, step: int | None) -> list[Move]:
    """The changes that are asked about, one or more.

    Raises:
        InputError: there is none.
    """
    lines = run.ledger.lines
    found = [pair for pair in itertools.pairwise(lines) if step is None or pair[1]["step"] <= step]
    if step is not None:
        found = found[-1:]
    if not found:
        first = f"The first is of step {lines[1]['step']}." if len(lines) > 1 else "It has had one mixture so far."
        when = "" if step is None else f" up to step {step}"
        raise InputError(f"{run.run_dir}: no change of weights is on record{when}. {first}")
    moves = [_largest(earlier, line, domain) for earlier, line in found]
    known = [move for move in moves if move is not None]
    if not known:
        raise InputError(f"{run.run_dir}: the domain {domain} was not there at step {step}. Ask for another step.")
    return known


def _largest(earlier: Mapping[str, Any], line: Mapping[str, Any], domain: str | None) -> Move | None:
    names, after = line["domain_names"], np.asarray(line["domain_weights"], np.float64)
    if domain is not None and domain not in names:
        return None
    before = np.asarray(earlier["domain_weights"], np.float64)
    if names != earlier["domain_names"]:
        held = dict(zip(earlier["domain_names"], before.tolist(), strict=True))
        before = np.array([held.get(name, np.nan) for name in names])
    place = int(np.argmax(np.abs(after - np.nan_to_num(before)))) if domain is None else names.index(domain)
    known = None if np.isnan(before[place]) else float(before[place])
    return Move(line, earlier, names[place], known, float(after[place]))


def _headline(move: Move) -> str:
    line = move.line
    after = number(move.after)
    if move.before is None:
        how = f"began with {after}"
    elif move.before == move.after:
        how = f"stayed at {after}"
    else:
        how = f"{'rose' if move.after > move.before else 'fell'} from {number(move.before)} to {after}"
    return (
        f"{move.domain} {how} after step {line['step']}, in force from position {line['position']:,} "
        f"(step {line['effective_step'] + 1})."
    )


def _causes(run: RecordedRun, move: Move) -> tuple[Causes | None, str]:
    """The change taken apart, or why it was made or cannot be."""
    line = move.line
    if change := line.get("change"):
        parts = ", ".join(change.get("parts", [])) or "domains"
        return None, f"A resume changed the run there ({parts}); no rule moved the weight."
    if "statistics" not in line:
        return None, "It is a later stage of the run's mixture; no rule moved the weight."
    try:
        replayable = ReplayableRun.open(run.run_dir)
        if line["step"] > replayable.statistics.num_steps:
            raise InputError(f"the sums of step {line['step']} are not on record yet.")
        domain = replayable.statistics.domain_names.index(move.domain)
        is_steered = bool(line.get("steering"))
        return find_causes(replayable, line["step"], domain, move.before or 0.0, is_steered=is_steered), ""
    except InputError as problem:
        return None, f"It cannot be taken apart into causes: {problem}"


def _taken_apart(run: RecordedRun, move: Move, causes: Causes) -> Iterator[str | Table]:
    if causes.is_stage:
        yield "It is a later stage of the run's mixture, before the rule's first change."
    else:
        yield _sentence(run, move, causes)
    steps = f"step {causes.steps[1]}" if causes.steps[0] == causes.steps[1] else "steps {} to {}".format(*causes.steps)
    words = (
        f"{'the stage' if causes.is_stage else run.config.mixer.name}, had the losses of {steps} been usual",
        f"losses of the other domains in {steps}",
        f"its own loss in {steps}",
        "bounds (min_weight, max_weight, max_epochs)",
        f"steering ({_steering_text(move.line)})",
    )
    rows = [("before", "", number(causes.before))]
    rows += [
        (what, f"{by:+.4f}", number(to))
        for what, by, to in zip(
            words[: 5 if causes.is_steered else 4], _parts(causes).values(), _reached(causes)[1:], strict=True
        )
    ]
    yield Table(("cause", "moved the weight by", "to"), rows)
    names = move.line["domain_names"]
    place = names.index(move.domain)
    shown = [place] if causes.other is None else [place, causes.other[0]]
    yield Table(
        ("domain", "loss", "tokens", "usual loss", "usual spread", "of steps"),
        [
            (
                names[k],
                _known(float(causes.loss[k])),
                f"{int(causes.tokens[k]):,}",
                _known(float(causes.usual_loss.loss[k])),
                _known(float(causes.usual_loss.spread[k])),
                str(int(causes.usual_loss.num_steps[k])),
            )
            for k in shown
        ],
    )
    if (culprit := _culprit(causes, place)) is not None:
        yield from _samples(run, names[culprit], causes)


def _parts(causes: Causes) -> dict[str, float]:
    """What each cause moved the weight by."""
    names = ("course", "others", "own", "bounds", "steering")
    return dict(zip(names[: 5 if causes.is_steered else 4], np.diff(_reached(causes)).tolist(), strict=True))


def _reached(causes: Causes) -> list[float]:
    """The weights between the causes, from the one before the change to the one in force."""
    found = [causes.before, causes.usual, causes.others, causes.own, causes.bounded]
    return [*found, causes.allowed] if causes.is_steered else found


def _steering_text(line: Mapping[str, Any]) -> str:
    """The commands of a line, or what earlier ones have in force."""
    steering = line.get("steering") or {}
    commands = [command["what"] for command in steering.get("commands", ())]
    return "; ".join(commands) or listed(key for key in steering if key != "commands")


def _main_cause(causes: Causes) -> str:
    """Of `_parts`, the one that moved the weight most."""
    parts = _parts(causes)
    return max(parts, key=lambda name: abs(parts[name]))


def _culprit(causes: Causes, place: int) -> int | None:
    """The domain whose loss of the interval is the main cause."""
    main = _main_cause(causes)
    if causes.is_stage or main not in ("own", "others"):
        return None
    return place if main == "own" else None if causes.other is None else causes.other[0]


def _sentence(run: RecordedRun, move: Move, causes: Causes) -> str:
    """The main cause, in words."""
    names = move.line["domain_names"]
    place = names.index(move.domain)
    main = _main_cause(causes)
    if main == "own":
        return (
            f"Mostly by its own loss: {_loss_in_words(causes, place)} "
            f"With its usual loss the rule would have asked for {number(causes.others)}."
        )
    if main == "others":
        if causes.other is None:
            return "Mostly by the losses of other domains, none of them alone."
        other, by = causes.other
        words = _loss_in_words(causes, other)
        return f"Mostly by the losses of other domains, most of all {names[other]} ({by:+.4f}): {words}"
    if main == "steering":
        return (
            f"Mostly by steering ({_steering_text(move.line)}): the rule {run.config.mixer.name} and the bounds would have it at "
            f"{number(causes.bounded)}."
        )
    if main == "bounds":
        return f"Mostly by the bounds: the rule {run.config.mixer.name} asked for {number(causes.own)}."
    return (
        f"Mostly by what the rule {run.config.mixer.name} had estimated from earlier steps, and by its schedule: usual losses "
        f"would have taken it to {number(causes.usual)}."
    )


def _loss_in_words(causes: Causes, place: int) -> str:
    loss, usual, spread = causes.loss[place], causes.usual_loss.loss[place], causes.usual_loss.spread[place]
    if np.isnan(loss):
        return "it had no tokens."
    text = f"{loss:.2f} nats per token over {plural(int(causes.tokens[place]), 'token')}"
    if np.isnan(usual):
        return f"{text}; it was seen too seldom before to say what is usual."
    far = f", {abs(loss - usual) / spread:.0f} times the usual spread away" if spread > 0 else ""
    return f"{text}, where {usual:.2f} is usual (median of its last {causes.usual_loss.num_steps[place]} steps{far})."


def _samples(run: RecordedRun, domain: str, causes: Causes) -> Iterator[str | Table]:
    """The samples of a domain in the last step of the interval that has any."""
    try:
        for step in range(causes.steps[1], causes.steps[0] - 1, -1):
            reader = SampleReader(run, step - 1)
            positions = reader.positions_of(domain)
            if positions:
                break
        else:
            return
        samples = [reader.sample(position) for position in positions[:_MOST_SAMPLES]]
    except InputError as problem:
        yield f"Its samples cannot be shown: {problem}"
        return
    head = f"{plural(len(positions), 'sample')} of {domain} in step {step}"
    if len(positions) > 1:
        head += "; only their mean loss is on record"
    if len(positions) > len(samples):
        head += f"; the first {len(samples)}"
    lines = [
        f"  position {sample.position}, documents {'; '.join(sample.documents)}\n"
        f"    {shortened(' '.join(sample.text.split()), _EXCERPT)}"
        for sample in samples
    ]
    whole = f"The whole text: megamix inspect {run.run_dir} --sample {samples[0].position}"
    yield "\n".join([f"{head}:", *lines, whole])


def _terms(move: Move) -> Table | None:
    """What the mixer recorded of itself for the domain, before and after."""
    place = move.line["domain_names"].index(move.domain)
    rows = []
    for key, value in move.line.items():
        after, before = _term(key, value, place), None
        if move.earlier["domain_names"] == move.line["domain_names"]:
            before = _term(key, move.earlier.get(key), place)
        if after is not None and before != after:
            rows.append((key, _known(before), _known(after)))
    return Table(("recorded by the rule", "before", "after"), rows) if rows else None


def _term(key: str, value: Any, place: int) -> float | None:
    """A number of the mixer's record that says something of a domain; None for what does not."""
    if key in _KEPT_APART or key in ("step", "effective_step", "position"):
        return None
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and len(value) > place:
        value = value[place]
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        return None
    return float(value)


def _other_moves(moves: Sequence[Move], shown: Move) -> Table | None:
    """The next largest changes of the run."""
    rest = sorted((move for move in moves if move is not shown and move.size), key=lambda move: -move.size)
    if not rest:
        return None
    return Table(
        ("other large changes", "after step", "from", "to"),
        [
            (
                move.domain,
                str(move.line["step"]),
                ABSENT if move.before is None else number(move.before),
                number(move.after),
            )
            for move in rest[:_MOST_MOVES]
        ],
    )


def _known(value: float | None) -> str:
    return ABSENT if value is None or np.isnan(value) else f"{value:.4g}"
