"""Token files by domain: from a Megatron blend, from ``NAME=PREFIX,...``, or from both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.core.errors import InputError, did_you_mean
from megamix.core.paths import expand
from megamix.data.domain_names import check_domain_name
from megamix.mixing.megatron_blend import FileBlend, domains_of, parse_blend, read_data_args, read_per_split


@dataclass(frozen=True)
class Sources:
    """Token files by domain.

    Attributes:
        train: prefixes by domain.
        valid: validation prefixes of the same domains; None if a part of ``train`` is held out.
        weights: relative weights by domain; None where files count by their length.
    """

    train: dict[str, list[str]]
    valid: dict[str, list[str]] | None
    weights: dict[str, float] | None


def find_sources(
    named: Sequence[str],
    *,
    data_path: str | None = None,
    data_args_path: Path | None = None,
    per_split: Path | None = None,
    train_path: str | None = None,
    valid_path: str | None = None,
) -> Sources:
    """Files of one blend, or the named files alone; beside a blend, ``named`` gives the domains of its files.

    Args:
        named: ``NAME=PREFIX[,PREFIX...]``, each.
        data_path: Megatron's ``--data-path`` string.
        data_args_path: file with that string.
        per_split: ``--per-split-data-args-path`` file.
        train_path, valid_path: strings of ``--train-data-path`` and ``--valid-data-path``.

    Raises:
        InputError: no files, more than one blend, a bad name, a file in two places, or a domain with files for only
            one of training and validation.
    """
    separate = train_path if train_path is not None else valid_path
    given = [value for value in (data_path, data_args_path, per_split, separate) if value is not None]
    names = _parse_named(named)
    if len(given) > 1 or not (given or names):
        raise InputError(
            f"{len(given)} blends are given, expected one of --data-path, --data-args-path, --per-split-data-args-path"
            " and --train-data-path with --valid-data-path, or NAME=PREFIX[,PREFIX...] for every domain."
        )
    if per_split is not None:
        blends = read_per_split(per_split)
        return _of_splits(blends["train"], blends["valid"], f"{per_split}, train", f"{per_split}, valid", names)
    if separate is not None:
        options = ("--train-data-path", "--valid-data-path")
        train, valid = (
            None if text is None else parse_blend(text.split(), option)
            for text, option in zip((train_path, valid_path), options, strict=True)
        )
        return _of_splits(train, valid, *options, names)
    if not given:
        _refuse_shared(names, {})
        return Sources(names, None, None)
    blend = (
        read_data_args(data_args_path)
        if data_args_path is not None
        else parse_blend((data_path or "").split(), "--data-path")
    )
    source = str(data_args_path or "--data-path")
    _check_named(names, blend.prefixes, source)
    files, weights = _grouped(blend, source, names)
    _refuse_shared(files, {})
    return Sources(files, None, weights)


def _of_splits(
    train_blend: FileBlend | None,
    valid_blend: FileBlend | None,
    train_source: str,
    valid_source: str,
    names: Mapping[str, Sequence[str]],
) -> Sources:
    if train_blend is None or valid_blend is None:
        raise InputError(
            f"{train_source if train_blend is None else valid_source} gives no files; training and validation files are"
            " both needed. To split the training files instead, give them with --data-path and --split."
        )
    _check_named(names, (*train_blend.prefixes, *valid_blend.prefixes), f"{train_source} or {valid_source}")
    train, weights = _grouped(train_blend, train_source, names)
    valid, _ = _grouped(valid_blend, valid_source, names)
    for has, lacks, one, other in (
        (train, valid, train_source, valid_source),
        (valid, train, valid_source, train_source),
    ):
        alone = [name for name in has if name not in lacks]
        if alone:
            raise InputError(
                f"the domain '{alone[0]}' ({', '.join(has[alone[0]])}) is in {one} and not in {other}, which has"
                f" {', '.join(lacks)}. Name the files of a domain in both: {alone[0]}=PREFIX,PREFIX."
            )
    _refuse_shared(train, valid)
    return Sources(train, valid, weights)


def _grouped(
    blend: FileBlend, source: str, names: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, float] | None]:
    members = domains_of(blend.prefixes, source, names)
    files = {name: [blend.prefixes[number] for number in numbers] for name, numbers in members.items()}
    if blend.weights is None:
        return files, None
    return files, {name: sum(blend.weights[number] for number in numbers) for name, numbers in members.items()}


def _parse_named(named: Sequence[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for argument in named:
        name, equals, rest = argument.partition("=")
        prefixes = [expand(prefix.strip()) for prefix in rest.split(",")]
        if not (equals and name.strip() and all(prefixes)):
            raise InputError(
                f"'{argument}': expected NAME=PREFIX[,PREFIX...], for example web=/data/web_text_document."
            )
        check_domain_name(name.strip(), argument)
        if name.strip() in names:
            raise InputError(
                f"the domain '{name.strip()}' is given twice. Give all its prefixes at once: NAME=PREFIX,PREFIX."
            )
        names[name.strip()] = prefixes
    return names


def _check_named(names: Mapping[str, Sequence[str]], prefixes: Sequence[str], source: str) -> None:
    for name, members in names.items():
        for prefix in members:
            if prefix not in prefixes:
                raise InputError(f"{name}={prefix}: {source} has no such prefix." + did_you_mean(prefix, prefixes))


def _refuse_shared(train: Mapping[str, Sequence[str]], valid: Mapping[str, Sequence[str]]) -> None:
    seen: dict[str, str] = {}
    for split, domains in (("train", train), ("valid", valid)):
        for name, prefixes in domains.items():
            for prefix in prefixes:
                path, place = os.path.realpath(prefix), f"{split} of '{name}'"
                if path in seen:
                    raise InputError(
                        f"{prefix} stands in {seen[path]} and in {place}. Name it once; to hold a part of it out, give"
                        " --data-path and --split."
                    )
                seen[path] = place
