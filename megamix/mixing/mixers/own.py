"""Custom mixers: a class given by its import path, or installed under a name.

    mixer: {name: my_package.my_module:MyMixer, temperature: 0.5}
    mixer: {name: my_mixer, temperature: 0.5}       where a package has an entry point ``my_mixer`` of `GROUP`

The class derives from `Mixer`. Its keys are those of the config class that it is annotated with (``config: MyConfig``),
which derives from `ScheduleConfig`; without an annotation they are those of `ScheduleConfig`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
import typing
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pydantic

from megamix.core.errors import InputError, did_you_mean
from megamix.mixing.mixers.base import Mixer, ScheduleConfig

GROUP = "megamix.mixers"
"""Entry points of this group are mixers."""

Found = tuple[type[ScheduleConfig], type[Mixer]]


@functools.cache
def installed() -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of the group by name; a name with several is of no use to anybody."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return {name: tuple(point for point in points if point.name == name) for name in {point.name for point in points}}


@functools.cache
def own_mixer(name: str, taken: tuple[str, ...]) -> Found:
    """The mixer that is not one of ours.

    Args:
        name: an import path, ``package.module:Class``, or the name of an entry point.
        taken: our mixers' names.

    Returns:
        Its config class, with the key ``name``, and the class itself.

    Raises:
        InputError: there is none, it cannot be imported, it is no mixer, or its name is taken.
    """
    path = name if ":" in name else _installed_path(name, taken)
    mixer = _imported(path, name)
    if not (isinstance(mixer, type) and issubclass(mixer, Mixer)):
        raise InputError(f"{path} is {_kind(mixer)}, expected a class that derives from megamix.mixing.Mixer.")
    missing = sorted(mixer.__abstractmethods__)
    if missing:
        raise InputError(f"the mixer {path} does not define {' and '.join(missing)}. Add it to the class.")
    if mixer.name in taken and "name" in vars(mixer):
        raise InputError(
            f"the mixer {path} calls itself '{mixer.name}', which is megamix's own. Change or remove its attribute name."
        )
    return _with_name(_config_class(mixer, path), name), mixer


def check_installed(taken: Sequence[str]) -> None:
    """Refuses an entry point that has the name of one of our mixers: which of them is meant cannot be known.

    Raises:
        InputError: there is one; the message names its package.
    """
    for name in taken:
        if points := installed().get(name):
            raise InputError(
                f"the mixer name '{name}' is megamix's own, and {_listed(points)} installs another mixer under it. Remove "
                f"that package or change its entry point; as an import path, {points[0].value}, it can be used all the same."
            )


def _installed_path(name: str, taken: Sequence[str]) -> str:
    points = installed().get(name, ())
    if not points:
        module, _, attribute = name.rpartition(".")
        raise InputError(
            f"unknown mixer '{name}'."
            + (f" Did you mean '{module}:{attribute}'?" if module else did_you_mean(name, (*taken, *installed())))
        )
    if len({point.value for point in points}) > 1:
        raise InputError(
            f"the mixer name '{name}' is installed more than once: {_listed(points)}. Remove all but one of the packages, "
            "or give the import path."
        )
    return points[0].value


def _imported(path: str, name: str) -> Any:
    """The object at an import path."""
    module_name, _, attribute = path.partition(":")
    said = f"the mixer {path}" + ("" if path == name else f" (entry point '{name}' of {_listed(installed()[name])})")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise InputError(f"{said}: expected an import path of the form package.module:Class.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # any error of the file is for its author to fix
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"{said}: there is no module '{error.name}'. Install its package, or put the folder that holds it on "
                "PYTHONPATH."
            ) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{said}: its module cannot be imported: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})."
        ) from error
    if not hasattr(module, attribute):
        mixers = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, Mixer)]
        hint = did_you_mean(attribute, [key for key in mixers if key != "Mixer"])
        raise InputError(f"{said}: the module {module_name} has no '{attribute}'.{hint}")
    return getattr(module, attribute)


def _config_class(mixer: type[Mixer], path: str) -> type[ScheduleConfig]:
    try:
        found = typing.get_type_hints(mixer).get("config", ScheduleConfig)
    except (NameError, TypeError) as error:
        raise InputError(
            f"the mixer {path}: its annotations cannot be read: {error}. Import at run time what `config:` names."
        ) from error
    if not (isinstance(found, type) and issubclass(found, ScheduleConfig)):
        raise InputError(
            f"the mixer {path}: config is annotated as {_kind(found)}, expected a class that derives from "
            "megamix.mixing.ScheduleConfig."
        )
    return found


def _with_name(config_class: type[ScheduleConfig], name: str) -> type[ScheduleConfig]:
    """The config class with the key by which a config chooses it, so that what is written into a run can be read."""
    only: Any = typing.Literal[name]  # pyright: ignore[reportInvalidTypeForm]
    return pydantic.create_model(
        config_class.__name__,
        __base__=config_class,
        __doc__=config_class.__doc__,
        __module__=config_class.__module__,
        name=(only, pydantic.Field(default=name, description="Which mixer this configures.")),
    )


def _listed(points: Sequence[EntryPoint]) -> str:
    owners = [point.dist.name if point.dist is not None else point.value for point in points]
    return " and ".join(dict.fromkeys(owners))


def _kind(value: Any) -> str:
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    return f"of type {type(value).__name__}"
