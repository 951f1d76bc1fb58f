"""The base of every config class, and how plain data (`megamix.core.config_files`) becomes one.

Each config class lives beside the thing it configures and derives from `Config`: frozen, and a key it does not know is
an error that names the nearest right one.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic_core import core_schema

from megamix.core.config_files import Kinds, Origins, apply_overrides, read_with_origins
from megamix.core.errors import InputError, did_you_mean
from megamix.core.paths import expand, literal

C = TypeVar("C", bound="Config")
IS_PATH = object()
"""Marks a field of type str whose text may be a path: ``Annotated[str, IS_PATH]``."""
_LARGEST = 2**64


class Config(pydantic.BaseModel):
    """Frozen, strict about unknown keys, documented by attribute docstrings."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand_paths(cls, data: Any) -> Any:
        """Text in the place of a path may name home and variables; see `megamix.core.paths`."""
        if not isinstance(data, dict):
            return data
        found = dict(data)
        for key in cls._path_keys() & data.keys():
            if isinstance(data[key], str):
                try:
                    found[key] = expand(data[key])
                except InputError as error:
                    raise ValueError(f"{key}: {error}") from error
        return found

    @pydantic.model_serializer(mode="wrap")
    def _write_paths(self, dump: pydantic.SerializerFunctionWrapHandler, info: pydantic.SerializationInfo) -> Any:
        """A config that was written is read again: its paths are expanded already."""
        found = dump(self)
        for key in self._path_keys() & found.keys() if info.mode == "json" else ():
            if isinstance(found[key], str):
                found[key] = literal(found[key])
        return found

    @classmethod
    @functools.cache
    def _path_keys(cls) -> frozenset[str]:
        return frozenset(
            key
            for key, field in cls.model_fields.items()
            if Path in _members(field.annotation) or IS_PATH in field.metadata
        )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _numbers_that_can_be_used(cls, data: Any) -> Any:
        """pydantic would take ``warmup: true`` for 1, and whole numbers that no arithmetic with floats can take."""
        for key, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, int) and abs(value) > _LARGEST and str(key) in cls.model_fields:
                raise ValueError(f"{key} has more than {len(str(_LARGEST)) - 1} digits, expected a smaller number.")
            if isinstance(value, bool) and (field := cls.model_fields.get(str(key))) is not None:
                members = _members(field.annotation)
                if bool not in members and (int in members or float in members):
                    raise ValueError(f"{key} is {str(value).lower()}, expected a number.")
        return data


