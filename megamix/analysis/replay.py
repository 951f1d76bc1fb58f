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
from megamix.core.config import Config, validate
from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.core.text import Report, Table, most_of, number
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import evaluated, find_mixer, make_mixer
from megamix.mixing.shadow import Shadow, shadow_names
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.mix_plan import read_constraints, read_stages
from megamix.training.mixture import mixture_of
from megamix.training.plan import domain_key
from megamix.training.records.ledger import Ledger, segment_of
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.run_record import shadow_line
from megamix.training.records.step_statistics import RecordedStatistics, read_statistics

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
    run = RecordedRun.open(run_dir)
    _refuse_changed(run)
    if run.position == 0:
        raise InputError(f"the run {run_dir} has logged no step yet. Wait for the first line of metrics.jsonl.")
    statistics = read_statistics(run.run_dir)
    if statistics.domain_names != tuple(run.ledger.lines[0]["domain_names"]):
        raise InputError(
            f"{run_dir}: the sums of its steps are of the domains {', '.join(statistics.domain_names)}, weights.jsonl is "
            f"of {', '.join(run.ledger.lines[0]['domain_names'])}. The files are of different runs."
        )
    configs = [_config(mixer) for mixer in mixers] or [run.config.mixer]
    for config in filter(None, map(evaluated, configs)):
        raise InputError(
            f"{config.why_evaluated}, but the losses of evaluations are not on record, only those of training. "
            f"{config.without_evaluations}"
        )
    if statistics.excess_nats is None and any(getattr(config, "reference", None) is not None for config in configs):
        raise InputError(
            f"the run {run.run_dir} was trained without reference losses, so none of its steps has an excess loss on record. "
            "Replay the mixer with reference: null, or a run whose mixer had a reference."
        )
    policy = _policy(run, statistics.domain_names)
    drawn_with = _weights_by_step(run.ledger, statistics.num_steps, run.config.train.global_batch)
    folder = run.run_dir / FOLDER if out is None else out
    results = []
    for name, config in zip(shadow_names(configs), configs, strict=True):
        blend = _blend(run, statistics.domain_names)
        objective = run.objective()
        if not objective and find_mixer(getattr(config, "name", None))[1].follows_objective:
            raise InputError(
                f"{run.run_dir}: the mixer {name} follows the run's objective, natural shares, which are not on record and "
                f"can only be worked out with the data set. {run.missing_data}"
            )
        left_out = run.ledger.lines[0].get("left_out", ())
        mixer = make_mixer(config, statistics.domain_names, blend.weights, objective or None, left_out=left_out)
        lines = _lines(Shadow(name, mixer, blend, policy), statistics, drawn_with)
        results.append(_result(run, Ledger(lines, run.ledger.seed, run.ledger.sampling), name, drawn_with, folder))
    used = _compared("used", run.ledger, drawn_with, run)
    return Replay(run.run_dir, statistics.num_steps, used, results)


def _config(mixer: Any) -> Config:
    if not isinstance(mixer, Mapping):
        raise InputError(f"--mixer {mixer!r}: expected a mixer as in a config, such as {{name: odm, preset: paper}}.")
    return validate(find_mixer(mixer.get("name"))[0], dict(mixer), "--mixer")


def _refuse_changed(run: RecordedRun) -> None:
    for line in run.ledger.lines:
        if change := line.get("change"):
            parts = ", ".join(change.get("parts", [])) or "domains"
            raise InputError(
                f"the run {run.run_dir} was changed on resume after step {line['step']} ({parts}), so its steps are not those "
                "of one run. Only a run with one data set, mixture and set of constraints can be replayed."
            )


def _policy(run: RecordedRun, names: tuple[str, ...]) -> WeightPolicy:
    """The weight policy of the run.

    Raises:
        InputError: they follow from the data set, which cannot be opened.
    """
    config = run.config
    staged = mixture_of(config.mixture).has_stages
    if run.manifest is None:
        if staged or config.data.max_epochs is not None:
            raise InputError(
                f"{run.run_dir}: {'its stages' if staged else 'data.max_epochs'} can only be worked out with the data set. "
                f"{run.missing_data}"
            )
        num_samples, natural = np.ones(len(names), np.int64), np.full(len(names), 1 / len(names))
    else:
        tokens = [run.manifest.domain(name).train.tokens for name in names]
        num_samples = (np.array(tokens, np.int64) - 1) // config.data.seq_length
        natural = run.manifest.natural_weights(names)
    # Only later stages are looked up in it: what the run began with is on record, whatever has become of a file.
    first = Stages((0,), np.array([run.ledger.lines[0]["domain_weights"]]))
    stages = read_stages(config, names, num_samples, natural) if staged else first
    train = config.train
    constraints = read_constraints(config.data, names, num_samples, train.steps * train.global_batch)
    return WeightPolicy(stages, constraints, train.global_batch, config.data.weight_lag)


def _blend(run: RecordedRun, names: tuple[str, ...]) -> Blend:
    """The blend as the run began with it: the weights on record that follow from no step's statistics."""
    announced = [line for line in run.ledger.lines if "statistics" not in line]
    # How many samples an epoch has changes which of them are taken, not how many.
    ones, keys = np.ones(len(names), np.int64), [domain_key(name) for name in names]
    first = segment_of(announced[0])
    blend = Blend.from_segment(ones, first, run.ledger.seed, domain_keys=keys, sampling=run.ledger.sampling)
    for line in announced[1:]:
        blend.set_weights(line["domain_weights"], at=line["position"])
    return blend


def _weights_by_step(ledger: Ledger, num_steps: int, batch: int) -> Floats:
    """float64 [T, K]: the weights that the tokens of each step were drawn with."""
    return ledger.weights[np.searchsorted(ledger.starts, np.arange(num_steps) * batch, "right") - 1]


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
    weights = _weights_by_step(ledger, len(drawn_with), run.config.train.global_batch)
    distance = float(np.abs(weights - drawn_with).sum(axis=1).mean() / 2)
    followed = replace(run, ledger=ledger)
    return Replayed(name, run_weights(followed, "final"), run_weights(followed, "mean"), distance, [])
