"""``megamix replay``: feeds the recorded statistics of a run to other mixers, without training.

    OUT/NAME.jsonl       the lines that weights.jsonl would have with this mixer (`megamix.mixing.shadow`)
        NAME.mean.json   {domain: mean weight}, for ``mixture: {file: F}`` and ``megamix blend export --weights F``
        NAME.png         its weights over tokens

A replay of the run's own mixer gives the run's own weights, bit for bit. A replay of another gives the weights it would
have chosen on these losses, not the losses that would have followed.

Legend: K domains, T steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from megamix.analysis.movers import top_movers
from megamix.analysis.plots.drawing import STYLE, save_figure
from megamix.analysis.plots.figures import weights_figure
from megamix.analysis.replayable import ReplayableRun, weights_by_step
from megamix.core.config import Config, validate
from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.core.text import Report, Table, most_of, number
from megamix.mixing.mixers import find_mixer
from megamix.mixing.shadow import Shadow, shadow_names
from megamix.training.records.ledger import Ledger
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import shadow_line
from megamix.training.records.step_statistics import RecordedStatistics

FOLDER = "replay"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Replayed:
    """Weights of one mixer on a run's statistics.

    Attributes:
        final, mean: {domain: weight}, as in `run_weights`.
        distance: half the sum of the sampling weights' absolute differences from the run's, mean over its steps (0: the
            same, 1: no domain in common).
        written: files.
    """

    name: str
    final: dict[str, float]
    mean: dict[str, float]
    distance: float
    written: list[Path]


@dataclass(frozen=True)
class Replay:
    """Replays of several mixers on one run; ``used`` is the run itself.

    Attributes:
        num_steps: steps on record.
    """

    run_dir: Path
    num_steps: int
    used: Replayed
    mixers: list[Replayed]

    def report(self) -> Report:
        """A table of final and mean weights, and the paths of the files."""
        every = [self.used, *self.mixers]
        columns = ("domain", *(f"{one.name} {what}" for one in every for what in ("final", "mean")))
        rows = [
            (name, *(number(weights[name]) for one in every for weights in (one.final, one.mean)))
            for name in self.used.mean
        ]
        moved = [abs(final - self.used.mean[name]) for name, final in self.used.final.items()]
        rows = most_of(rows, moved)
        rows.append(("distance from used", *(text for one in every for text in ("", number(one.distance)))))
        words = (
            f"{self.run_dir}: {self.num_steps} steps replayed. final: the last weights computed; mean: over the samples trained "
            "on (of DoReMi, both of its alpha);\ndistance: of the sampling weights, mean over steps of the total variation "
            "distance, 0 (the same) to 1."
        )
        files = "\n".join(str(path) for one in self.mixers for path in one.written)
        return Report([Table(columns, rows, footer=1), words, files])


def replay(run_dir: Path, mixers: Sequence[Mapping[str, Any]], out: Path | None = None) -> Replay:
    """Feeds the statistics of a run to mixers; without any, to the run's own.

    Args:
        mixers: configs, such as ``{"name": "odm", "preset": "paper"}``.
        out: folder for the files. Default: RUN/replay.

    Raises:
        InputError: no such run, statistics or weights that are not on record, a run that was changed under way, a mixer
            that cannot be made or cannot use the statistics, or a folder that cannot be written.
    """
    replayable = ReplayableRun.open(run_dir)
    run, drawn_with = replayable.run, replayable.drawn_with
    configs = [_config(mixer) for mixer in mixers] or [run.config.mixer]
    for config in configs:
        replayable.check(config)
    folder = run.run_dir / FOLDER if out is None else out
    results = []
    for name, config in zip(shadow_names(configs), configs, strict=True):
        lines = _lines(replayable.shadow(name, config), replayable.statistics, drawn_with)
        results.append(_result(run, Ledger(lines, run.ledger.seed, run.ledger.sampling), name, drawn_with, folder))
    used = _compared("used", run.ledger, drawn_with, run)
    return Replay(run.run_dir, replayable.statistics.num_steps, used, results)


def _config(mixer: Any) -> Config:
    if not isinstance(mixer, Mapping):
        raise InputError(f"--mixer {mixer!r}: expected a mixer as in a config, such as {{name: odm, preset: paper}}.")
    return validate(find_mixer(mixer.get("name"))[0], dict(mixer), "--mixer")


def _lines(shadow: Shadow, statistics: RecordedStatistics, drawn_with: Floats) -> list[dict[str, Any]]:
    lines = []
    for step, weights in enumerate(drawn_with):
        for change in shadow.update(statistics.step(step + 1, weights), step):
            lines.append(shadow_line(statistics.domain_names, change))
    return lines


def _result(run: RecordedRun, ledger: Ledger, name: str, drawn_with: Floats, folder: Path) -> Replayed:
    """Writes the files of one mixer."""
    found = _compared(name, ledger, drawn_with, run)
    paths = [folder / f"{name}.{ending}" for ending in ("jsonl", "mean.json", "png")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(paths[0], "".join(json.dumps(line) + "\n" for line in ledger.lines).encode())
        replace_file(paths[1], (json.dumps(found.mean, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}. Choose another --out.") from error
    with matplotlib.rc_context(STYLE):
        save_figure(weights_figure(*top_movers([replace(run, run_dir=folder / name, ledger=ledger)])), paths[2])
    return replace(found, written=paths)


def _compared(name: str, ledger: Ledger, drawn_with: Floats, run: RecordedRun) -> Replayed:
    weights = weights_by_step(ledger, len(drawn_with), run.config.batches)
    distance = float(np.abs(weights - drawn_with).sum(axis=1).mean() / 2)
    followed = replace(run, ledger=ledger)
    return Replayed(name, run_weights(followed, "final"), run_weights(followed, "mean"), distance, [])
