"""Weights from files: plain, DoReMi's, a mixer's record, or a Megatron blend.

{"web": 0.7, "code": 0.3}                                                          plain
{"web": {"weight": 0.7, "topics": {"news": 0.5, "forums": 0.5}}, "code": 0.3}      plain, by source and topic
{"train_domain_weights": {"web": 0.7, ...}, "eval_domain_weights": {...}}          DoReMi's domain config
{"domain_names": ["web", ...], "domain_weights": [0.7, ...]}, or a list of them    a record; of a list the last counts
0.7 /data/web_text_document 0.3 /data/code_text_document                           Megatron's --data-args-path
{"train": ["0.7", "/data/web", ...], "valid": ..., "test": ...}                    Megatron's --per-split-data-args-path
{"weights": {"web": 0.7, ...}, "predicted": ...}                                   mixture.json of `megamix swarm`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError, given_twice
from megamix.core.files import read_json, read_text
from megamix.core.text import listed
from megamix.mixing.megatron_blend import (
    PER_SPLIT_KEYS,
    FileBlend,
    domains_of,
    parse_per_split,
    read_data_args,
)
from megamix.mixing.mixers import normalise_weights
from megamix.mixing.sources import is_source, weights_by_domain

_DOREMI_KEYS = frozenset(("train_domain_weights", "eval_domain_weights"))
_RECORD_KEYS = frozenset(("domain_names", "domain_weights"))
_SWARM_KEYS = frozenset(("weights", "predicted"))
SWARM_MIXTURE = "mixture.json"
"""What `megamix swarm propose DIR` writes in DIR."""
_FORMATS = (
    ("a swarm's mixture", _SWARM_KEYS),
    ("DoReMi's domain config", _DOREMI_KEYS),
    ("a record of weights", _RECORD_KEYS),
    ("Megatron's per-split blend", PER_SPLIT_KEYS),
)


def read_weights(path: Path, domains: Sequence[str]) -> dict[str, float]:
    """The weights of ``domains`` in a file of any of the formats above.

    Files of a Megatron blend are given to domains by their names (`domains_of`), and a domain without a file has weight
    0, since such a blend cannot say 0; in all other formats every domain must be named.

    Args:
        path: JSON, or the string of ``--data-path``; told apart by the contents.
        domains: the K names expected.

    Returns:
        Each domain's weight, in the order of ``domains``, summing to 1.

    Raises:
        InputError: a file that cannot be read, two formats in one, an unknown or missing name, or a weight that is no
            number, negative, NaN or infinite.
    """
    path = Path(path)
    text = read_text(path).lstrip()
    if not text:
        raise InputError(f"{path} is empty, expected weights. Write for example " + '{"web": 0.7, "code": 0.3}.')
    weights = (
        _of_json(read_json(path), path, domains) if text[0] in '{["' else _of_blend(read_data_args(path), path, domains)
    )
    values = normalise_weights(weights, domains, str(path))
    return dict(zip(domains, values.tolist(), strict=True))


def read_swarm_weights(directory: Path) -> dict[str, float]:
    """The weights that `megamix swarm propose` has written in ``directory``, of all its domains.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    path = Path(directory) / SWARM_MIXTURE
    if not path.is_file():
        what = "there is no such directory" if not Path(directory).is_dir() else f"it has no {SWARM_MIXTURE}"
        raise InputError(
            f"the swarm {directory} has no proposed mixture: {what}. Make one: megamix swarm propose {directory}."
        )
    data = read_json(path)
    weights = data.get("weights") if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{path}: weights is {weights!r}, expected an object of weights by domain.")
    values = normalise_weights(weights, list(weights), str(path))
    return dict(zip(weights, values.tolist(), strict=True))


def doremi_config(train: Mapping[str, float], evaluation: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """DoReMi's domain config (github.com/sangmichaelxie/doremi, ``configs/*.json``)."""
    return {"train_domain_weights": dict(train), "eval_domain_weights": dict(evaluation)}


def _of_json(data: Any, path: Path, domains: Sequence[str]) -> Mapping[str, Any]:
    if isinstance(data, list):
        return _of_records(data, path)
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {data!r}, expected an object of weights by domain, or a list of records.")
    # A domain may be called "train": what tells plain weights apart is that their values are numbers, or sources.
    if not any(
        isinstance(value, dict | list | str) or value is None for value in data.values() if not is_source(value)
    ):
        return weights_by_domain(data, str(path))
    found = [(name, keys) for name, keys in _FORMATS if keys & data.keys()]
    if len(found) != 1:
        seen = " and ".join(name for name, _ in found) or "something else than numbers"
        raise InputError(f"{path} holds {seen} (keys {listed(data, 6)}). Give one format in a file.")
    name, keys = found[0]
    stray = sorted(key for key, value in data.items() if key not in keys and isinstance(value, int | float))
    if stray and keys not in (_RECORD_KEYS, _SWARM_KEYS):
        raise InputError(f"{path} holds {name} and also a weight for '{stray[0]}'. Give one format in a file.")
    if keys == PER_SPLIT_KEYS:
        train = parse_per_split(data, str(path))["train"]
        if train is None:
            raise InputError(f"{path}: train is null, so it holds no weights. Give its train list.")
        return _of_blend(train, path, domains)
    if keys == _RECORD_KEYS:
        return _of_record(data, str(path))
    return _of_object(data, path, "train_domain_weights" if keys == _DOREMI_KEYS else "weights")


def _of_object(data: Mapping[str, Any], path: Path, key: str) -> Mapping[str, Any]:
    weights = data.get(key)
    if not isinstance(weights, dict):
        raise InputError(f"{path}: {key} is {weights!r}, expected an object of weights by domain.")
    return weights


def _of_records(data: Sequence[Any], path: Path) -> Mapping[str, Any]:
    for number, record in enumerate(data, start=1):
        if not isinstance(record, dict):
            raise InputError(
                f"{path}: entry {number} is {record!r}, expected an object with domain_names and domain_weights."
            )
        if (_DOREMI_KEYS | PER_SPLIT_KEYS) & record.keys():
            raise InputError(f"{path}: entry {number} has the keys {listed(record, 6)}. Give one format in a file.")
    if not data:
        raise InputError(f"{path} is an empty list, expected objects with domain_names and domain_weights.")
    return [_of_record(record, f"{path}, entry {number}") for number, record in enumerate(data, start=1)][-1]


def _of_record(record: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    names, weights = record.get("domain_names"), record.get("domain_weights")
    if not isinstance(names, list) or not isinstance(weights, list) or len(names) != len(weights):
        raise InputError(
            f"{source}: domain_names is {names!r} and domain_weights {weights!r}, expected two lists of one length."
        )
    doubled = given_twice(map(str, names))
    if doubled:
        raise InputError(f"{source} names the domain '{doubled[0]}' twice. Keep one of them.")
    return dict(zip(map(str, names), weights, strict=True))


def _of_blend(blend: FileBlend, path: Path, domains: Sequence[str]) -> Mapping[str, float]:
    if blend.weights is None:
        raise InputError(
            f"{path} names {len(blend.prefixes)} token files without weights, which Megatron blends by their length."
            " Use `mixture: natural` for that, or give every file a weight."
        )
    members = domains_of(blend.prefixes, str(path))
    weights = {name: sum(blend.weights[number] for number in numbers) for name, numbers in members.items()}
    return {**dict.fromkeys((name for name in domains if name not in weights), 0.0), **weights}