class DefaultName(Kinds):
    """Marks a union told apart by ``name``, and names the kind of a mapping without one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return core_schema.no_info_before_validator_function(self._named, handler(source))

    def differ(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        return "name" in new and new["name"] != old.get("name", self._name)

    def _named(self, value: Any) -> Any:
        return {"name": self._name, **value} if isinstance(value, dict) else value


class ByName(Kinds):
    """Marks a field whose config class follows from the value's ``name``: ``Annotated[AnyOfThese, ByName(find)]``.

    Unlike the branches of a pydantic union, the classes need not be known beforehand.

    Args:
        find: the class for a name (None where there is none); raises `InputError` for one that has none.
        installed: the classes that come with other packages, to be shown in help.
        variant: a key that decides what other keys mean, in classes that have it: a mapping that has a name and
            differs in this key is of another kind.
    """

    def __init__(
        self,
        find: Callable[[object], type[Config]],
        installed: Callable[[], list[type[Config]]],
        variant: str | None = None,
    ) -> None:
        self._find = find
        self._variant = variant
        self.installed = installed
        # A separate config, so that a name that cannot be used is reported under its key.
        self._name = pydantic.create_model(
            "Name", name=(typing.Annotated[Any, pydantic.AfterValidator(self._found)], ...)
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler.generate_schema(typing.Annotated[Any, pydantic.BeforeValidator(self._validate)])

    def differ(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        if "name" not in new:
            return False
        if new["name"] != old.get("name", new["name"]):
            return True
        key = self._variant
        if key is None or key not in new:
            return False
        found = self.class_of(new)
        field = found.model_fields.get(key) if _is_config(found) else None
        return new[key] != old.get(key, None if field is None else field.default)

    def class_of(self, value: object) -> Any:
        """The class for a value that stands in a config; Any where it has none."""
        try:
            return self._find(value.get("name")) if isinstance(value, Mapping) else Any
        except InputError:
            return Any

    def _validate(self, value: object) -> Config:
        if isinstance(value, Config):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"got {value!r}, expected a mapping with the key 'name'.")
        found = dict(self._name(name=value.get("name")))["name"]
        return found.model_validate(value)

    def _found(self, name: object) -> type[Config]:
        try:
            return self._find(name)
        except InputError as error:
            raise ValueError(str(error)) from error


class ByKey(Kinds):
    """Marks a field whose config class follows from a key that only this class has, with text, a list or a mapping as
    its value, or with a number where it is the only key: mappings of names to numbers stay what they are.

    Args:
        kinds: the class of each such key.
        mapping: the type of any other mapping.
        plain: the type of a value that is no mapping.

    Attributes:
        types: every type by the tag that pydantic's errors call it by.
    """

    def __init__(self, kinds: Mapping[str, type[Config]], *, mapping: Any, plain: Any) -> None:
        self._kinds = kinds
        self.types: dict[object, Any] = {**kinds, "mapping": mapping, "plain": plain}

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        choices = {tag: handler.generate_schema(kind) for tag, kind in self.types.items()}
        return core_schema.tagged_union_schema(choices, self._tag)

    def differ(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """A mapping with only further keys of a kind is of that kind."""
        before, after = self._tag(old), self._tag(new)
        further = self._kinds[before].model_fields.keys() - {before} if before in self._kinds else new.keys()
        chosen = after in self._kinds and after not in old
        return before != after and (chosen or not further & new.keys())

    def _tag(self, value: object) -> str:
        for key, kind in self._kinds.items():
            if isinstance(value, kind) or (isinstance(value, Mapping) and _chooses(key, value)):
                return key
        return "mapping" if isinstance(value, Mapping) else "plain"


def _chooses(key: str, value: Mapping[Any, Any]) -> bool:
    """Whether ``value`` is of the kind that ``key`` chooses; see `ByKey`."""
    given = value.get(key)
    return isinstance(given, str | Path | list | tuple | Mapping) or (
        isinstance(given, int | float) and len(value) == 1
    )


def kinds_of(model: type[Config]) -> dict[str, Kinds]:
    """The marks in a config class, at any depth, by key."""
    found: dict[str, Kinds] = {}
    for key, field in model.model_fields.items():
        found.update((key, mark) for mark in field.metadata if isinstance(mark, Kinds))
        for config in configs_in(field.annotation):
            found |= kinds_of(config)
    return found


def configs_in(annotation: Any) -> list[type[Config]]:
    """The config classes that an annotation names."""
    if _is_config(annotation):
        return [annotation]
    return [config for argument in typing.get_args(annotation) for config in configs_in(argument)]


def validate(model: type[C], data: Any, source: str, origins: Mapping[tuple[str, ...], Path] | None = None) -> C:
    """Builds ``model`` from plain data; all problems are reported at once, in words, with the nearest right key for a
    misspelt one.

    Args:
        origins: the files, other than ``source``, that keys come from.
    """
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        lines = []
        # A default that depends on other values has no problem of its own.
        found = [problem for problem in error.errors() if problem["type"] != "default_factory_not_called"]
        for problem in _without_other_branches(model, found, data):
            file = (origins or {}).get(tuple(_trace(model, problem["loc"], data)[0]))
            lines.append(_describe(model, problem, data) + (f" It stands in {file}." if file is not None else ""))
        raise InputError(f"{source}:" + ("\n  " if len(lines) > 1 else " ") + "\n  ".join(lines)) from error


def first_problem(error: Exception) -> str:
    """The first problem that pydantic has found, in a line; of another error what it says."""
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _describe(model: type[Config], problem: Any, data: Any) -> str:
    keys, _, here = _trace(model, problem["loc"], data)
    path = ".".join(keys)
    where = f"{path}: " if path else ""
    if problem["type"] == "extra_forbidden":
        _, _, owner = _trace(model, problem["loc"][:-1], data)
        return f"unknown key '{path}'." + did_you_mean(keys[-1], owner.model_fields if _is_config(owner) else ())
    if problem["type"] == "missing":
        return f"the key '{path}' is missing. Add it."
    if problem["type"] == "value_error":
        return f"{where}{problem['ctx']['error']}"
    known = [str(name) for member in _members(here) for name in _names(member)]
    if problem["type"] == "union_tag_invalid":
        return f"{path}.name: unknown '{problem['ctx']['tag']}'." + did_you_mean(problem["ctx"]["tag"], known)
    return f"{where}{problem['msg']}, got {problem['input']!r}."


def _without_other_branches(model: type[Config], problems: Sequence[Any], data: Any) -> list[Any]:
    """The problems without those of union branches that the value was not meant for: where one branch says what is
    wrong inside the value, another's complaint about the value as a whole is noise."""
    traced = [(_trace(model, problem["loc"], data), problem) for problem in problems]
    return [
        problem
        for (keys, in_union, _), problem in traced
        if not (in_union and any(len(other) > len(keys) and other[: len(keys)] == keys for (other, _, _), _ in traced))
    ]


