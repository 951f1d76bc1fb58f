"""The keys of a config class, with type, default and meaning, as text."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from megamix.core.config import ByName, Config, configs_in
from megamix.core.errors import InputError


def config_help(model: type[Config], indent: int = 0, data: Mapping[str, Any] | None = None) -> str:
    """One entry per key, nested configs indented; the choices of a union follow each other.

    Args:
        data: a config as read from YAML; what it names by import path is among the choices.
    """
    return "\n".join(
        _entry(name, field, _choices(field, (data or {}).get(name)), indent)
        for name, field in model.model_fields.items()
    )


def key_help(model: type[Config], key: str) -> str:
    """The entry of a key, or of all keys whose names end in it, each under its dotted names.

    Args:
        key: for example ``data.max_epochs`` or ``max_epochs``.

    Raises:
        InputError: there is none.
    """
    found = list(_all_keys(model))
    wanted = [each for each in found if each[0] == key] or [each for each in found if each[0].endswith(f".{key}")]
    if not wanted:
        last = {name.rpartition(".")[2] for name, _, _ in found}
        near = difflib.get_close_matches(key, sorted(last.union(name for name, _, _ in found)), n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "`megamix train --help-config` prints those of a run."
        raise InputError(f"there is no key '{key}' in a config. {hint}")
    entries: dict[str, dict[str, list[str]]] = {}
    for name, of, field in wanted:
        entry = _entry(name.rpartition(".")[2], field, _choices(field), 1)
        entries.setdefault(entry, {}).setdefault(name, []).extend([of] if of else [])
    return "\n\n".join(
        "\n".join([*(name + (f" of {', '.join(of)}" if of else "") for name, of in names.items()), entry])
        for entry, names in entries.items()
    )


def _all_keys(
    model: type[Config], prefix: str = "", of: str = ""
) -> Iterator[tuple[str, str, pydantic.fields.FieldInfo]]:
    """Dotted name, the choice of a union that it belongs to ("": none), and field of every key."""
    for name, field in model.model_fields.items():
        yield prefix + name, of, field
        nested = _choices(field)
        for config in nested:
            yield from _all_keys(config, f"{prefix}{name}.", _choice_name(config) if len(nested) > 1 else of)


def _entry(title: str, field: pydantic.fields.FieldInfo, nested: list[type[Config]], indent: int) -> str:
    pad = "  " * indent
    default = "" if field.is_required() or nested else f" = {_default(field)}"
    required = "  (required)" if field.is_required() else ""
    kind = "" if nested else f": {_type_name(field.annotation)}"
    description = field.description or (_summary(nested[0]) if len(nested) == 1 else "")
    lines = [f"{pad}{title}{kind}{default}{required}", *(f"{pad}    {line}" for line in description.splitlines())]
    for config in nested:
        if len(nested) > 1:
            lines.append(f"{pad}  {title} as {_choice_name(config)}:")
        lines.append(config_help(config, indent + (2 if len(nested) > 1 else 1)))
    return "\n".join(lines)


def _choice_name(config: type[Config]) -> str:
    return config.__name__.removesuffix("Config").lower()


def _summary(config: type[Config]) -> str:
    """The first paragraph of a class's docstring."""
    return inspect.cleandoc(config.__doc__ or "").split("\n\n")[0]


def _default(field: pydantic.fields.FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(field: pydantic.fields.FieldInfo, value: object = None) -> list[type[Config]]:
    """The configs that may stand at a key where ``value`` stands now."""
    found = configs_in(field.annotation)
    for mark in field.metadata:
        if isinstance(mark, ByName):
            found += mark.installed()
            chosen = mark.class_of(value)
            found += [chosen] if chosen is not Any and chosen not in found else []
    return found


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = typing.get_args(annotation)
    origin: Any = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if isinstance(annotation, type) and not arguments:
        return {"Path": "path", "str": "text"}.get(annotation.__name__, annotation.__name__)
    if origin in (list, tuple, dict):
        items = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"{'list' if Ellipsis in arguments else origin.__name__}[{', '.join(items)}]"
    return " | ".join(_type_name(argument) for argument in arguments)
