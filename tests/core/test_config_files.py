"""Config files: what YAML means here, overrides, includes, and every way to get one wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from small_config import SMALL, small

from megamix.core.config import load_config
from megamix.core.config_files import apply_overrides, merge, read_yaml
from megamix.core.errors import InputError
from megamix.core.yaml_text import parse_yaml
from megamix.engines.config import DeepSpeedConfig, MegatronConfig
from megamix.mixing.mixers import OdmConfig, StaticConfig
from megamix.training.config import KINDS, RunConfig


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each, and returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1E+3", -1000.0),
        ("2.0e-3", 2e-3),
        ("5.", 5.0),
        (".5", 0.5),
        (".inf", float("inf")),
        ("10", 10),
        ("1_000", 1000),
        ("true", True),
        ("", None),
        ("~", None),
        ("null", None),
        ("1e-4x", "1e-4x"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("no", "no"),
        ("20:00:00", "20:00:00"),
        ("2026-01-31", "2026-01-31"),
        ("2026-99-99", "2026-99-99"),
        ("010", "010"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


def test_keys_are_text() -> None:
    """A domain may be called no, on, null, 2024 or 007."""
    weights = {"no": 1.0, "on": 1.0, "null": 1.0, "2024": 1.0, "007": 1.0}
    assert small("mixture={no: 1, on: 1, null: 1, 2024: 1, 007: 1}").mixture == weights


def test_yes_and_no_for_a_truth_value() -> None:
    assert small("log.tensorboard=yes").log.tensorboard is True
    assert small("log.tensorboard=no").log.tensorboard is False


MERGES = {
    # A merged mapping merges another; its own value stands over that.
    "a: {b: &x {<<: &y {p: 1, q: 2}, p: 3}}\nc: {<<: *x, q: 4}\nd: {<<: [*y, *x]}": {
        "a": {"b": {"p": 3, "q": 2}},
        "c": {"p": 3, "q": 4},
        "d": {"p": 1, "q": 2},
    },
    # The earlier of several wins, wherever << stands; what was merged once can be merged again.
    "a: &a {p: 1}\nb: &b {p: 2, q: 2}\nc: &c {q: 3, <<: [*a, *b]}\nd: {<<: *c, p: 4}\ne: {<<: [*c, *b]}": {
        "a": {"p": 1},
        "b": {"p": 2, "q": 2},
        "c": {"p": 1, "q": 3},
        "d": {"p": 4, "q": 3},
        "e": {"p": 1, "q": 3},
    },
    # A mapping is not merged into one below it.
    "a: &a {p: {r: 1, s: 2}}\nb: {<<: *a, p: {r: 3}}": {"a": {"p": {"r": 1, "s": 2}}, "b": {"p": {"r": 3}}},
    "a: {<<: [], p: 1}\nb: {<<: {}}": {"a": {"p": 1}, "b": {}},
}


@pytest.mark.parametrize("text", MERGES)
def test_anchors_and_merge_keys(text: str) -> None:
    """``<<`` merges by the rule of yaml.org/type/merge, and is not taken for a key given twice."""
    assert parse_yaml(text, "t") == MERGES[text]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("version", ["6.0.1", "6.0.2", "6.0.3", "6.0.4"])
def test_merges_are_the_same_with_every_pyyaml(version: str, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, f"pyyaml=={version}"], check=True)
    code = (
        "import json, sys, yaml\nfrom megamix.core.yaml_text import parse_yaml\n"
        f"assert yaml.__version__ == {version!r}\n"
        "print(json.dumps([parse_yaml(text, 't') for text in json.loads(sys.argv[1])]))"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(MERGES))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == list(MERGES.values())


def test_a_mapping_that_merges_itself_comes_to_an_end() -> None:
    assert parse_yaml("a: &a {p: 1, <<: *a}", "t") == {"a": {"p": 1}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("run_dir: runs\ndata: {manifest: [1, 2\ntrain: {", 3, "not valid YAML"),
        ("run_dir: runs\n\tdata: 1", 2, "not valid YAML"),
        ("a: 1\nb: *missing", 2, "undefined alias 'missing'"),
        ("a: 1\nb: !!python/object:os.system x", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("train: {steps: 3}\ndata: {}\ntrain: {lr: 1}", 3, "the key 'train' is given twice"),
        ("train:\n  steps: 3\n  lr: 1\n  steps: 4", 4, "the key 'steps' is given twice"),
        ("- a\n- {b: 1, b: 2}", 2, "the key 'b' is given twice"),
        ("a: 1\n? [x, y]\n: 2", 2, "a key is expected"),
    ],
)
def test_a_yaml_error_names_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, broken=text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert f"line {line}" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["a: !!int x", "a: \x07", "a: {<<: 3}"])
def test_other_yaml_errors_name_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"broken\.yaml is not valid YAML"):
        read_yaml(write(tmp_path, broken=text))


@pytest.mark.parametrize(
    ("text", "words"),
    [("- 1", "holds a list"), ("word", "holds a str"), ("", "is empty"), ("# only a remark", "is empty")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=f"top.yaml {words}, expected a mapping"):
        load_config(RunConfig, write(tmp_path, top=text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml: No such file or directory\. Check the path"):
        load_config(RunConfig, tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        load_config(RunConfig, tmp_path)
    (tmp_path / "tokens.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        load_config(RunConfig, tmp_path / "tokens.bin")


# Overrides


def test_overrides_are_yaml_values() -> None:
    config = small(
        "train.steps=20",
        "train.lr=1e-4",
        "mixture={web: 0.5, code: 1}",
        "data.max_epochs=2",
        "checkpoint.accept_changed=[data, mixer]",
        "run_dir=runs/a=b",
        "log.tensorboard=true",
    )
    assert (config.train.steps, config.train.lr) == (20, 1e-4)
    assert config.mixture == {"web": 0.5, "code": 1.0}
    assert config.checkpoint.accept_changed == ("data", "mixer")
    assert config.run_dir == Path("runs/a=b")
    assert config.log.tensorboard is True
    assert config.data.max_epochs == 2
    assert small("data.max_epochs=2", "data.max_epochs=").data.max_epochs is None
    assert small("train.steps=20", "train.steps=30").train.steps == 30
    assert config.train.global_batch == 4, "what is not named stays"


def test_overrides_leave_the_data_they_start_from_alone() -> None:
    data = {"train": {"steps": 1}}
    assert apply_overrides(data, ["train.lr=2", "train.steps=3"]) == {"train": {"steps": 3, "lr": 2}}
    assert data == {"train": {"steps": 1}}


def test_a_file_among_the_overrides_is_laid_over(tmp_path: Path) -> None:
    """In its place among them, with its includes; a wrong key names the file."""
    (tmp_path / "base.yaml").write_text("train: {steps: 1, lr: 1}\nengine: {name: deepspeed, zero: 1}\n")
    (tmp_path / "part.yaml").write_text("train: {warmup: 0.5}\n")
    (tmp_path / "over.yaml").write_text("include: part.yaml\ntrain: {steps: 5}\nengine: {name: megatron, tensor: 2}\n")
    data = read_yaml(tmp_path / "base.yaml")
    over = str(tmp_path / "over.yaml")
    assert apply_overrides(data, ["train.steps=3", over, "train.lr=2"], KINDS) == {
        "train": {"steps": 5, "lr": 2, "warmup": 0.5},
        "engine": {"name": "megatron", "tensor": 2},
    }
    assert apply_overrides(data, [over, "train.steps=3"])["train"]["steps"] == 3
    with pytest.raises(InputError, match=r"cannot read the config .*missing\.yaml"):
        apply_overrides(data, [str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize("override", ["train.steps", "=3", ".steps=3", "train..steps=3", "train.=3", ""])
def test_an_override_of_the_wrong_form(override: str) -> None:
    with pytest.raises(InputError, match=r"is neither of the form key\.path=value, for example"):
        apply_overrides({}, [override])


@pytest.mark.parametrize("override", ["train.steps=[1", "train={a: 1", "mixture={a: 1, a: 2}"])
def test_an_override_of_bad_yaml_is_named(override: str) -> None:
    with pytest.raises(InputError) as error:
        apply_overrides({}, [override])
    assert f"override '{override}'" in str(error.value)


def test_another_name_replaces_the_mapping() -> None:
    """Changing mixer.name drops the old mixer's keys; naming the same keeps them; without a name they merge."""
    assert small("mixer.name=static").mixer == StaticConfig()
    assert small("mixer.name=odm").mixer == OdmConfig(preset="paper", warmup_steps=5)
    assert small("mixer.update_every=2").mixer == OdmConfig(preset="paper", warmup_steps=5, update_every=2)
    assert small("mixer.name=static", "mixer.name=odm").mixer == OdmConfig()
    assert small("mixer={name: odm, alpha: 0.5}").mixer == OdmConfig(preset="paper", warmup_steps=5, alpha=0.5)


