"""What a member of an arena is: an arm under a condition, with a seed; and the configs of these, as mappings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megamix.core.config import Config
from megamix.core.config_files import merge
from megamix.core.errors import InputError
from megamix.training.config import KINDS

Run = dict[str, Any]
"""A run's config, nested, not validated."""
STATIC = {"name": "static"}
"""The mixer of an arm that keeps its weights."""


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


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Lets an InputError begin with where it is."""
    try:
        yield
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(where) else f"{where}: {said}") from error


def leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every value in a config, or nested mappings, that is not itself one of these."""
    value = value.model_dump() if isinstance(value, Config) else value
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
