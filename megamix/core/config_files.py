"""YAML files of configs and ``key.path=value`` overrides as plain data.

A file may start from others with ``include: [a.yaml, b.yaml]`` (paths relative to itself); later values win, mappings
merge.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError
from megamix.core.files import read_regular
from megamix.core.paths import expand
from megamix.core.yaml_text import parse_yaml

Origins = dict[tuple[str, ...], Path]
"""The file that each key of a config, given by its path, comes from."""


class Kinds:
    """Marks a field whose mapping is of one of several kinds: ``Annotated[Union, mark]``.

    A mapping of another kind replaces the one it is laid over; one of the same kind merges with it (`merge`).
    """

    def differ(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether ``new`` is of another kind than ``old``, which it is laid over."""
        raise NotImplementedError


KindsByKey = Mapping[str, Kinds]
MOST_BYTES = 16 << 20
"""Bytes of a config."""
MOST_DEPTH = 50
"""Files that include one another in a chain."""
NO_KINDS: KindsByKey = types.MappingProxyType({})


def read_yaml(path: Path, kinds: KindsByKey = NO_KINDS) -> dict[str, Any]:
    """Reads a YAML mapping and the files it includes (depth first; the including file wins).

    Args:
        kinds: see `merge`.
    """
    return read_with_origins(Path(path), kinds, {})


def read_with_origins(
    path: Path,
    kinds: KindsByKey,
    origins: Origins,
    chain: tuple[Path, ...] = (),
    known: dict[Path, tuple[dict[str, Any], Origins]] | None = None,
) -> dict[str, Any]:
    """`read_yaml`, noting the file of each key in ``origins``.

    Args:
        chain: the files that include this one.
        known: what was read already, as files that include the same ones twice each would be read 2^n times.
    """
    known = {} if known is None else known
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise InputError(f"cannot read the config {path}: {error}. Check the path, and links in it.") from error
    if path in chain:
        raise InputError(f"{path} includes itself by way of {' -> '.join(str(p) for p in chain)}.")
    if len(chain) > MOST_DEPTH:
        raise InputError(f"{chain[0]} includes files {len(chain)} deep, down to {path}. Include fewer, in one list.")
    if path in known:
        origins.update(known[path][1])
        return known[path][0]
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        by = f", which {chain[-1]} includes" if chain else ""
        raise InputError(f"cannot read the config {path}{by}: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a YAML file: it is not UTF-8 text ({error.reason}).") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise InputError(f"{path} {found}, expected a mapping of keys to values.")
    included = data.pop("include", [])
    if isinstance(included, str):
        included = [included]
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise InputError(f"{path}: include is {included!r}, expected a path or a list of paths.")
    merged: dict[str, Any] = {}
    own: Origins = {}
    for name in included:
        found = read_with_origins(path.parent / expand(name), kinds, own, (*chain, path), known)
        merged = merge(merged, found, kinds)
    own.update(dict.fromkeys(_paths(data), path))
    origins.update(own)
    known[path] = merge(merged, data, kinds), own
    return known[path][0]


def _paths(data: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The path of every key, at every depth."""
    for key, value in data.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _paths(value))


def merge(base: dict[str, Any], over: dict[str, Any], kinds: KindsByKey = NO_KINDS) -> dict[str, Any]:
    """``base`` updated by ``over``; nested mappings merge key by key, except where ``over`` is of another kind: then
    none of the old keys apply.

    Args:
        kinds: how mappings at a key, at any depth, are told apart; see `kinds_of`.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            replaces = key in kinds and kinds[key].differ(old, value)
            result[key] = dict(value) if replaces else merge(old, value, kinds)
        else:
            result[key] = value
    return result


def apply_overrides(
    data: dict[str, Any],
    overrides: list[str],
    kinds: KindsByKey = NO_KINDS,
    origins: Origins | None = None,
) -> dict[str, Any]:
    """Applies ``key.path=value`` items and further YAML files, in their order.

    Values are YAML, so ``train.steps=10`` is an int and ``train={steps: 10}`` a mapping.

    Args:
        kinds: see `merge`.
        origins: is told which keys the files have.
    """
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals and item.endswith((".yaml", ".yml")):
            data = merge(data, read_with_origins(Path(expand(item)), kinds, {} if origins is None else origins), kinds)
            continue
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError(
                f"override '{item}' is neither of the form key.path=value, for example train.steps=100, nor a .yaml file."
            )
        value: Any = parse_yaml(text, f"override '{item}'") if text.strip() else None
        for key in reversed(keys):
            value = {key: value}
        data = merge(data, value, kinds)
    return data