def test_another_preset_of_a_named_mixer_replaces_the_mapping() -> None:
    """A preset decides what the other keys start from, so those of the file were meant for the other one."""
    file = {"name": "odm", "preset": "official", "warmup_steps": 50, "update_every": 2, "alpha": 0.5}
    for new in ({"name": "odm", "preset": "exp3"}, {"name": "odm", "preset": "paper", "alpha": 0.7}):
        assert merge({"mixer": file}, {"mixer": new}, KINDS) == {"mixer": new}
    plain = {"name": "odm", "warmup_steps": 50}  # official, by default
    other = {"name": "odm", "preset": "exp3"}
    assert merge({"mixer": plain}, {"mixer": other}, KINDS) == {"mixer": other}
    for base, new in ((file, {"name": "odm", "preset": "official"}), (plain, {"name": "odm", "preset": "official"})):
        assert merge({"mixer": base}, {"mixer": new}, KINDS) == {"mixer": {**base, **new}}
    assert small("mixer={name: odm, preset: exp3}").mixer == OdmConfig.model_validate({"preset": "exp3"})
    kept = OdmConfig.model_validate({"preset": "exp3", "warmup_steps": 5})
    assert small("mixer.preset=exp3").mixer == kept


def test_another_engine_replaces_one_without_a_name() -> None:
    """An engine without a name is DeepSpeed, whose keys mean nothing to Megatron."""
    plain = SMALL + "engine: {pipeline: 2, zero: 0}\n"
    assert small("engine={name: megatron, tensor: 2}", text=plain).engine == MegatronConfig(name="megatron", tensor=2)
    assert small("engine={name: deepspeed, data: 2}", text=plain).engine == DeepSpeedConfig(pipeline=2, zero=0, data=2)
    assert small("engine.data=2", text=plain).engine == DeepSpeedConfig(pipeline=2, zero=0, data=2)


