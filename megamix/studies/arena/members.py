"""What a member of an arena is: an arm under a condition, with a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.training.config import KINDS

Run = dict[str, Any]
"""A run's config, nested, not validated."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        changes: keys of a run that differ, nested.
        is_static: whether no mixer changes its weights.
        follows_objective: whether its mixer does.
        mean_of: the arm whose mean weights it has; None for an arm with its own.
    """

    name: str
    changes: Run
    is_static: bool
    follows_objective: bool
    mean_of: str | None = None


@dataclass(frozen=True)
class Condition:
    """What all arms of a comparison share: the model (None: the run's), the number of steps and the trap."""

    model: str | None
    steps: int
    trap: str


@dataclass(frozen=True)
class Entry:
    """A member of the arena, before it has a config.

    Attributes:
        objective: that its mixer follows; None where it follows none.
        name: of its config file and its run.
    """

    arm: Arm
    objective: str | None
    condition: Condition
    seed: int
    name: str


def nested(changes: Mapping[str, Any], where: str) -> Run:
    """Changes with dotted keys as nested mappings; raises InputError for one that is not of that form."""
    found: Run = {}
    for path, value in changes.items():
        keys = str(path).split(".")
        if not all(keys):
            raise InputError(f"{where}: '{path}' is no key. Write key.path, for example mixer.name.")
        for key in reversed(keys):
            value = {key: value}
        found = merge(found, value, KINDS)
    return found
