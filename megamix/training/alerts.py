"""Alerts: what somebody who looks after a run for weeks wants to be told of. Rank 0 only.

Conditions are looked at with the lines of the record (``log.every`` steps, evaluations), never within a step. One that
holds is an event of the run, a line on the console, an alert of Weights & Biases where the run logs there, and the
command of ``alerts.run``; then it is silent until it has ceased to hold, and for ``alerts.again_after`` steps.

Legend: K domains.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from megamix.core.errors import InputError
from megamix.core.log import get_logger
from megamix.mixing.constraints import Constraints
from megamix.mixing.exchange import MixReport
from megamix.training.config import AlertsConfig

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
    """

    def __init__(
        self,
        config: AlertsConfig,
        constraints: Constraints,
        *,
        tell: Callable[[Alert, int], None],
        evaluations: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._config = config
        self._constraints = constraints
        self._tell = tell
        self._silent: dict[tuple[str, str | None], int] = {}  # step of the last alert of a condition that still holds
        self._past: dict[tuple[str, str | None], int] = {}
        self._losses = {name: list[float]() for name in constraints.names}
        self._speeds: deque[float] = deque(maxlen=_MOST_INTERVALS)
        self._weights: np.ndarray | None = None
        self._bound_since: dict[str, int] = {}
        self._commands: list[subprocess.Popen[bytes]] = []
        for line in evaluations:
            self._remember(line)

    def weights(self, report: MixReport) -> None:
        """Looks at the weights that follow from a step."""
        if not report.updated:
            return
        config, step = self._config, report.step + 1
        weights, names = report.segment.weights, self._constraints.names
        if config.jump is not None and self._weights is not None:
            self._look(step, "jump", names, self._jumps(weights, config.jump))
        self._weights = weights
        if config.at_bound is not None:
            self._look(step, "at_bound", names, self._at_bound(weights, report.effective_step, config.at_bound))
        self._look(step, "runs_out", names, self._run_out(report))

    def interval(self, step: int, line: Mapping[str, Any]) -> None:
        """Looks at a ``train`` line of metrics.jsonl."""
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
                self._look(step, kind, self._losses, (found(losses, most) for losses in self._losses.values()))

    def skipped(self, step: int, text: str) -> None:
        """A step was left out, as its loss was not finite."""
        if self._config.non_finite:
            self._tell(Alert("non_finite", None, {}, text), step)

    def _remember(self, line: Mapping[str, Any]) -> None:
        for name, losses in self._losses.items():
            loss = line["domain_loss"].get(name)
            if loss is not None:
                losses.append(float(loss))

    def _look(self, step: int, kind: str, names: Any, found: Any) -> None:
        """Judges one condition of every domain; ``found`` has (numbers, words) for each, or None."""
        for name, what in zip(names, found, strict=True):
            numbers, words = what or ({}, "")
            self._judge(step, Alert(kind, name, numbers, f"{name}: {words}"), what is not None)

    def _judge(self, step: int, alert: Alert, holds: bool) -> None:
        key = alert.kind, alert.domain
        if not holds:
            self._silent.pop(key, None)
            return
        last = self._past.get(key)
        due = last is None or step - last >= self._config.again_after
        if key not in self._silent and due:
            self._silent[key] = self._past[key] = step
            self._tell(alert, step)

    def _jumps(self, weights: np.ndarray, limit: float) -> Iterator[tuple[dict[str, float], str] | None]:
        assert self._weights is not None
        for before, after in zip(self._weights.tolist(), weights.tolist(), strict=True):
            far = abs(after - before) > limit
            numbers = {"before": before, "after": after, "limit": limit}
            yield (numbers, f"its weight went from {before:.4f} to {after:.4f} in one change") if far else None

    def _at_bound(self, weights: np.ndarray, step: int, most: int) -> Iterator[tuple[dict[str, float], str] | None]:
        """Domains whose weight has stood at min_weight or max_weight for ``most`` steps."""
        constraints = self._constraints
        for name, weight, low, high in zip(
            constraints.names, weights.tolist(), constraints.floor.tolist(), constraints.cap.tolist(), strict=True
        ):
            at_low, at_high = low > 0 and weight <= low + _NEAR, high < 1 and weight >= high - _NEAR
            if not (at_low or at_high):
                self._bound_since.pop(name, None)
                yield None
                continue
            steps = step - self._bound_since.setdefault(name, step)
            which, bound = ("min_weight", low) if at_low else ("max_weight", high)
            numbers = {"weight": weight, "bound": bound, "steps": steps}
            yield (
                (numbers, f"its weight has stood at its {which}, {bound:g}, for {steps} steps")
                if steps >= most
                else None
            )

    def _run_out(self, report: MixReport) -> Iterator[tuple[dict[str, float], str] | None]:
        """Domains that at these weights are read more often than wanted by the end of the run."""
        constraints = self._constraints
        left = max(constraints.total_samples - report.position, 0)
        counts = np.asarray(report.segment.counts, np.float64)
        epochs = (counts + report.segment.weights * left) / constraints.num_samples
        asked = np.inf if self._config.epochs is None else self._config.epochs
        # A domain that the bounds keep within max_epochs does not run out.
        allowed = np.inf if constraints.on_exhausted == "cap" else constraints.max_epochs
        limits = np.broadcast_to(np.minimum(asked, allowed), epochs.shape)
        for number, limit, size in zip(epochs.tolist(), limits.tolist(), constraints.num_samples.tolist(), strict=True):
            over = number > limit + 1 / size
            numbers = {"epochs": number, "limit": limit}
            yield (
                (numbers, f"at its present weight it is read {number:.2f} times by the end, above {limit:g}")
                if over
                else None
            )

    def run_command(self, alert: Alert, step: int) -> None:
        """Starts the command of ``alerts.run``, with the alert as one line of JSON on its standard input."""
        self._commands = [command for command in self._commands if command.poll() is None]
        if not self._config.run:
            return
        line = {"step": step, "alert": alert.kind, "domain": alert.domain, "text": alert.text, **alert.numbers}
        try:
            command = subprocess.Popen(self._config.run, stdin=subprocess.PIPE, start_new_session=True)
            assert command.stdin is not None
            with suppress(BrokenPipeError), command.stdin:  # it need not read
                command.stdin.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            get_logger().warning("alerts.run: %s cannot be run: %s", self._config.run[0], error.strerror or error)
            return
        self._commands.append(command)


def _rises(losses: Sequence[float], number: int) -> tuple[dict[str, float], str] | None:
    """Whether each of the last ``number`` losses is above the one before."""
    last = losses[-number - 1 :]
    if len(last) <= number or any(after <= before for before, after in itertools.pairwise(last)):
        return None
    words = f"its validation loss rose in each of the last {number} evaluations, from {last[0]:.4f} to {last[-1]:.4f}"
    return {"before": last[0], "after": last[-1], "evaluations": number}, words


def _no_better(losses: Sequence[float], number: int) -> tuple[dict[str, float], str] | None:
    """Whether none of the last ``number`` losses is below the lowest before."""
    if len(losses) <= number or min(losses[-number:]) < min(losses[:-number]):
        return None
    best = min(losses[:-number])
    words = f"none of the last {number} evaluations is below its best validation loss, {best:.4f}; the last is {losses[-1]:.4f}"
    return {"best": best, "last": losses[-1], "evaluations": number}, words


def check_alerts(config: AlertsConfig) -> None:
    """Refuses a command that is not on this machine.

    Raises:
        InputError: which.
    """
    if config.run and shutil.which(config.run[0]) is None:
        raise InputError(
            f"alerts.run: there is no program {config.run[0]!r} here. Give its path, or a name on PATH, and its arguments as a "
            "list, such as [mail, -s, alert, me@example.org]."
        )