def _trace(model: type[Config], location: Sequence[int | str], data: Any) -> tuple[list[str], bool, Any]:
    """Follows an error's location through the config classes.

    Returns:
        The keys as they stand in the file (pydantic puts the name of a union's branch between them), whether the
        location ends at such a branch, and the type it leads to.
    """
    keys: list[str] = []
    here: Any = model
    in_union = False
    for part in location:
        members = _members(here)
        in_union = len(members) > 1
        if in_union:
            here = _branch(here, members, part)
            continue
        keys.append(str(part))
        data = _value_at(data, part)
        here = _type_at(members[0], str(part), data)
    members = _members(here)
    return keys, in_union, members[0] if len(members) == 1 else here


def _value_at(data: Any, part: int | str) -> Any:
    try:
        return data[part]
    except (KeyError, IndexError, TypeError):
        return None


def _type_at(owner: Any, part: str, value: Any) -> Any:
    """The type of ``value``, which stands at a key or index of an ``owner``."""
    if _is_config(owner):
        field = owner.model_fields.get(part)
        annotation, marks = (Any, ()) if field is None else (field.annotation, field.metadata)
    elif typing.get_origin(owner) in (tuple, list, dict):
        annotation = typing.get_args(owner)[1 if typing.get_origin(owner) is dict else 0]
        marks = getattr(annotation, "__metadata__", ())
    else:
        annotation, marks = Any, ()
    for mark in marks:
        if isinstance(mark, ByName):
            return mark.class_of(value)
        if isinstance(mark, ByKey):
            return typing.Annotated[annotation, mark]
    return annotation


def _branch(union: Any, members: Sequence[Any], tag: object) -> Any:
    """The member of a union that pydantic calls ``tag``."""
    for mark in getattr(union, "__metadata__", ()):
        if isinstance(mark, ByKey):
            return mark.types.get(tag, Any)
    return next((member for member in members if tag in _names(member)), Any)


def _members(annotation: Any) -> list[Any]:
    """The types a value of this annotation may have, None left out."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
        return [member for argument in arguments for member in _members(argument)]
    return [annotation]


def _is_config(annotation: Any) -> typing.TypeGuard[type[Config]]:
    # Before Python 3.11, list[int] is a type as well.
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return plain and issubclass(annotation, Config)


def _names(member: Any) -> tuple[Any, ...]:
    """The values of ``name`` that choose this member of a union."""
    field = member.model_fields.get("name") if _is_config(member) else None
    return typing.get_args(field.annotation) if field is not None else ()


def load_config(model: type[C], path: Path, overrides: list[str] | None = None) -> C:
    """Reads ``path`` with its includes, applies the overrides and validates the whole as ``model``."""
    path, origins, kinds = Path(path), Origins(), kinds_of(model)
    data = apply_overrides(read_with_origins(path, kinds, origins), overrides or [], kinds, origins)
    overridden = [tuple(item.partition("=")[0].strip().split(".")) for item in overrides or []]
    included = {
        keys: file
        for keys, file in origins.items()
        if file != path.resolve() and not any(keys[: len(given)] == given for given in overridden)
    }
    return validate(model, data, str(path), included)
