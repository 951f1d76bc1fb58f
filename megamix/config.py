"""The base of every config class, and how YAML files and ``key.path=value`` overrides become one.

Each config class lives beside the thing it configures and derives from `Config`: frozen, and a key it does not know is
an error that names the nearest right one. A YAML file may start from others with ``include: [a.yaml, b.yaml]`` (paths
relative to itself); later values win, mappings merge.
"""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from megamix.errors import InputError, did_you_mean

C = TypeVar("C", bound="Config")


class Config(pydantic.BaseModel):
    """Frozen, strict about unknown keys, documented by attribute docstrings."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number, as everybody expects, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise InputError(
                    f"{node.start_mark.name}, line {key_node.start_mark.line + 1}: the key '{key}' is given twice. Keep one of them."
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"""^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$  # with an exponent, with or without a point
    |^[-+]?([0-9]+\.[0-9]*|\.[0-9]+)$
    |^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$""",
    re.VERBOSE,
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    _FLOAT,
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML; a syntax error becomes an `InputError` that names ``source`` and the place."""
    try:
        loader = _Loader(text)
        loader.name = source
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping and the files it includes (depth first; the including file wins)."""
    return _read_yaml(Path(path), ())


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in chain:
        raise InputError(f"{path} includes itself by way of {' -> '.join(str(p) for p in chain)}.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror or error}. Check the path.") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}, expected a mapping of keys to values.")
    included = data.pop("include", [])
    if isinstance(included, str):
        included = [included]
    merged: dict[str, Any] = {}
    for name in included:
        merged = merge(merged, _read_yaml(path.parent / name, (*chain, path)))
    return merge(merged, data)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` updated by ``over``; nested mappings merge key by key, except where ``over`` has
    another ``name``: then it is of another kind, and none of the old keys apply."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and "name" in value
            and value["name"] != old.get("name", value["name"])
        ):
            result[key] = dict(value)
        else:
            result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies ``key.path=value`` items; values are YAML, so ``train.steps=10`` is an int and ``mixture={web: 1}`` a
    mapping."""
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError(f"override '{item}' is not of the form key.path=value, for example train.steps=100.")
        value = parse_yaml(text, f"override '{item}'") if text.strip() else None
        for key in reversed(keys):
            value = {key: value}
        data = merge(data, value)
    return data


def validate(model: type[C], data: Any, source: str) -> C:
    """Builds ``model`` from plain data; all problems are reported at once, in words, with the nearest right key for a
    misspelt one."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [_describe(model, problem) for problem in error.errors()]
        raise InputError(
            f"{source}: " + (lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines))
        ) from error


def _describe(model: type[Config], problem: Any) -> str:
    location = list(problem["loc"])
    path = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        owner = _owner(model, location[:-1])
        path = ".".join(str(part) for part in location if not _is_tag(model, location, part))
        return f"unknown key '{path}'." + did_you_mean(str(location[-1]), owner.model_fields if owner else ())
    if problem["type"] == "missing":
        return f"the key '{path}' is missing. Add it."
    if problem["type"] == "value_error":
        where = f"{path}: " if path else ""
        return f"{where}{problem['ctx']['error']}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = problem.get("ctx", {})
        tag = context.get("tag")
        known = [name.strip(" '") for name in str(context.get("expected_tags", "")).split(",") if name.strip(" '")]
        discriminator = str(context.get("discriminator", "'name'")).strip("'")
        if tag is None:
            return f"{path} needs the key '{discriminator}'." + did_you_mean("", known)
        return f"{path}.{discriminator}: unknown '{tag}'." + did_you_mean(str(tag), known)
    return f"{path}: {problem['msg']}, got {problem['input']!r}."


def _is_tag(model: type[Config], location: list[Any], part: Any) -> bool:
    """Whether ``part`` of an error location is a union tag that pydantic inserted rather than a key of the file."""
    index = location.index(part)
    owner = _owner(model, location[:index])
    return owner is not None and part not in owner.model_fields and index < len(location) - 1


def _owner(model: type[Config], location: list[Any]) -> type[Config] | None:
    """The config class that a location inside ``model`` leads to; None where it leads to something else."""
    candidates: list[Any] = [model]
    for part in location:
        found: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, pydantic.BaseModel):
                field = candidate.model_fields.get(str(part))
                if field is not None:
                    found += _classes(field.annotation)
                elif any(str(part) == tag for tag in _tags(candidate)):
                    found.append(candidate)
        candidates = found
    return candidates[0] if candidates else None


def _classes(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _classes(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [found for argument in typing.get_args(annotation) for found in _classes(argument)]
    return [annotation] if isinstance(annotation, type) else []


def _tags(model: type[pydantic.BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("name")
    return (*typing.get_args(field.annotation), model.__name__) if field is not None else (model.__name__,)


def load_config(model: type[C], path: Path, overrides: list[str] | None = None) -> C:
    """Reads ``path`` with its includes, applies the overrides and validates the whole as ``model``."""
    return validate(model, apply_overrides(read_yaml(Path(path)), overrides or []), str(path))
