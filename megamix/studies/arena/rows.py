"""The lines of an arena's results: what each run that is done says, judged by each objective that it is of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megamix.analysis.series import first_step_at
from megamix.core.errors import InputError, ResumeRefused
from megamix.studies.arena.begun import changed
from megamix.studies.arena.config import NATURAL
from megamix.studies.arena.members import Entry
from megamix.studies.arena.study import ArenaStudy, Weights
from megamix.training.checkpoints.state import RunState, newest_state
from megamix.training.mix_plan import read_run
from megamix.training.objective import weighted_loss
from megamix.training.records.recorded_run import RecordedRun

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Row:
    """One line of results.csv: a member, judged by one objective.

    Attributes:
        model: empty for the run's own.
        objective_loss, macro_loss, micro_loss, worst_loss: after the last step; micro weights domains by their natural
            share without a trap.
        steps_to_target: the step, on the line between two evaluations, at which the objective loss comes down to the
            final one of the arm `natural` of the same seed and condition; None where it does not.
        noise_tokens: tokens spent on the trap's domain; None without a trap.
        seconds: in training steps.
        curve: (step, objective loss) of every evaluation.
    """

    arm: str
    objective: str
    model: str
    budget: int
    trap: str
    seed: int
    objective_loss: float
    macro_loss: float
    micro_loss: float
    worst_loss: float
    worst_domain: str
    steps_to_target: float | None
    tokens: int
    noise_tokens: int | None
    seconds: float
    member: str
    curve: Curve


COLUMNS = tuple(column.name for column in fields(Row) if column.name != "curve")


def read_rows(study: ArenaStudy) -> tuple[tuple[Row, ...], dict[str, str]]:
    """The lines of the members that are done, and of those that cannot be used, by name, why; these do not keep the
    others from being read."""
    runs: dict[str, RecordedRun] = {}
    left_out: dict[str, str] = {}
    for entry in study.entries:
        try:
            run = _finished(study, entry)
        except (InputError, ResumeRefused) as error:
            left_out[entry.name] = str(error)
        else:
            if run is not None:
                runs[entry.name] = run
    rows = [
        _row(study, entry, runs[entry.name], objective, weights)
        for entry in study.entries
        if entry.name in runs
        for objective, weights in study.objectives.items()
        if entry.objective in (None, objective)
    ]
    targets = {_target_key(row): row.objective_loss for row in rows if row.arm == NATURAL}
    return tuple(_with_target(row, targets.get(_target_key(row))) for row in rows), left_out


def _target_key(row: Row) -> tuple[object, ...]:
    return row.objective, row.model, row.budget, row.trap, row.seed


def _with_target(row: Row, target: float | None) -> Row:
    steps = None if target is None else first_step_at(row.curve, target)
    return replace(row, steps_to_target=steps)


def _finished(study: ArenaStudy, entry: Entry) -> RecordedRun | None:
    """The record of a member's run; None where it is not done.

    Raises:
        InputError, ResumeRefused: it is damaged, was made with another config, or has no loss after its last step.
    """
    folder = study.run_dir_of(entry)
    state = newest_state(folder / "checkpoints")
    if state is None or state.step < entry.condition.steps:
        return None
    again = f"Delete {folder} to run it anew."
    if (reason := changed(study, entry, state)) is not None:
        raise InputError(f"it was made with another config: {reason}. Undo the change, or: {again}")
    run = RecordedRun.open(folder)
    last = run.evaluations[-1] if run.evaluations else {"step": 0, "domain_loss": {}}
    if last["step"] != entry.condition.steps:
        raise InputError(
            f"metrics.jsonl has no evaluation after its last step, {entry.condition.steps}: lines are missing. {again}"
        )
    lost = next((name for name in study.domains if last["domain_loss"].get(name) is None), None)
    if lost is not None:
        raise InputError(f"the last validation loss of '{lost}' is not finite.")
    if entry.arm.mean_of is not None:
        _check_mean(study, entry, state)
    return run


def _check_mean(study: ArenaStudy, entry: Entry, state: RunState) -> None:
    """Raises InputError for a run with other weights than the mean of the run that it is of."""
    wanted = read_run(study.run_dir_of(study.parent_of(entry)), "mean", finished=True)
    had = state.fingerprints["mixture"]["mixture"]["weights"][0]
    if wanted.keys() != had.keys() or not all(math.isclose(wanted[name], had[name], rel_tol=1e-9) for name in had):
        raise InputError(
            f"its weights are not the mean of {entry.arm.mean_of}'s: that run has been made anew since. Delete {study.run_dir_of(entry)} to run "
            "it anew."
        )


def _row(study: ArenaStudy, entry: Entry, run: RecordedRun, objective: str, weights: Weights) -> Row:
    last = {name: run.evaluations[-1]["domain_loss"][name] for name in study.domains}
    worst = max(last, key=lambda name: last[name])
    objective_loss, micro_loss = weighted_loss(weights, last), weighted_loss(study.natural, last)
    assert objective_loss is not None  # every domain has a loss
    assert micro_loss is not None
    condition = entry.condition
    trap = study.traps.get(condition.trap)
    spent = None
    if trap is not None:
        spent = run.ledger.counts(run.position)[trap.changed_domain] * run.config.data.seq_length
    return Row(
        arm=entry.arm.name,
        objective=objective,
        model=condition.model or "",
        budget=condition.steps,
        trap=condition.trap,
        seed=entry.seed,
        objective_loss=objective_loss,
        macro_loss=statistics.fmean(last.values()),
        micro_loss=micro_loss,
        worst_loss=last[worst],
        worst_domain=worst,
        steps_to_target=None,
        tokens=run.tokens,
        noise_tokens=spent,
        seconds=round(_seconds(run), 1),
        member=entry.name,
        curve=tuple(_curve(run, weights)),
    )


def _curve(run: RecordedRun, weights: Weights) -> Iterator[tuple[int, float]]:
    """(step, objective loss), without the evaluations that lack a domain, which comes later."""
    for line in run.evaluations:
        if (loss := weighted_loss(weights, line["domain_loss"])) is not None:
            yield line["step"], loss


def _seconds(run: RecordedRun) -> float:
    """The time of all training steps, without evaluations and checkpoints."""
    before, found = 0, 0.0
    for line in run.train:
        found += (line["tokens"] - before) / line["tokens_per_second"] if line["tokens_per_second"] else 0.0
        before = line["tokens"]
    return found
