"""A recorded run that mixers can be run on again: its statistics, its weight policy, and its blend at the start.

`megamix replay` and `megamix why` both begin here.

Legend: K domains, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamix.core.config import Config
from megamix.core.errors import InputError
from megamix.data.batches import Batches
from megamix.data.blend.blend import Blend
from megamix.mixing.mixers import evaluated, find_mixer
from megamix.mixing.shadow import Shadow
from megamix.mixing.steering.journal import ANSWERS, JOURNAL, Journal
from megamix.mixing.steering.rule import RuleMaker
from megamix.mixing.steering.steering import Steering
from megamix.mixing.weight_policy import Stages, WeightPolicy
from megamix.training.mix_plan import document_tokens, read_constraints, read_stages
from megamix.training.mixture import mixture_of
from megamix.training.plan import domain_key
from megamix.training.records.ledger import Ledger, segment_of
from megamix.training.records.recorded_run import RecordedRun
from megamix.training.records.step_statistics import RecordedStatistics, read_statistics

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ReplayableRun:
    """A run on record from its first step, of one set of domains.

    Attributes:
        drawn_with: float64 [T, K], the weights that the tokens of each step were drawn with.
    """

    run: RecordedRun
    statistics: RecordedStatistics
    policy: WeightPolicy
    drawn_with: Floats

    @classmethod
    def open(cls, run_dir: Path) -> ReplayableRun:
        """Reads the record of a run.

        Raises:
            InputError: no such run, statistics or weights that are not on record, or a run that was changed under way.
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
        drawn_with = weights_by_step(run.ledger, statistics.num_steps, run.config.batches)
        return cls(run, statistics, _policy(run, statistics.domain_names), drawn_with)

    def check(self, config: Config) -> None:
        """Raises:
        InputError: the mixer of this config needs what is not on record.
        """
        run = self.run
        if (found := evaluated(config)) is not None:
            raise InputError(
                f"{found.why_evaluated}, but the losses of evaluations are not on record, only those of training. "
                f"{found.without_evaluations}"
            )
        if self.statistics.excess_nats is None and getattr(config, "reference", None) is not None:
            raise InputError(
                f"the run {run.run_dir} was trained without reference losses, so none of its steps has an excess loss on "
                "record. Replay the mixer with reference: null, or a run whose mixer had a reference."
            )

    def shadow(self, name: str, config: Config) -> Shadow:
        """A new mixer with the run's first weights, and a blend that begins as the run's did; the run's own mixer is
        steered as the run was.

        Raises:
            InputError: it follows an objective that is not on record, or cannot be made.
        """
        run = self.run
        blend = self._blend()
        objective = run.mixer_objective()
        if not objective and find_mixer(getattr(config, "name", None))[1].follows_objective:
            raise InputError(
                f"{run.run_dir}: the mixer {name} follows the run's objective, natural shares, which are not on record and "
                f"can only be worked out with the data set. {run.missing_data}"
            )
        left_out = run.ledger.lines[0].get("left_out", ())
        make = RuleMaker(config, self.statistics.domain_names, objective or None)
        steering = self._steering(make) if config == run.config.mixer else None
        return Shadow(name, make.first(None, blend.weights, left_out), blend, self.policy, steering=steering)

    def _steering(self, make: RuleMaker) -> Steering:
        """The commands that the run has heeded, for a replay of the run itself.

        Raises:
            InputError: its journal is not there.
        """
        run = self.run
        journal = Journal(run.run_dir, is_live=False)
        known = {command.id for command in journal.read()}
        heeded = (each["id"] for line in run.ledger.lines for each in line.get("steering", {}).get("commands", ()))
        for name in heeded:
            if name not in known:
                raise InputError(
                    f"the run {run.run_dir} was steered by command {name}, which {JOURNAL} does not hold. Put that file and "
                    f"{ANSWERS} back, or replay another mixer."
                )
        return Steering(self.policy, journal, make, run.config.data.seq_length)

    def _blend(self) -> Blend:
        """The blend as the run began with it: the weights on record that follow from no step's statistics."""
        run, names = self.run, self.statistics.domain_names
        announced = [line for line in run.ledger.lines if "statistics" not in line and "change" not in line]
        # How many samples an epoch has changes which of them are taken, not how many.
        ones, keys = np.ones(len(names), np.int64), [domain_key(name) for name in names]
        first = segment_of(announced[0])
        blend = Blend.from_segment(ones, first, run.ledger.seed, domain_keys=keys, sampling=run.ledger.sampling)
        for line in announced[1:]:
            blend.set_weights(line["domain_weights"], at=line["position"])
        return blend


def weights_by_step(ledger: Ledger, num_steps: int, batches: Batches) -> Floats:
    """float64 [T, K]: the weights that the tokens of each step were drawn with."""
    return ledger.weights[np.searchsorted(ledger.starts, batches.positions(np.arange(num_steps)), "right") - 1]


def _refuse_changed(run: RecordedRun) -> None:
    # Bounds by epochs depend on where each domain stands, and an epoch has another number of samples of another length.
    may_change = {"batch"} if run.config.data.max_epochs is not None else {"batch", "sequence"}
    for line in run.ledger.lines:
        if (change := line.get("change")) and (not change.get("parts") or set(change["parts"]) - may_change):
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
        lengths = None
    else:
        entries = [run.manifest.domain(name) for name in names]
        tokens = np.array([entry.train.tokens for entry in entries], np.int64)
        num_samples, lengths = (tokens - 1) // config.data.seq_length, document_tokens(entries)
        natural = run.manifest.natural_weights(names)
    # Only later stages are looked up in it: what the run began with is on record, whatever has become of a file.
    first = Stages((0,), np.array([run.ledger.lines[0]["domain_weights"]]))
    stages = read_stages(config, names, num_samples, natural, lengths) if staged else first
    constraints = read_constraints(config.data, names, num_samples, config.total_samples)
    return WeightPolicy(stages, constraints, config.batches, config.data.weight_lag)
