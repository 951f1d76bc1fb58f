"""Whether the run of a member is what the arena asks for now.

A run that has begun keeps the config that it was made with (config.resolved.yaml). Under another config its results
would not be those of this arena.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import digest
from megamix.mixing.mixers import without_code
from megamix.studies.arena.members import Entry, leaves
from megamix.studies.arena.study import ARMS, BEGIN, ArenaStudy
from megamix.training.checkpoints.state import RunState
from megamix.training.config import RunConfig
from megamix.training.records.recorded_run import CONFIG, read_config

FREE = (
    "run_dir", "shadow", "log", "watchdog", "alerts", "engine.threads", "train.stop_after", "data.verify", "data.token_counts",
    "checkpoint.every", "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.asynchronous",
)  # fmt: skip
"""Keys that no result follows from, so that they may change."""


def refuse_changed(study: ArenaStudy) -> None:
    """Raises InputError for a member that has begun with another config."""
    for entry in study.entries:
        if (reason := changed(study, entry)) is not None:
            folder = study.run_dir_of(entry)
            raise InputError(
                f"the member {entry.name} of {study.run_dir} has begun, and has another config now: {reason}. Its results would not be "
                f"those of this arena. Undo the change, give the changed arm another name, or delete {folder} to begin it anew."
            )


def changed(study: ArenaStudy, entry: Entry, state: RunState | None = None) -> str | None:
    """How the config of a member differs from the one that its run was made with, in words; None where it does not, or
    the run has not begun.

    Args:
        state: of the run's checkpoint, of which the data are compared, too.

    Raises:
        InputError: the run's config cannot be read.
    """
    folder = study.run_dir_of(entry)
    if not (folder / CONFIG).is_file():
        return None
    had = read_config(folder)
    parts = [part for part in (ARMS, BEGIN) if part == ARMS or study.is_late(entry.condition)]
    reasons = [_difference(study, entry, part, had) for part in parts]
    if None in reasons:
        return None if state is None else _other_data(study, entry, state)
    return reasons[0]


def _difference(study: ArenaStudy, entry: Entry, part: str, had: RunConfig) -> str | None:
    config = validate(RunConfig, study.config_of(part, entry), f"{study.source}, {entry.name}")
    # As a recorded config is read: without the code of mixers of one's own.
    wanted = validate(RunConfig, without_code(config.model_dump(mode="json")), f"{study.source}, {entry.name}")
    # The mean of another run follows from that run's config.
    free = FREE if entry.arm.mean_of is None else (*FREE, "mixture")
    mine, theirs = (dict(leaves(one, "")) for one in (wanted, had))
    for key in dict.fromkeys((*mine, *theirs)):
        is_free = any(key == one or key.startswith(f"{one}.") for one in free)
        if not is_free and _same(mine.get(key)) != _same(theirs.get(key)):
            return f"{key} is {mine.get(key)}, and was {theirs.get(key)}"
    return None


def _same(value: Any) -> object:
    """A value to compare: an arena that was moved as a whole has other paths."""
    if isinstance(value, Path):
        return value.name
    return [_same(one) for one in value] if isinstance(value, list | tuple) else value


def _other_data(study: ArenaStudy, entry: Entry, state: RunState) -> str | None:
    """The domain whose data are not those that the run was trained on, in words."""
    trap = study.traps.get(entry.condition.trap)
    had = state.fingerprints.get("data", {}).get("domains", {})
    for domain in study.plan.entries:
        is_trap = trap is not None and trap.writes_data and trap.changed_domain == domain.name
        if not is_trap and had.get(domain.name, digest(domain)) != digest(domain):
            return f"the data of '{domain.name}' are not those that it was trained on"
    return None
