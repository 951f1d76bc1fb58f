"""Megatron-LM's formats of a blend of token files, read and written.

    --data-path "0.3 /data/web 0.7 /data/code"    weights and prefixes in turn, or prefixes alone
    --data-args-path FILE                          the same string in a file
    --per-split-data-args-path FILE.json           {"train": ["0.3", "/data/web", ...], "valid": [...], "test": null}

As in ``megatron.core.datasets.utils.get_blend_from_list`` and ``megatron.training`` (core 0.16): the string is cut at
white space, so a prefix in it holds none; an even number of words of which every first one of two is a number has
weights, anything else has none, and files then count by their length. The JSON needs all three keys; a split without
data is null. Upstream divides the weights by their sum and accepts none that is 0 (a bare AssertionError in
``BlendedDataset``), so a domain of weight 0 is left out when a blend is written, and has weight 0 when one is read.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megamix.core.errors import InputError, check_known
from megamix.core.files import read_json, read_text
from megamix.core.paths import expand

MegatronSplit = Literal["train", "valid", "test"]
SPLITS: tuple[MegatronSplit, ...] = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"
"""Megatron's default of ``--split``."""
PER_SPLIT_KEYS = frozenset(SPLITS)

_SUFFIXES = ("_text_document", "_text_sentence")
_SHARD = re.compile(r"-\d+-of-\d+$")
_SPLIT_NAME = re.compile(r"(train|training|valid|validation|val|test)$")
_EXAMPLE = 'For example "0.3 /data/web_text_document 0.7 /data/code_text_document".'


@dataclass(frozen=True)
class FileBlend:
    """Token files with their weights.

    Attributes:
        prefixes: paths without .bin/.idx, each once.
        weights: relative, one a prefix, finite and above 0; None where files count by their length.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(words: Sequence[object], source: str) -> FileBlend:
    """Reads a list of prefixes, or of weights and prefixes in turn.

    Args:
        words: strings, or numbers where weights stand.
        source: where they come from, for messages.

    Raises:
        InputError: no words, weights for only some prefixes, a weight that is not above 0 and finite, or a prefix that
            stands there twice.
    """
    texts = [expand(_word(word, source)) for word in words]
    if not texts:
        raise InputError(f"{source} names no token files. {_EXAMPLE}")
    numbers = [_number(text) for text in texts]
    firsts, seconds = texts[::2], texts[1::2]
    weighted = [number is not None for number in numbers[::2]]
    if len(texts) % 2 == 0 and all(weighted):
        weights = tuple(number for number in numbers[::2] if number is not None)
        for weight, prefix in zip(weights, seconds, strict=True):
            if not (0 < weight < math.inf):
                raise InputError(
                    f"{source}: the weight of {prefix} is {weight}, expected a finite number above 0: Megatron cannot"
                    " blend anything else. Leave the file out instead of giving it 0."
                )
        blend = FileBlend(tuple(seconds), weights)
    elif any(number is not None for number in numbers):
        odd = next(text for text, number in zip(texts, numbers, strict=True) if number is not None)
        raise InputError(
            f"{source}: {len(texts)} words, of which '{odd}' is a number, are not weights and prefixes in turn"
            f" (the first words of each two are {', '.join(firsts[:6])}). Give every prefix a weight, or none. {_EXAMPLE}"
        )
    else:
        blend = FileBlend(tuple(texts), None)
    doubled = [prefix for prefix in blend.prefixes if blend.prefixes.count(prefix) > 1]
    if doubled:
        raise InputError(
            f"{source} names {doubled[0]} {blend.prefixes.count(doubled[0])} times. Name it once, with the sum of its"
            " weights."
        )
    return blend


def read_data_args(path: Path) -> FileBlend:
    """Reads a file for ``--data-args-path``.

    Raises:
        InputError: see `parse_blend`, or the file cannot be read.
    """
    return parse_blend(read_text(path).split(), str(path))


def parse_per_split(data: Mapping[str, Any], source: str) -> dict[MegatronSplit, FileBlend | None]:
    """Reads the object of a file for ``--per-split-data-args-path``; each split is a list, a string or null.

    Raises:
        InputError: a missing or unknown key, something else than a list, a string or null, or see `parse_blend`.
    """
    check_known(data, PER_SPLIT_KEYS, f"{source}: unknown split")
    missing = [split for split in SPLITS if split not in data]
    if missing:
        raise InputError(
            f"{source} has no '{missing[0]}', which Megatron needs too: expected train, valid and test. Write null for"
            " a split without data."
        )
    blends: dict[MegatronSplit, FileBlend | None] = {}
    for split in SPLITS:
        value = data[split]
        if value is not None and not isinstance(value, list | str):
            raise InputError(
                f"{source}: '{split}' is {value!r}, expected a list of weights and prefixes, a string, or null."
            )
        words = value.split() if isinstance(value, str) else value
        blends[split] = None if words is None else parse_blend(words, f"{source}, {split}")
    return blends


def read_per_split(path: Path) -> dict[MegatronSplit, FileBlend | None]:
    """Reads a file for ``--per-split-data-args-path``.

    Raises:
        InputError: see `parse_per_split`; or the file cannot be read or is no JSON object.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(
            f"{path} holds a JSON {type(data).__name__}, expected an object with train, valid and test. A file with the"
            " string of --data-path goes to --data-args-path."
        )
    return parse_per_split(data, str(path))


