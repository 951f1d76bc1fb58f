"""Small configs that stand for endless work: refused, with the numbers, before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_config import small

from megamix.core import config_files, yaml_text
from megamix.core.config_files import read_with_origins, read_yaml
from megamix.core.errors import InputError
from megamix.core.files import read_json
from megamix.core.yaml_text import parse_yaml


def aliases(levels: int, width: int = 10) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_aliases_of_aliases() -> None:
    assert len(parse_yaml(aliases(4), "t")["a3"]) == 10
    with pytest.raises(InputError, match=r"t holds [\d,]+ values once its aliases are written out, expected at most"):
        parse_yaml(aliases(60), "t")
    merges = [f"b{n}: &b{n} {{k{n}: 1, <<: [*b{n - 1}, *b{n - 1}]}}" for n in range(1, 60)]
    with pytest.raises(InputError, match="once its aliases are written out"):
        parse_yaml("\n".join(["b0: &b0 {k: 1}", *merges]), "t")


@pytest.mark.parametrize("text", ["a: &a [1, *a]", "a: &a {b: {c: *a}}", "a: &a\n- b: [*a]"])
def test_an_alias_inside_of_what_it_stands_for(text: str) -> None:
    with pytest.raises(InputError, match=r"t, line \d: an alias stands inside of what it stands for"):
        parse_yaml(text, "t")


def test_a_large_config_is_none_of_that() -> None:
    text = "mixture:\n" + "".join(f"  domain{n}: {n}\n" for n in range(40_000))
    assert len(parse_yaml(text, "t")["mixture"]) == 40_000
    assert yaml_text.MOST_VALUES > 10 * 40_000


def test_includes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.yaml").write_text("last: 0\ndeep: {zero: 0}\n")
    for number in range(1, 40):
        name = f"{number - 1}.yaml"
        (tmp_path / f"{number}.yaml").write_text(
            f"include: [{name}, ./{name}]\nlast: {number}\ndeep: {{n{number}: 1}}\n"
        )
    read, opened = config_files.read_regular, []
    monkeypatch.setattr(config_files, "read_regular", lambda path, most: opened.append(path.name) or read(path, most))
    origins: config_files.Origins = {}
    found = read_with_origins(tmp_path / "39.yaml", {}, origins)
    assert (found["last"], len(found["deep"]), len(opened)) == (39, 40, 40)
    assert origins[("deep", "zero")] == tmp_path / "0.yaml"
    assert origins[("last",)] == tmp_path / "39.yaml"


def test_an_include_read_before_still_wins_over_what_came_between(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: a\ny: a\n")
    (tmp_path / "b.yaml").write_text("x: b\n")
    (tmp_path / "c.yaml").write_text("include: [a.yaml, b.yaml, a.yaml]\n")
    origins: config_files.Origins = {}
    assert read_with_origins(tmp_path / "c.yaml", {}, origins) == {"x": "a", "y": "a"}
    assert origins[("x",)] == tmp_path / "a.yaml"


def test_a_long_chain_of_includes(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"{number}.yaml").write_text(f"include: {number + 1}.yaml\n")
    with pytest.raises(InputError, match=r"0.yaml includes files 51 deep"):
        read_yaml(tmp_path / "0.yaml")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 32)
    for name, message in (
        ("/dev/zero", "/dev/zero is a device or a pipe, expected a file"),
        ("pipe", "pipe is a device or a pipe"),
        (".", "Is a directory"),
        ("huge.yaml", r"has 4,294,967,296 bytes, expected at most 16,777,216"),
        ("loop", "cannot read the config"),
    ):
        (tmp_path / "c.yaml").write_text(f"include: {name}\n")
        with pytest.raises(InputError, match=message):
            read_yaml(tmp_path / "c.yaml")
        with pytest.raises(InputError, match=message):
            read_yaml(tmp_path / name)
    for name in ("/dev/zero", "pipe"):
        with pytest.raises(InputError, match="expected a file"):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=1e9",
        "model.num_layers=1000000000",
        "model.hidden_size=1e12",
        "model.vocab_size=1e12",
        "train.global_batch=1e12",
        "train.micro_batch=1e12",
        "train.steps=1e18",
        "data.seq_length=1e12",
        "data.weight_lag=1e9",
        "engine.pipeline=1e9",
    ],
)
def test_numbers_beyond_any_machine(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"{key}: Input should be less than (or equal to )?\d+, got 1[0e+]"):
        small(override)