# Includes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"web": 1, "code": 2}, {"file": "w.json"}),
        ({"web": 1, "code": 2}, {"stages": []}),
        ({"file": "w.json"}, {"web": 1}),
        ({"stages": []}, {"file": "w.json"}),
        ({"web": 1, "code": 2}, {"temperature": 0.5}),
        ({"temperature": 0.5}, {"web": 1}),
        ({"temperature": 0.5}, {"temperature": 1, "web": 1}),
        ({"temperature": 0.5}, {"unimax": {"max_epochs": 4}}),
        ({"unimax": {"max_epochs": 4}}, {"unimax": "x"}),
    ],
)
def test_a_mixture_of_another_kind_replaces_the_mapping(old: dict[str, object], new: dict[str, object]) -> None:
    assert merge({"mixture": old}, {"mixture": new}, KINDS) == {"mixture": new}


def test_a_mixture_of_the_same_kind_merges() -> None:
    for old, new, merged in (
        ({"temperature": 0.2}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.2, "web": 1}, {"temperature": 0.5}, {"temperature": 0.5, "web": 1}),  # domains
        ({"from_run": "r"}, {"which": "final"}, {"from_run": "r", "which": "final"}),
    ):
        assert merge({"mixture": old}, {"mixture": new}, KINDS) == {"mixture": merged}


