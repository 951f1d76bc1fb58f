"""Every key of a config class, with its type, default and meaning, as text."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from megamix.core.config import ByName, Config, configs_in


def config_help(model: type[Config], indent: int = 0, data: Mapping[str, Any] | None = None) -> str:
    """One entry per key, nested configs indented; the choices of a union follow each other.

    Args:
        data: a config as read from YAML; what it names by import path is among the choices.
    """
    pad = "  " * indent
    lines = []
    for name, field in model.model_fields.items():
        nested = _choices(field, (data or {}).get(name))
        default = "" if field.is_required() or nested else f" = {_default(field)}"
        required = "  (required)" if field.is_required() else ""
        kind = "" if nested else f": {_type_name(field.annotation)}"
        lines.append(f"{pad}{name}{kind}{default}{required}")
        description = field.description or (_summary(nested[0]) if len(nested) == 1 else "")
        lines += [f"{pad}    {line}" for line in description.splitlines()]
        for config in nested:
            if len(nested) > 1:
                lines.append(f"{pad}  {name} as {config.__name__.removesuffix('Config').lower()}:")
            lines.append(config_help(config, indent + (2 if len(nested) > 1 else 1)))
    return "\n".join(lines)


def _summary(config: type[Config]) -> str:
    """The first paragraph of a class's docstring."""
    return inspect.cleandoc(config.__doc__ or "").split("\n\n")[0]


def _default(field: pydantic.fields.FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _choices(field: pydantic.fields.FieldInfo, value: object) -> list[type[Config]]:
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
