"""Run that is to be steered, as its directory shows it to any machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megamix.core.errors import InputError
from megamix.core.locks import is_free
from megamix.data.tokens.manifest import Manifest
from megamix.mixing.constraints import Constraints
from megamix.mixing.steering.command import SteerCommand
from megamix.mixing.steering.course import Course, Place, steered
from megamix.mixing.steering.journal import CANCELLED, IGNORED, NOTICED, read_answers, read_commands
from megamix.training.checkpoints import store
from megamix.training.config import MixConfig
from megamix.training.job.lock import NAME as LOCK
from megamix.training.mix_plan import document_tokens, read_constraints, read_run
from megamix.training.mixture import MixFrame
from megamix.training.records.lines import MetricsLine, WeightsLine, last_line
from megamix.training.records.recorded_run import CONFIG, METRICS, MIX, WEIGHTS, read_config, read_mix

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SteeredRun:
    """What is on record of a run, and of its steering.

    Attributes:
        is_own: whether megamix trains it; else another trainer.
        weights: float64 [K], the last ones on record.
        step: steps taken, as far as they are on record.
        commands: those that count, in the order of their effects; the ones that wait come last.
    """

    folder: Path
    config: MixConfig
    is_own: bool
    names: tuple[str, ...]
    weights: Floats
    step: int
    commands: tuple[SteerCommand, ...]

    @classmethod
    def open(cls, folder: Path) -> SteeredRun:
        """Reads the record of a run, but for the lines before the last.

        Raises:
            InputError: no such run, one that has recorded nothing yet, or a damaged record.
        """
        is_own = (folder / CONFIG).is_file() or not (folder / MIX).is_file()
        config, step = (read_config(folder), 0) if is_own else read_mix(folder)
        line = last_line(folder / WEIGHTS, WeightsLine)
        if line is None:
            raise InputError(f"the run {folder} has recorded nothing yet: {WEIGHTS} has no line. Train it first.")
        told = last_line(folder / METRICS, MetricsLine) if is_own else None
        step = max(step, line["step"], 0 if told is None else told["step"])
        weights = np.array(line["domain_weights"], np.float64)
        return cls(folder, config, is_own, tuple(line["domain_names"]), weights, step, _that_count(folder))

    @property
    def has_ended(self) -> bool:
        """Whether all its steps are taken."""
        return self.step >= self.config.train.steps

    @property
    def is_trained(self) -> bool | None:
        """Whether a job trains it now; None where that cannot be told."""
        free = is_free(self.folder / LOCK) if self.is_own else None
        return None if free is None else not free

    def first_step(self) -> int:
        """Steps taken where it goes on: now, or of its newest checkpoint where nobody trains it."""
        if self.is_trained is not False:
            return self.step
        return max(store.complete_steps(self.folder / "checkpoints"), default=0)

    def natural(self) -> Floats:
        """float64 [K]: shares of the training tokens.

        Raises:
            InputError: the data set is not seen from here.
        """
        return Manifest.load(self.config.data.manifest).natural_weights(self.names)

    def frame(self) -> MixFrame:
        """What shares of documents are resolved for.

        Raises:
            InputError: the data set is not seen from here.
        """
        manifest, config = Manifest.load(self.config.data.manifest), self.config
        lengths = document_tokens([manifest.domain(name) for name in self.names])
        natural, ones = manifest.natural_weights(self.names), np.ones(len(self.names), np.int64)
        return MixFrame(self.names, natural, ones, config.train.steps, config.batches, read_run, lengths)

    def place(self) -> Place:
        """Where weights would take effect, for checks: only the bounds count, as epochs give way by themselves."""
        data = self.config.data.model_copy(update={"max_epochs": None, "on_exhausted": "cap"})
        ones = np.ones(len(self.names), np.int64)
        own: Constraints = read_constraints(data, self.names, ones, self.config.total_samples)
        return Place(own, np.zeros(len(self.names)), 0, data.seq_length)

    def course(self, place: Place) -> Course:
        """What is, or will be, in force by the commands so far; its free weights are the last ones on record."""
        course = Course(self.weights, left_out=())
        for command in self.commands:
            try:
                course = steered(course, command, self.weights, place)
            except InputError:
                continue  # the run ignores it too
            course = Course(self.weights, (), course.pins, course.bounds, course.held, course.mixer)
        return course


def _that_count(folder: Path) -> tuple[SteerCommand, ...]:
    """The commands of a journal that were neither ignored nor undone."""
    try:
        commands, _ = read_commands(folder)
    except OSError as error:
        raise InputError(f"cannot read the journal in {folder}: {error.strerror or error}. Check the path.") from error
    outcomes = {answer["id"]: answer["outcome"] for answer in read_answers(folder) if answer["outcome"] != NOTICED}
    without = {name for name, outcome in outcomes.items() if outcome in (IGNORED, CANCELLED)}
    without |= {each.undo for each in commands.values() if each.undo is not None and each.id not in without}
    order = [*(name for name in outcomes if name in commands), *(name for name in commands if name not in outcomes)]
    return tuple(commands[name] for name in order if name not in without and commands[name].undo is None)
