"""Alerts: what somebody who looks after a run for weeks wants to be told of. Rank 0 only.

Conditions are looked at with the lines of the record (``log.every`` steps, evaluations), never within a step. One that
holds is an event of the run, a line on the console, an alert of Weights & Biases where the run logs there, and the
command of ``alerts.run``; then it is silent until it has ceased to hold, and for ``alerts.again_after`` steps.

Legend: K domains.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.core.paths import expand
from megamix.mixing.constraints import Constraints
from megamix.training.config import AlertsConfig

if TYPE_CHECKING:
    from megamix.mixing.exchange import MixReport

Floats = NDArray[np.float64]
_Found = tuple[dict[str, float], str]
"""Numbers, and the same in words."""
_FEWEST_INTERVALS, _MOST_INTERVALS = 5, 20
_NEAR = 1e-9


@dataclass(frozen=True)
class Alert:
    """Something that somebody should know.

    Attributes:
        kind: the key of `AlertsConfig` that asks for it.
        domain: None where it is of the run.
        numbers: what was found, and the limit.
        text: the same in words.
    """

    kind: str
    domain: str | None
    numbers: dict[str, float]
    text: str


class Alerts:
    """Looks at what a run records.

    Args:
        constraints: of the run: the bounds that weights may stand at, and how often a domain may be read.
        tell: called with each alert and the step.
        evaluations: lines of evaluations before a resume.
        weights: float64 [K], the last ones before those that it is told of; None: not known.
    """

    def __init__(
        self,
        config: AlertsConfig,
        constraints: Constraints,
        *,
        tell: Callable[[Alert, int], None],
        evaluations: Sequence[Mapping[str, Any]] = (),
        weights: Floats | None = None,
    ) -> None:
        self._config = config
        self._constraints = constraints
        self._tell = tell
        self._told: set[tuple[str, str | None]] = set()  # what was told and still holds
        self._past: dict[tuple[str, str | None], int] = {}  # step of the last alert
        kept = 1 + max(config.forgetting or 0, config.stalled or 0)
        self._losses = {name: _Losses(kept) for name in constraints.names}
        self._speeds: deque[float] = deque(maxlen=_MOST_INTERVALS)
        self._weights = weights
        self._bound_since: dict[str, int] = {}
        self._commands: list[subprocess.Popen[bytes]] = []
        for line in evaluations:
            self._remember(line)

    def weights(self, report: MixReport) -> None:
        """Looks at the weights that follow from a step."""
        if not report.updated:
            return
        config, step, weights = self._config, report.step + 1, report.segment.weights
        if config.jump is not None and self._weights is not None:
            self._look(step, "jump", self._jumps(self._weights, weights, config.jump))
        self._weights = weights
        if config.at_bound is not None:
            self._look(step, "at_bound", self._at_bound(weights, report.effective_step, config.at_bound))
        self._look(step, "runs_out", self._run_out(report))

    def interval(self, step: int, line: Mapping[str, Any]) -> None:
        """Looks at a ``train`` line of metrics.jsonl."""
        self._see_to_commands()
        config = self._config
        if config.data_wait is not None:
            waited, whole = line["data_wait_seconds"], line["step_seconds"]
            share = waited / whole if whole > 0 else 0.0
            text = f"{share:.0%} of a step is spent waiting for data ({waited:.3g} of {whole:.3g} s)"
            numbers = {"share": share, "limit": config.data_wait}
            self._judge(step, Alert("data_wait", None, numbers, text), share > config.data_wait)
        if config.slowdown is not None:
            speed = line["tokens_per_second"]
            if len(self._speeds) >= _FEWEST_INTERVALS:
                usual = median(self._speeds)
                text = f"{speed:,.0f} tokens/s, where {usual:,.0f} is usual (median of {len(self._speeds)} lines)"
                numbers = {"tokens_per_second": speed, "usual": usual, "limit": config.slowdown}
                self._judge(step, Alert("slowdown", None, numbers, text), speed < (1 - config.slowdown) * usual)
            self._speeds.append(speed)

    def evaluation(self, step: int, line: Mapping[str, Any]) -> None:
        """Looks at an ``evaluate`` line of metrics.jsonl."""
        self._remember(line)
        for kind, most, found in (
            ("forgetting", self._config.forgetting, _rises),
            ("stalled", self._config.stalled, _no_better),
        ):
            if most is not None:
                every = ((name, found(losses, most)) for name, losses in self._losses.items())
                self._look(step, kind, {name: what for name, what in every if what is not None})

    def skipped(self, step: int, text: str) -> None:
        """A step was left out, as its loss was not finite."""
        if self._config.non_finite:
            self._raise(Alert("non_finite", None, {}, text), step)

    def _remember(self, line: Mapping[str, Any]) -> None:
        for name, losses in self._losses.items():
            loss = line["domain_loss"].get(name)
            if loss is not None:
                losses.add(float(loss))

    def _look(self, step: int, kind: str, found: Mapping[str, _Found]) -> None:
        """Judges one condition of the domains, given those that it holds for."""
        self._told = {(told, name) for told, name in self._told if told != kind or name in found}
        for name, (numbers, words) in found.items():
            self._judge(step, Alert(kind, name, numbers, f"{name}: {words}"), True)

    def _judge(self, step: int, alert: Alert, holds: bool) -> None:
        key = alert.kind, alert.domain
        if not holds:
            self._told.discard(key)
            return
        last = self._past.get(key)
        due = last is None or step - last >= self._config.again_after
        if key not in self._told and due:
            self._told.add(key)
            self._past[key] = step
            self._raise(alert, step)

    def _raise(self, alert: Alert, step: int) -> None:
        self._tell(alert, step)
        self._run_command(alert, step)

    def _jumps(self, before: Floats, after: Floats, limit: float) -> dict[str, _Found]:
        found = {}
        for k in np.flatnonzero(np.abs(after - before) > limit).tolist():
            was, now = float(before[k]), float(after[k])
            numbers = {"before": was, "after": now, "limit": limit}
            found[self._constraints.names[k]] = numbers, f"its weight went from {was:.4f} to {now:.4f} in one change"
        return found

    def _at_bound(self, weights: Floats, step: int, most: int) -> dict[str, _Found]:
        """Domains whose weight has stood at min_weight or max_weight for ``most`` steps."""
        names, low, high = self._constraints.names, self._constraints.floor, self._constraints.cap
        at_low, at_high = (low > 0) & (weights <= low + _NEAR), (high < 1) & (weights >= high - _NEAR)
        since, self._bound_since, found = self._bound_since, {}, {}
        for k in np.flatnonzero(at_low | at_high).tolist():
            name = names[k]
            self._bound_since[name] = since.get(name, step)
            steps = step - self._bound_since[name]
            if steps >= most:
                which, bound = ("min_weight", float(low[k])) if at_low[k] else ("max_weight", float(high[k]))
                numbers = {"weight": float(weights[k]), "bound": bound, "steps": steps}
                found[name] = numbers, f"its weight has stood at its {which}, {bound:g}, for {steps} steps"
        return found

    def _run_out(self, report: MixReport) -> dict[str, _Found]:
        """Domains that at these weights are read more often than wanted by the end of the run."""
        constraints = self._constraints
        asked = np.inf if self._config.epochs is None else self._config.epochs
        # A domain that the bounds keep within max_epochs does not run out.
        limits = np.minimum(asked, np.inf if constraints.on_exhausted == "cap" else constraints.max_epochs)
        if np.isinf(limits).all():
            return {}
        limits = np.broadcast_to(limits, constraints.num_samples.shape)
        left = max(constraints.total_samples - report.position, 0)
        epochs = (report.segment.counts + report.segment.weights * left) / constraints.num_samples
        found = {}
        for k in np.flatnonzero(epochs > limits + 1 / constraints.num_samples).tolist():
            number, limit = float(epochs[k]), float(limits[k])
            words = f"at its present weight it is read {number:.2f} times by the end, above {limit:g}"
            found[constraints.names[k]] = {"epochs": number, "limit": limit}, words
        return found

    def _run_command(self, alert: Alert, step: int) -> None:
        """Starts the command of ``alerts.run``, with the alert as one line of JSON on its standard input."""
        self._see_to_commands()
        if not self._config.run:
            return
        line = {"step": step, "alert": alert.kind, "domain": alert.domain, "text": alert.text, **alert.numbers}
        try:
            words = (expand(self._config.run[0]), *self._config.run[1:])
            command = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
            assert command.stdin is not None
            with suppress(BrokenPipeError), command.stdin:  # it need not read
                command.stdin.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            get_logger().warning("alerts.run: %s cannot be run: %s", self._config.run[0], error.strerror or error)
            return
        self._commands.append(command)

    def _see_to_commands(self) -> None:
        """Says which of the commands that have ended have failed."""
        ended = [command for command in self._commands if command.poll() is not None]
        self._commands = [command for command in self._commands if command not in ended]
        for command in ended:
            if command.returncode:
                get_logger().warning("alerts.run: %s ended with %d", self._config.run[0], command.returncode)


class _Losses:
    """Validation losses of a domain: the last ``kept``, and the lowest of those before."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self.last: list[float] = []
        self.best_before = math.inf

    def add(self, loss: float) -> None:
        self.last.append(loss)
        if len(self.last) > self._kept:
            self.best_before = min(self.best_before, self.last.pop(0))


