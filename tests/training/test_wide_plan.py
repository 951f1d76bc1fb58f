"""Work that is done once for each of many domains is not done for each pair of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megamix.data.tokens.manifest import Manifest
from megamix.mixing.constraints import Constraints
from megamix.mixing.mixers import make_mixer
from megamix.training.bounds import read_bounds

NUMBER = 1500


class Name(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture(autouse=True)
def compares_few():
    Name.compared = 0
    yield
    assert Name.compared < 20 * NUMBER, "1,500 names in pairs are 2,250,000 comparisons"


def names() -> tuple[Name, ...]:
    return tuple(Name(f"d{number}") for number in range(NUMBER))


@pytest.mark.parametrize("key", ["min_weight", "max_epochs"])
def test_bounds_are_read(key: str) -> None:
    given = {Name(name): 0.5 for name in names()[::2]}
    for value, wanted in ((0.25, [0.25] * NUMBER), (given, [0.5, 7.0] * (NUMBER // 2))):
        assert read_bounds(key, value, names(), 7.0).tolist() == wanted


def test_half_of_the_domains_are_left_out() -> None:
    every, out = names(), names()[1::2]
    k, zero, one = np.full(NUMBER, 10**6), np.zeros(NUMBER), np.ones(NUMBER)
    Constraints(every, k, 1000, zero, one, np.full(NUMBER, np.inf), "cap").check_without(out)
    mixer: Any = make_mixer(
        {"name": "doremi", "apply": "sampling"}, every, (1 - np.arange(NUMBER) % 2).astype(float), left_out=out
    )
    assert mixer.left_out == out
    assert mixer.weights.tolist() == pytest.approx([2 / NUMBER, 0] * (NUMBER // 2))


def test_domains_are_looked_for_in_a_data_set() -> None:
    data: Any = SimpleNamespace(_by_name=dict.fromkeys(names()))
    assert Manifest.missing(data, [*names(), "other"]) == ["other"]
