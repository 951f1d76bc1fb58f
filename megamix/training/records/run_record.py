"""The record of a run: ``metrics.jsonl``, ``weights.jsonl`` and the sinks. Rank 0 only.

``metrics.jsonl`` holds one object per line, told apart by ``event``:

- ``train``, every ``log.every`` steps: ``step`` (steps taken), ``tokens`` (trained on so far), ``loss`` (mean nats per
  token over the interval), ``domain_loss`` and ``domain_tokens`` by domain (null and 0 where absent; of more than 256
  domains only those that were seen), ``lr``,
  ``grad_norm``, ``tokens_per_second``, and where the time of rank 0 went (`megamix.training.step_clock`, means per
  step): ``step_seconds`` and its parts, ``compute_seconds``, ``data_wait_seconds``, ``communication_seconds`` and
  ``mixing_seconds``; ``memory_bytes`` and ``flop_utilisation`` (`megamix.training.console`);
- ``evaluate``: ``step``, ``tokens``, ``objective_loss`` (weighted by ``objective``, which names every domain's weight),
  ``domain_loss``, their standard errors by documents ``objective_error`` and ``domain_error``
  (`megamix.training.domain_losses`), ``macro_loss`` (mean over domains), ``micro_loss`` (weighted by natural share),
  ``worst_domain`` and ``worst_loss``; null where a domain that counts has no finite loss.

``weights.jsonl`` is the ledger: one object per change of weights (and the initial ones, step 0): ``step`` whose
statistics were used, ``timestamp``, ``effective_step`` and ``position`` it takes effect at, ``domain_names``,
``domain_weights``, ``steering`` where some is in force (its ``commands`` of this step, ``pins``, ``bounds``, ``held``,
``ramp``), ``segment`` (where the stretch of these weights starts, and the blend's counts and deficits there,
from which any position after it can be read), ``rests`` (after a resume with another sequence length: by domain, the
rest of its epoch, see `megamix.data.blend.rest`), ``statistics`` (sums of the step: ``nats``, ``tokens``), and what the
mixer shows of itself. Of more than 256 domains the arrays are in ``weights.bin``
(`megamix.training.records.wide_lines`). After a resume that changed domains, mixture, constraints,
batch or sequence length there are lines with ``change``, which says what changed; they take the place of all lines
before them that begin at their position or later (`megamix.training.records.ledger`).

``events.jsonl`` says when the run was started, resumed, stopped (`megamix.training.records.events`).

``odm_weights.jsonl`` or ``doremi_weights.jsonl`` hold the updates of such a mixer in DataFlex's form
(`megamix.training.records.dataflex_log`).

``statistics/`` holds the sums of every step (`megamix.training.records.step_statistics`), ``shadow/NAME.jsonl`` the
lines that ``weights.jsonl`` would have, had that mixer been the run's (`megamix.mixing.shadow`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.files import AppendFile, remove, replace_file, write_failed
from megamix.core.log import get_logger
from megamix.data.blend.blend import Segment
from megamix.data.sampler import StepSamples
from megamix.mixing.exchange import MixReport
from megamix.mixing.mixers import DomainStats
from megamix.mixing.shadow_change import ShadowChange, statistics_record
from megamix.training.alerts import Alert
from megamix.training.records.dataflex_log import DataflexLog
from megamix.training.records.events import Event, EventLog
from megamix.training.records.lines import StepLine, read_lines
from megamix.training.records.recorded_run import METRICS, WEIGHTS
from megamix.training.records.sinks import Sink
from megamix.training.records.step_statistics import StatisticsWriter
from megamix.training.records.wide_lines import MOST_IN_TEXT, WideWriter, side_path
from megamix.training.step_clock import StepTimes

SHADOWS = "shadow"


class RunRecord:
    """Appends to the record of a run; on resume, lines past the checkpoint are dropped first.

    Args:
        text: of the event that it begins with.
    """

    def __init__(
        self,
        run_dir: Path,
        domains: tuple[str, ...],
        resumed_step: int | None,
        sinks: Sequence[Sink] = (),
        text: str = "",
    ) -> None:
        self._domains = domains
        if resumed_step is None and any((run_dir / name).is_file() for name in (METRICS, WEIGHTS)):
            get_logger().warning(
                "%s holds the record of a run, but no checkpoint to go on from: the run begins anew, and so does its record",
                run_dir,
            )
        self._metrics = _open(run_dir / METRICS, resumed_step)
        self._weights = _LedgerFile(run_dir / WEIGHTS, resumed_step)
        self._dataflex = DataflexLog(run_dir, lambda path: _open(path, resumed_step), is_new=resumed_step is None)
        self._statistics = StatisticsWriter(run_dir, domains, resumed_step)
        self._run_dir = run_dir
        self._shadows: dict[str, _LedgerFile] = {}  # opened with its first line, or here where there are lines already
        for path in (run_dir / SHADOWS).glob("*.jsonl"):
            if resumed_step is None:
                remove(path)
                remove(side_path(path))
            else:
                self._shadows[path.stem] = _LedgerFile(path, resumed_step)
        self._sinks = sinks
        self._events = EventLog(run_dir)
        self.note("started" if resumed_step is None else "resumed", resumed_step or 0, text)

    @property
    def has_weights(self) -> bool:
        """Whether any weights were on record when it was opened."""
        return self._weights.held_lines

    def note(self, event: Event, step: int, text: str = "", **more: Any) -> None:
        """Adds an event (`megamix.training.records.events`)."""
        self._events.note(event, step, text, **more)

    def alert(self, alert: Alert, step: int) -> None:
        """Adds an alert as an event, and to the sinks that have such."""
        more = {"alert": alert.kind, "domain": alert.domain, **alert.numbers}
        self.note("alert", step, alert.text, **more)
        for sink in self._sinks:
            sink.alert(f"{self._run_dir.name}: {alert.kind}", alert.text)

    def announce(
        self,
        step: int,
        segments: Sequence[tuple[int, Segment]],
        mixer_record: Mapping[str, object],
        change: Mapping[str, Any] | None = None,
        begin: int = 0,
    ) -> None:
        """Logs weights that a run starts or continues with and that follow from no step's statistics.

        Args:
            step: steps taken.
            segments: (effective step, stretch), rising.
            change: difference from the run before, on resume.
            begin: position that no line holds before.
        """
        extra = {} if change is None else {"change": dict(change)}
        for effective_step, segment in segments:
            self._write_weights(step, effective_step, max(segment.start, begin), segment, {**mixer_record, **extra})

    def step(self, report: MixReport) -> None:
        """Logs the sums of a step, new weights and the changes of shadows; called for every step in turn."""
        self._statistics.write(report.step + 1, report.stats)
        for change in report.shadows:
            if change.name not in self._shadows:
                self._shadows[change.name] = _LedgerFile(self._run_dir / SHADOWS / f"{change.name}.jsonl", None)
            self._shadows[change.name].write(shadow_line(self._domains, change))
        for note in report.notes:
            self.note("steered", report.step + 1, note)
        if report.updated:
            self.weights(report)

    def weights(self, report: MixReport) -> None:
        """Logs the weights that follow from a step."""
        # Arrays that go to a binary file are not made lists first.
        stats = {"nats": report.stats.nats, "tokens": report.stats.tokens}
        sums = {"statistics": stats} if len(self._domains) > MOST_IN_TEXT else statistics_record(report.stats)
        record = {**report.record, **sums}
        line = self._write_weights(report.step + 1, report.effective_step, report.position, report.segment, record)
        if len(self._domains) <= MOST_IN_TEXT:  # of more, a line of text is megabytes
            self._dataflex.write(line)

    def train(self, line: dict[str, Any]) -> None:
        self._metrics.write_line({"event": "train", **line})
        self._plot("train", line)

    def evaluate(self, line: dict[str, Any]) -> None:
        self._metrics.write_line({"event": "evaluate", **line})
        self._plot("evaluate", line)

    def flush(self) -> None:
        """Makes every line so far safe on disk."""
        for file in (self._metrics, self._weights, self._dataflex, *self._shadows.values()):
            file.sync()
        self._statistics.flush()

    def close(self) -> None:
        files = (self._metrics, self._weights, self._dataflex, *self._shadows.values(), self._statistics, self._events)
        for file in files:
            file.close()
        for sink in self._sinks:
            sink.close()

    def _write_weights(
        self, step: int, effective_step: int, position: int, segment: Segment, extra: Mapping[str, object]
    ) -> Mapping[str, Any]:
        as_lists = len(self._domains) <= MOST_IN_TEXT
        line = _weights_line(self._domains, step, effective_step, position, segment, extra, as_lists)
        self._weights.write(line)
        if self._sinks:
            shown = np.argsort(-segment.weights, kind="stable")[:MOST_IN_TEXT].tolist()
            by_name = {f"weight/{self._domains[k]}": float(segment.weights[k]) for k in sorted(shown)}
            for sink in self._sinks:
                sink.scalars(by_name, effective_step)
        return line

    def _plot(self, prefix: str, line: Mapping[str, Any]) -> None:
        numbers = {f"{prefix}/{key}": value for key, value in line.items() if isinstance(value, int | float)}
        numbers |= {f"{prefix}_loss/{name}": loss for name, loss in line["domain_loss"].items() if loss is not None}
        for sink in self._sinks:
            sink.scalars(numbers, line["step"])


def shadow_line(domains: tuple[str, ...], change: ShadowChange) -> dict[str, Any]:
    """The line of a shadow, in the format of weights.jsonl."""
    return _weights_line(domains, change.step, change.effective_step, change.position, change.segment, change.record)


def _weights_line(
    domains: tuple[str, ...],
    step: int,
    effective_step: int,
    position: int,
    segment: Segment,
    extra: Mapping[str, object],
    as_lists: bool = True,
) -> dict[str, Any]:
    arrays = segment.weights, segment.counts, segment.deficits
    weights, counts, deficits = [array.tolist() for array in arrays] if as_lists else arrays
    return {
        "step": step,
        "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
        "effective_step": effective_step,
        "position": position,
        "domain_names": list(domains),
        "domain_weights": weights,
        "segment": {"start": segment.start, "counts": counts, "deficits": deficits},
        **extra,
    }


class _LedgerFile:
    """Lines of weights, with the file for the arrays of many domains."""

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        kept = _cut_back(path, resumed_step)
        self._lines = AppendFile(path)
        self._arrays = WideWriter(path, kept)
        self.held_lines = bool(kept)

    def write(self, line: Mapping[str, Any]) -> None:
        self._lines.write_line(self._arrays.packed(line))  # arrays first: no line names what is not there

    def sync(self) -> None:
        self._arrays.sync()
        self._lines.sync()

    def close(self) -> None:
        self._arrays.close()
        self._lines.close()


class SampleLog:
    """``samples/data_RANK.jsonl``: per step the position, and the domain and sample of every row one data-parallel rank
    reads."""

    FOLDER = "samples"

    def __init__(self, run_dir: Path, data_rank: int) -> None:
        self._file = AppendFile(run_dir / self.FOLDER / f"data_{data_rank:05d}.jsonl")

    @classmethod
    def drop_after(cls, run_dir: Path, resumed_step: int) -> None:
        """Drops the lines past ``resumed_step`` (0: all) of every rank; called before any rank opens its file."""
        for path in (run_dir / cls.FOLDER).glob("data_*.jsonl"):
            _drop_lines_after(path, resumed_step)

    def write(self, samples: StepSamples) -> None:
        line = {
            "step": samples.step + 1,
            "position": samples.position,
            "domain": samples.domain.ravel().tolist(),
            "sample": samples.sample.ravel().tolist(),
        }
        self._file.write_line(line)

    def close(self) -> None:
        self._file.close()


class IntervalLog:
    """Sums over the steps since the last ``train`` line; part of the checkpoint, so that no line depends on a
    restart."""

    def __init__(self, domains: tuple[str, ...], state: Mapping[str, Any] | None = None) -> None:
        self._domains = domains
        self.reset()
        for k, name in enumerate(domains if state is not None else ()):
            assert state is not None
            self._nats[k], self._tokens[k] = state["domains"].get(name, (0.0, 0))

    def reset(self) -> None:
        self._nats = np.zeros(len(self._domains))
        self._tokens = np.zeros(len(self._domains), np.int64)

    def add_stats(self, stats: DomainStats) -> None:
        self._nats = self._nats + stats.nats
        self._tokens = self._tokens + stats.tokens

    def line(
        self, step: int, tokens: int, lr: float, grad_norm: float | None, times: StepTimes, new_tokens: int
    ) -> dict[str, Any] | None:
        """The ``train`` line for the interval that ends at ``step``; starts the next interval. None where no token of
        the interval had a finite loss.

        Args:
            times: of the steps of the interval that this process took.
            new_tokens: tokens of these steps.
        """
        if not self._tokens.any():
            return None
        # Of many domains, most are absent from an interval: only the others are named.
        every = np.arange(len(self._domains))
        named = every if len(self._domains) <= MOST_IN_TEXT else np.flatnonzero(self._tokens)
        names = [self._domains[k] for k in named.tolist()]
        nats, counts = self._nats[named].tolist(), self._tokens[named].tolist()
        domain_loss = [n / t if t else None for n, t in zip(nats, counts, strict=True)]
        line = {
            "step": step,
            "tokens": tokens,
            "loss": float(self._nats.sum() / self._tokens.sum()),
            "domain_loss": dict(zip(names, domain_loss, strict=True)),
            "domain_tokens": dict(zip(names, counts, strict=True)),
            "lr": lr,
            "grad_norm": grad_norm,
            **times.record(),
            "tokens_per_second": new_tokens / times.total if times.total else 0.0,
        }
        self.reset()
        return line

    def state_dict(self) -> dict[str, Any]:
        sums = zip(self._nats.tolist(), self._tokens.tolist(), strict=True)
        return {"domains": dict(zip(self._domains, sums, strict=True))}


def _open(path: Path, resumed_step: int | None) -> AppendFile:
    _cut_back(path, resumed_step)
    return AppendFile(path)


def _cut_back(path: Path, resumed_step: int | None) -> list[dict[str, Any]]:
    """Drops lines past ``resumed_step``, all where it is None; returns the others."""
    if resumed_step is None:
        remove(path)
        return []
    return _drop_lines_after(path, resumed_step) if path.is_file() else []


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops lines past ``step`` and a cut-off last one; returns the others.

    Raises:
        MegamixError: the disk is full; the file is as it was then.
    """
    lines = read_lines(path, StepLine)
    # What a resume at this very step changed is written again, if it changes it again.
    kept = [line for line in lines if line["step"] < step or (line["step"] == step and "change" not in line)]
    try:
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode("utf-8"))
    except OSError as error:
        raise write_failed(path, error) from error
    return kept