def _rises(losses: _Losses, number: int) -> _Found | None:
    """Whether each of the last ``number`` losses is above the one before."""
    last = losses.last[-number - 1 :]
    if len(last) <= number or any(after <= before for before, after in itertools.pairwise(last)):
        return None
    words = f"its validation loss rose in each of the last {number} evaluations, from {last[0]:.4f} to {last[-1]:.4f}"
    return {"before": last[0], "after": last[-1], "evaluations": number}, words


def _no_better(losses: _Losses, number: int) -> _Found | None:
    """Whether none of the last ``number`` losses is below the lowest before."""
    best, last = min([losses.best_before, *losses.last[:-number]]), losses.last[-number:]
    if math.isinf(best) or min(last) < best:
        return None
    words = f"none of the last {number} evaluations is below its best validation loss, {best:.4f}; the last is {last[-1]:.4f}"
    return {"best": best, "last": last[-1], "evaluations": number}, words


def check_alerts(config: AlertsConfig) -> None:
    """Refuses a command that is not on this machine.

    Raises:
        InputError: which.
    """
    if any("\0" in word for word in config.run):
        raise InputError(f"alerts.run: {list(config.run)} has a zero byte, which no program takes. Write it without.")
    if config.run and shutil.which(expand(config.run[0])) is None:
        raise InputError(
            f"alerts.run: there is no program {config.run[0]!r} here. Give its path, or a name on PATH, and its arguments as a "
            "list, such as [mail, -s, alert, me@example.org]."
        )