def test_includes_merge_and_later_wins(tmp_path: Path) -> None:
    """Relative to the file that names them, chained; later files win over earlier ones and the file over both."""
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base", first="include: root.yaml\na: {x: 1, y: 1}\nb: 1\nc: 1", root="d: root\nb: root\na: {z: 0}"
    )
    write(tmp_path / "base", second="a: {y: 2}\nb: 2\nc: [2, 2]")
    path = write(tmp_path, top="include: [base/first.yaml, base/second.yaml]\nb: 3")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2, "z": 0}, "b": 3, "c": [2, 2], "d": "root"}


def test_include_of_a_whole_config_with_another_mixer(tmp_path: Path) -> None:
    path = write(tmp_path, top="include: small.yaml\nmixer: {name: static}\ntrain: {lr: 1e-4}", small=SMALL)
    config = load_config(RunConfig, path, ["train.steps=11"])
    assert config.mixer == StaticConfig()
    assert (config.train.lr, config.train.steps, config.train.global_batch) == (1e-4, 11, 4)


def test_an_include_that_comes_back(tmp_path: Path) -> None:
    write(tmp_path, a="include: b.yaml", b="include: [c.yaml]", c="include: a.yaml", own="include: own.yaml")
    for name in ("a", "own"):
        with pytest.raises(InputError, match=rf"{name}\.yaml includes itself by way of .*{name}\.yaml"):
            read_yaml(tmp_path / f"{name}.yaml")


def test_a_file_included_twice_is_no_cycle(tmp_path: Path) -> None:
    path = write(
        tmp_path, top="include: [left.yaml, right.yaml]", left="include: root.yaml", right="include: root.yaml"
    )
    write(tmp_path, root="a: 1")
    assert read_yaml(path) == {"a": 1}


def test_bad_includes(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_yaml(write(tmp_path, top="include: absent.yaml"))
    assert str(tmp_path / "absent.yaml") in str(error.value)
    assert f"which {tmp_path / 'top.yaml'} includes" in str(error.value)
    for value in ("3", "{a: b}", "[[a]]", "null"):
        with pytest.raises(InputError, match="expected a path or a list of paths"):
            read_yaml(write(tmp_path, top=f"include: {value}"))


def test_a_misspelt_key_in_an_include_names_its_file(tmp_path: Path) -> None:
    """The file that the key stands in, be it included by another include; a key of the config itself or of an override
    needs none."""
    path = write(tmp_path, top="include: middle.yaml\nmixer: {name: odm, warmup_step: 3}", middle="include: deep.yaml")
    write(tmp_path, deep=SMALL + "evaluate: {evry: 3}\nlog: {every: -1}\n")
    with pytest.raises(InputError) as error:
        load_config(RunConfig, path, ["log.every=-2", "trian.steps=3"])
    message = str(error.value)
    deep = (tmp_path / "deep.yaml").resolve()
    assert message.startswith(f"{path}:\n")
    assert f"unknown key 'evaluate.evry'. Did you mean 'every'? It stands in {deep}.\n" in message
    assert "unknown key 'mixer.warmup_step'. Did you mean 'warmup_steps'?\n" in message
    assert "unknown key 'trian'. Did you mean 'train'?" in message
    assert "log.every: Input should be greater than 0, got -2.\n" in message
    assert message.count("It stands in") == 1
    with pytest.raises(InputError, match=rf"got -1\. It stands in {deep}\."):
        load_config(RunConfig, path)


def test_the_last_file_that_sets_a_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, top="include: [small.yaml, wrong.yaml]", small=SMALL, wrong="train: {steps: many}")
    with pytest.raises(InputError, match=rf"train\.steps.* It stands in {(tmp_path / 'wrong.yaml').resolve()}\."):
        load_config(RunConfig, path)
    path = write(tmp_path, top="include: [wrong.yaml, small.yaml]\ntrain: {lr: -1.0}")
    with pytest.raises(InputError) as error:
        load_config(RunConfig, path)
    assert "It stands in" not in str(error.value)
