"""Names of domains: what may be one, and a file name of its own for each."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megamix.core.errors import InputError
from megamix.data.domain_names import check_domain_name, file_name


@pytest.mark.parametrize(
    "name", ["web", "dclm:code", "a/b", "Köln 你好", "x" * 300, "manifest.json", "a b", "~", "100%"]
)
def test_names(name: str) -> None:
    check_domain_name(name, "here")


@pytest.mark.parametrize("name", ["", " ", " a", "a\t", "a\nb", "a\0", "a\u200bb", "a=b", "a,b", "x" * 1001, "\ud800"])
def test_no_names(name: str) -> None:
    with pytest.raises(InputError, match=r"cannot be the name of a domain \(from here\)") as caught:
        check_domain_name(name, "here")
    assert len(str(caught.value)) < 300


def test_plain_names_stay() -> None:
    for name in ("web", "Pile-CC", "c++", "a.b", "x (y)", "Köln", "v1.0_final"):
        assert file_name(name) == name


def test_no_two_names_have_one_file(tmp_path: Path) -> None:
    names = ["".join(letters) for number in (1, 2, 3) for letters in itertools.product("a.%/~2E:", repeat=number)]
    names += [f"{stem}{suffix}" for stem in ("", ".", "a", "%2E") for suffix in (".json", "%2Ejson", ".JSON", ".tmp")]
    names += ["x" * 300, "x" * 301, "你" * 300, "你" * 299 + "好", "a" * 200, "a" * 201]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(set(names))
    for name in files:
        assert len(name.encode()) <= 200
        assert "/" not in name
        assert not name.startswith(".")
        assert not name.lower().endswith((".json", ".tmp"))
        (tmp_path / name).mkdir()