def data_path(files: Sequence[tuple[float, str]]) -> str:
    """The ``--data-path`` string of (weight, prefix) pairs; weights keep every digit.

    Raises:
        InputError: white space in a prefix, at which Megatron would cut it.
    """
    for _, prefix in files:
        if len(prefix.split()) != 1:
            raise InputError(
                f"the prefix {prefix!r} holds white space, at which Megatron cuts --data-path. Use --format"
                " per-split-json, or move the files."
            )
    return " ".join(word for weight, prefix in files for word in (repr(float(weight)), prefix))


def per_split_json(train: Sequence[tuple[float, str]], valid: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """The object of a ``--per-split-data-args-path`` file, of (weight, prefix) pairs; without a test split."""
    return {
        "train": [word for weight, prefix in train for word in (repr(float(weight)), prefix)],
        "valid": [word for weight, prefix in valid for word in (repr(float(weight)), prefix)],
        "test": None,
    }


def split_bounds(split: str, num_sequences: int) -> tuple[int, int, int]:
    """Where train, valid and test end in a file, in sequences, by Megatron's rule for ``--split``.

    The shares are divided by their sum and added up from the first on, and each sum times the number of sequences is
    rounded to the nearest integer, halves to the even one (``convert_split_vector_to_split_matrix`` and
    ``_build_megatron_dataset_splits``).

    Args:
        split: two or three shares, "98,2" or "969,30,1".

    Raises:
        InputError: not two or three numbers, a negative one, or nothing for train or valid.
    """
    shares = [_number(word.strip()) for word in split.split(",")]
    if not 2 <= len(shares) <= 3 or any(share is None or not 0 <= share < math.inf for share in shares):
        raise InputError(
            f"--split {split}: expected the shares of train, valid and, if wanted, test, as numbers: 98,2 or {DEFAULT_SPLIT}."
        )
    known = np.array([share for share in shares if share is not None], np.float64)
    if not (known[0] > 0 and known[1] > 0):
        raise InputError(
            f"--split {split} leaves nothing for {'train' if known[0] <= 0 else 'valid'}: both are needed here. Give"
            " both shares above 0, for example 98,2."
        )
    ends = list(itertools.accumulate((known / known.sum()).tolist(), initial=0.0))[1:]
    ends += ends[-1:] * (3 - len(ends))
    train, valid, test = (round(end * float(num_sequences)) for end in ends)
    return train, valid, test


def validation_share(split: str) -> float:
    """The share of valid in a ``--split`` that `split_bounds` accepts."""
    shares = [float(word) for word in split.split(",")]
    return shares[1] / sum(shares)


def domain_name(prefix: str) -> str:
    """The domain that a prefix suggests.

    The last part of the path without Megatron's ``_text_document`` and without a shard's ``-00001-of-00008``; where
    that only names a split, as in ``web/train``, the folder.
    """
    path = Path(_stem(prefix))
    name = path.name
    if _SPLIT_NAME.match(name) and path.parent.name:
        name = path.parent.name
    return name


def domains_of(
    prefixes: Sequence[str], source: str, named: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[int]]:
    """Files by domain: the numbers of the prefixes by name, names in order of first appearance.

    Args:
        named: prefixes by domain, where the user has named them; the others are named by `domain_name`. Shards of one
            file are one domain.

    Raises:
        InputError: two files that suggest the same name, or a named prefix that is not among ``prefixes``.
    """
    known = {prefix: name for name, members in (named or {}).items() for prefix in members}
    found: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    for number, prefix in enumerate(prefixes):
        name = known.get(prefix, domain_name(prefix))
        other = first.setdefault(name, prefix)
        if (prefix not in known or other not in known) and _stem(prefix) != _stem(other):
            raise InputError(
                f"{source}: {other} and {prefix} would both be the domain '{name}'. Name them: NAME={other}"
                f" OTHER={prefix}, or {name}={other},{prefix} for one domain."
            )
        found.setdefault(name, []).append(number)
    return found


def _stem(prefix: str) -> str:
    """The prefix without shard number and Megatron's suffix."""
    stem = _SHARD.sub("", prefix)
    for suffix in _SUFFIXES:
        stem = stem.removesuffix(suffix)
    return _SHARD.sub("", stem)


def _word(word: object, source: str) -> str:
    if isinstance(word, bool) or not isinstance(word, str | int | float) or not str(word).strip():
        raise InputError(f"{source}: {word!r} is neither a weight nor a prefix. {_EXAMPLE}")
    return str(word).strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
