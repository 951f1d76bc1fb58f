"""Recorded run: config.resolved.yaml, metrics.jsonl and weights.jsonl, read back; of a run in another trainer mix.json
and weights.jsonl.

Natural shares and epochs need the data set; they are empty where it is gone.

Legend: N domains, of the end of the run and of any time before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.config import validate
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.files import parse_json, replace_file
from megamix.core.paths import literal
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.mixers import without_code
from megamix.training.config import MixConfig, RunConfig
from megamix.training.objective import objective_weights
from megamix.training.records.ledger import Ledger
from megamix.training.records.lines import MetricsLine, read_lines

CONFIG = "config.resolved.yaml"
METRICS = "metrics.jsonl"
WEIGHTS = "weights.jsonl"
MIX = "mix.json"
"""Record of a run in another trainer: its steps, and data, mixture and mixer of its config."""


@dataclass(frozen=True)
class RecordedMix:
    """The record of the weights of a run, in megamix's trainer or another.

    Attributes:
        config: as the run resolved it, its paths as seen from here.
        ledger: the weights by position.
        manifest: the data set, or None where it cannot be opened.
        missing_data: why it cannot.
        steps: steps taken, as far as they are on record.
        drawn: the domains that `domain_names` is to be; all where it is empty.
    """

    run_dir: Path
    config: MixConfig
    ledger: Ledger
    manifest: Manifest | None
    missing_data: str | None
    steps: int
    drawn: tuple[str, ...] = field(default=(), kw_only=True)

    @classmethod
    def open(cls, run_dir: Path) -> RecordedMix:
        """Reads the record that another trainer's run wrote with `write_mix` into ``run_dir``.

        Raises:
            InputError: no such record, or nothing recorded yet.
        """
        checked, steps = read_mix(Path(run_dir))
        ledger = _ledger(Path(run_dir), checked)
        return RecordedMix(Path(run_dir), checked, ledger, *_data_set(checked, ledger), steps)

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The N domains, or those to be drawn; those that are no longer there come last."""
        return self.drawn or self.ledger.names

    @property
    def position(self) -> int:
        """Samples taken."""
        return self.config.batches.position(self.steps)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.config.batches.tokens(self.steps)

    def epochs(self) -> dict[str, float]:
        """How often each of the domains that are there has been read; empty without the data set."""
        if self.manifest is None:
            return {}
        return {
            name: given / max((self.manifest.domain(name).train.tokens - 1) // self.config.data.seq_length, 1)
            for name, given in self.ledger.read_so_far(self.position).items()
        }

    def tokens_read(self) -> dict[str, int]:
        """Tokens trained on of each domain that ever was there."""
        batches, found = self.config.batches, dict.fromkeys(self.ledger.names, 0)
        start = 0
        for length, end in (*batches.past, (batches.seq_length, self.steps)):
            stop = min(batches.position(end), self.position)
            before, after = self.ledger.counts(start) if start else {}, self.ledger.counts(stop)
            for name, count in after.items():
                found[name] += (count - before.get(name, 0)) * length
            start = stop
        return found

    def natural_shares(self) -> dict[str, float]:
        """Shares of the training tokens of the domains that are there; empty without the data set."""
        if self.manifest is None:
            return {}
        names = self.ledger.lines[-1]["domain_names"]
        return dict(zip(names, self.manifest.natural_weights(names).tolist(), strict=True))


@dataclass(frozen=True)
class RecordedRun(RecordedMix):
    """The record of a run.

    Attributes:
        train: the ``train`` lines of metrics.jsonl, by step.
        evaluations: its ``evaluate`` lines, by step.
    """

    config: RunConfig
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def open(cls, run_dir: Path) -> RecordedRun:
        """Reads the record in ``run_dir``.

        Raises:
            InputError: no such run, a run that has recorded nothing yet, or a damaged line.
        """
        run_dir = Path(run_dir)
        config = read_config(run_dir)
        ledger = _ledger(run_dir, config)
        metrics = read_lines(run_dir / METRICS, MetricsLine)
        train, evaluations = ([line for line in metrics if line["event"] == event] for event in ("train", "evaluate"))
        manifest, missing = _data_set(config, ledger)
        steps = max((line["step"] for line in (*train, *evaluations)), default=0)
        return cls(run_dir, config, ledger, manifest, missing, steps, train, evaluations)

    def objective(self) -> dict[str, float]:
        """The weights of the objective; those of the last evaluation, which every run since there is an objective has
        on record, or what the config says. Empty where they are natural shares that are not known."""
        if self.evaluations and "objective" in self.evaluations[-1]:
            return self.evaluations[-1]["objective"]
        return self._given_objective()

    def mixer_objective(self) -> dict[str, float]:
        """`objective` as a mixer gets it: of all domains, where those without validation text are in no evaluation."""
        found = self.objective()
        return found if found.keys() >= set(self.ledger.lines[-1]["domain_names"]) else self._given_objective()

    def _given_objective(self) -> dict[str, float]:
        names, natural = tuple(self.ledger.lines[-1]["domain_names"]), self.natural_shares()
        if self.config.objective == "natural":
            return natural
        weights = objective_weights(self.config.objective, names, np.zeros(len(names)))
        return dict(zip(names, weights.tolist(), strict=True))


def read_config(run_dir: Path) -> RunConfig:
    """The config of a run, its paths as seen from here.

    Raises:
        InputError: no such run, or a damaged config.
    """
    if not (run_dir / CONFIG).is_file():
        reason = f"it has no {CONFIG}" if run_dir.is_dir() else "there is no such directory"
        raise InputError(f"{run_dir} is not a run: {reason}. Give the run_dir of a `megamix train`.")
    recorded = without_code(read_yaml(run_dir / CONFIG))
    return _relocate(validate(RunConfig, recorded, str(run_dir / CONFIG)), run_dir)


def read_mix(run_dir: Path) -> tuple[MixConfig, int]:
    """What `write_mix` wrote: the config, and the steps taken.

    Raises:
        InputError: it cannot be read.
    """
    path = run_dir / MIX
    try:
        recorded = parse_json(path.read_bytes())
        config, steps = without_code(recorded["config"]), int(recorded["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Give the folder of a run's {MIX}."
        ) from error
    return validate(MixConfig, config, str(path)), steps


def write_mix(run_dir: Path, config: MixConfig, steps: int) -> None:
    """Writes the record of a run in another trainer, beside its weights.jsonl."""
    recorded = config.model_dump(mode="json")
    recorded["data"]["manifest"] = literal(config.data.manifest.absolute())
    replace_file(run_dir / MIX, (json.dumps({"steps": steps, "config": recorded}, indent=1) + "\n").encode())


def _ledger(run_dir: Path, config: MixConfig) -> Ledger:
    ledger = Ledger.read(run_dir / WEIGHTS, config.train.seed, config.data.sampling)
    if ledger is None:
        raise InputError(f"the run {run_dir} has recorded nothing yet: {WEIGHTS} has no line. Train it first.")
    return ledger


def _data_set(config: MixConfig, ledger: Ledger) -> tuple[Manifest | None, str | None]:
    """The data set with the run's domains, or why there is none."""
    try:
        manifest = Manifest.load(config.data.manifest)
    except InputError as error:
        return None, str(error)
    if absent := manifest.missing(ledger.lines[-1]["domain_names"]):
        return None, f"{config.data.manifest} has no domain '{absent[0]}', which the run was made with."
    return manifest, None


def _relocate(config: RunConfig, run_dir: Path) -> RunConfig:
    """A run's relative paths start where it was started; that place is found from where the run directory is now."""
    manifest, recorded = config.data.manifest, config.run_dir
    if manifest.is_absolute() or manifest.exists() or recorded.is_absolute():
        return config
    here = run_dir.resolve()
    if here.parts[-len(recorded.parts) :] == recorded.parts:
        found = here.parents[len(recorded.parts) - 1] / manifest
        if found.exists():
            return config.model_copy(update={"data": config.data.model_copy(update={"manifest": found})})
    return config
