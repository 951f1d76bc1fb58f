"""YAML as configs need it: numbers like 1e-4, keys that are text, merges by YAML's rule, no key twice."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from megamix.core.errors import InputError

MOST_VALUES = 1_000_000
"""Keys and values of a config, those that aliases stand for counted each time."""
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads plain values as they are meant: ``1e-4`` is a number; ``no``, ``20:00:00`` and
    ``2026-01-01`` are text (a field of type bool still takes yes and no)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Puts the pairs that ``<<`` names in its place: a mapping's own keys win, then the earlier of several merged
        mappings (yaml.org/type/merge).

        PyYAML's own differs between versions where a merged mapping merges another: 6.0.4 lets the innermost win.
        """
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        sources = [value for key, value in node.value if key.tag == _MERGE]
        node.value = own  # first, so that a mapping that merges itself comes to an end
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for source in itertools.chain.from_iterable(_mappings_to_merge(node, source) for source in sources):
            self.flatten_mapping(source)
            for pair in source.value:
                merged.setdefault(pair[0].value, pair)
        for key, _ in own:
            merged.pop(key.value, None)
        node.value = [*merged.values(), *own]


def _mappings_to_merge(node: yaml.Node, source: yaml.Node) -> Iterator[yaml.MappingNode]:
    """The mappings that the value of a ``<<`` key names."""
    for each in source.value if isinstance(source, yaml.SequenceNode) else [source]:
        if not isinstance(each, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(
                "while constructing a mapping",
                node.start_mark,
                f"expected a mapping or a list of mappings after <<, but found {each.value!r}",
                each.start_mark,
            )
        yield each


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]{1,64})$", "-+0123456789"),
    (
        "float",
        r"^[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+|[0-9]+\.[0-9]*|\.[0-9]+|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    ("null", r"^(~|null|Null|NULL|)$", ("~", "n", "N", "")),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """Parses YAML; a syntax error becomes an `InputError` that names ``source`` and the place."""
    try:
        loader = _Loader(text)
        loader.name = source
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, source)
            _check_keys(node, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source} is not valid YAML: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:  # of PyYAML, for a tag whose value is none of its kind
        raise InputError(
            f"{source} is not valid YAML: a tag such as !!bool stands before something else ({error}). Leave tags out."
        ) from error
    except RecursionError as error:
        raise InputError(
            f"{source} cannot be read: its lists or mappings are nested too deep. Make it flatter."
        ) from error


def _check_size(node: yaml.Node, source: str) -> None:
    """Refuses aliases that stand for more than anybody writes, or for what they stand in."""
    sizes: dict[int, int | None] = {}

    def size(part: yaml.Node, merged: bool = False) -> int:
        if not isinstance(part, yaml.CollectionNode):
            return 1
        if id(part) not in sizes:
            sizes[id(part)] = None
            if isinstance(part, yaml.MappingNode):
                sizes[id(part)] = 1 + sum(1 + size(value, key.tag == _MERGE) for key, value in part.value)
            else:
                sizes[id(part)] = 1 + sum(size(item, merged) for item in part.value)
        found = sizes[id(part)]
        if found is None and merged:
            return 0  # a mapping may merge itself: it has its keys already
        if found is None:
            where = f"{source}, line {part.start_mark.line + 1}"
            raise InputError(f"{where}: an alias stands inside of what it stands for. Write it out.")
        return found

    if (seen := size(node)) > MOST_VALUES:
        raise InputError(
            f"{source} holds {seen:,} values once its aliases are written out, expected at most {MOST_VALUES:,}. Use fewer"
            " aliases."
        )


def _check_keys(node: yaml.Node, done: set[int]) -> None:
    """Makes every key of a tree of nodes text (also ``no`` and ``2024``), and refuses one given twice."""
    if id(node) in done or not isinstance(node, yaml.CollectionNode):
        return
    done.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, done)
        return
    seen: set[str] = set()
    for key, value in node.value:
        where = f"{key.start_mark.name}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}: a list or mapping stands where a key is expected. Keys are text.")
        if key.value in seen:
            raise InputError(f"{where}: the key '{key.value}' is given twice. Keep one of them.")
        seen.add(key.value)
        if key.tag != _MERGE:
            key.tag = "tag:yaml.org,2002:str"
        _check_keys(value, done)
