"""Reads the config of an arena, and finds what would stop a member later, before the first begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megamix.core.config import validate
from megamix.core.errors import InputError
from megamix.studies.arena.config import CONTROLS, NO_TRAP, ArenaConfig
from megamix.studies.arena.members import STATIC, Arm, Condition, Entry, leaves, naming
from megamix.studies.arena.study import ArenaStudy
from megamix.studies.runs import read_section
from megamix.training.config import RunConfig
from megamix.training.plan import make_plan

SETTLED = (
    "run_dir", "objective", "model", "train.seed", "train.steps", "train.stop_after", "train.global_batch", "train.batch_ramp",
    "train.micro_batch", "data.manifest", "data.domains", "data.seq_length", "data.attention", "data.eod_mask_loss",
    "data.reset_position_ids", "evaluate", "checkpoint.domains",
)  # fmt: skip
"""Keys that no arm may change: the arena sets them, or losses would not be comparable."""


def read_study(config_path: Path, overrides: list[str]) -> ArenaStudy:
    """Reads a config and checks all members before the first begins.

    Raises:
        InputError: a key or value that cannot be used, named with its arm or trap.
    """
    source = str(config_path)
    data, config = read_section(ArenaConfig, "arena", config_path, overrides, {}, "")
    run_dir = validate(RunConfig, data, source).run_dir
    study = ArenaStudy(data, config, run_dir, source)
    check(study)
    return study


def check(study: ArenaStudy) -> None:
    """Raises InputError for whatever would stop a member later."""
    _ = study.objectives  # raises for weights that cannot be used
    for name, trap in study.traps.items():
        where = f"{study.source}: arena.traps.{name}"
        trap.check(study.plan.config.data.seq_length, where)
        steps = [condition.steps for condition in study.conditions if condition.trap == name]
        if trap.config.from_step is not None and trap.config.from_step >= min(steps):
            raise InputError(
                f"{where}.from_step is {trap.config.from_step}, and members end after {min(steps)} steps. Let the domain come earlier."
            )
    stop = study.plan.config.train.stop_after
    if stop is not None and stop < max(condition.steps for condition in study.conditions):
        raise InputError(
            f"{study.source}: train.stop_after is {stop}, so members would not reach their last step. Remove it."
        )
    for arm in study.arms.values():
        _check_settled(study, arm)
        if arm.mean_of is None:
            for condition in study.conditions:
                _check_condition(study, arm, condition)
    for name in CONTROLS.keys() & study.config.arms.keys():
        _check_control(study, study.arms[name])


def _check_settled(study: ArenaStudy, arm: Arm) -> None:
    """Raises InputError for a key that all arms have in common, and this one does not."""
    config = validate(RunConfig, study.with_changes(arm.changes), f"{study.source}, arm {arm.name}")
    for settled in SETTLED:
        mine, wanted = (dict(leaves(_value_at(one, settled), settled)) for one in (config, study.plan.config))
        for key in dict.fromkeys((*mine, *wanted)):
            if mine.get(key) != wanted.get(key):
                raise InputError(
                    f"{study.source}, arm {arm.name}: {key} is {mine.get(key)}, and {wanted.get(key)} in the run's config. All arms have "
                    "the same: set it there, or leave it out here."
                )


def _check_condition(study: ArenaStudy, arm: Arm, condition: Condition) -> None:
    """Raises InputError where an arm cannot be planned under a condition; traps that write data are planned without
    it."""
    if condition.trap == NO_TRAP:
        study.arm_plan(arm, condition.model, condition.steps)
    elif study.is_late(condition):
        entry = Entry(arm, study.objectives_of(arm)[0], condition, study.config.seeds[0], "")
        where = f"{study.source}, arm {arm.name}, trap {condition.trap}, before its domain comes"
        with naming(where):
            make_plan(validate(RunConfig, study.begin_run(entry), where), verify=False)


def _check_control(study: ArenaStudy, arm: Arm) -> None:
    """Raises InputError for an arm of the config with the name of a control and other weights: tables say "against
    natural"."""
    given = validate(RunConfig, {**study.base, "mixture": CONTROLS[arm.name], "mixer": STATIC}, study.source)
    wanted = make_plan(given, verify=False).policy.stages
    found = study.arm_plan(arm, None).policy.stages
    if not arm.is_static or len(found.weights) > 1 or not np.allclose(found.at(0), wanted.at(0)):
        raise InputError(
            f"{study.source}, arm {arm.name}: the name is that of a control, static with the mixture {CONTROLS[arm.name]}, and this arm "
            "has other weights. Choose another name."
        )


def _value_at(config: Any, key: str) -> object:
    """The value at a dotted key of a config; None where it has no such key."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config
