"""``~`` and ``$NAME`` in the paths of configs and commands: one rule everywhere; what is not set is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from json_lines import jsonl
from small_config import small
from typer.testing import CliRunner

from megamix.core.config import IS_PATH, Config, load_config, validate
from megamix.core.config_files import apply_overrides, read_yaml
from megamix.core.errors import InputError
from megamix.core.paths import argument, expand, literal
from megamix.training.config import RunConfig


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("ODD", "a$HOME")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("~", "{home}"),
        ("~/runs/x", "{home}/runs/x"),
        ("$SCRATCH/x", "{scratch}/x"),
        ("${{SCRATCH}}x", "{scratch}x"),
        ("a/$EMPTY/b", "a//b"),
        ("$ODD", "a$HOME"),  # a value is not expanded again
        ("a/~/b", "a/~/b"),
        ("./~/b", "./~/b"),
        ("price$$5", "price$5"),
        ("$$SCRATCH", "$SCRATCH"),
        ("cost$", "cost$"),
        ("$5", "$5"),
        ("plain/path.json", "plain/path.json"),
        ("", ""),
    ],
)
def test_expand(given: str, wanted: str, tmp_path: Path) -> None:
    places = {"home": tmp_path / "home", "scratch": tmp_path / "scratch"}
    assert expand(given.format(**places)) == wanted.format(**places)


@pytest.mark.parametrize("given", ["a\0b", "\0", "a\ud800b"])
def test_what_no_path_may_have(given: str) -> None:
    with pytest.raises(InputError, match=r"has characters that no file system takes"):
        expand(given)
    with pytest.raises(InputError, match=r"run_dir: the path .* has characters that no file system takes"):
        validate(RunConfig, {"run_dir": given}, "c.yaml")


def test_names_of_other_encodings_are_paths() -> None:
    assert expand(os.fsdecode(b"a\xffb")) == "a\udcffb"


@pytest.mark.parametrize("given", ["$NOT_SET/x", "${NOT_SET}/x", "a/$NOT_SET", "${}", "~/$NOT_SET"])
def test_a_variable_that_is_not_set(given: str) -> None:
    with pytest.raises(InputError, match=r"which is not set"):
        expand(given)


def test_nobodys_home() -> None:
    with pytest.raises(InputError, match="nobody's home"):
        expand("~no-such-user-here/x")
    assert expand("~root") == os.path.expanduser("~root") != "~root"


@pytest.mark.parametrize("path", ["/a/$x/b", "~", "~/x", "$$", "a~b", "/plain"])
def test_literal_is_read_back(path: str) -> None:
    assert os.path.normpath(expand(literal(path))) == os.path.normpath(path)


class _Inner(Config):
    folder: Path | None = None


class _Outer(Config):
    inner: _Inner = _Inner()
    either: Path | dict[str, float] = Path()
    word: Annotated[str, IS_PATH] = "auto"
    text: str = ""


def test_every_kind_of_key(tmp_path: Path) -> None:
    given = {"inner": {"folder": "~/a"}, "either": "$SCRATCH/b", "word": "$SCRATCH/c", "text": "~$NOT_SET"}
    found = validate(_Outer, given, "x.yaml")
    assert (found.inner.folder, found.either) == (tmp_path / "home/a", tmp_path / "scratch/b")
    assert (found.word, found.text) == (f"{tmp_path}/scratch/c", "~$NOT_SET")
    for key in ("either", "word"):
        with pytest.raises(InputError, match=rf"x.yaml: {key}: the path '\$NOT_SET' names the variable"):
            validate(_Outer, {key: "$NOT_SET"}, "x.yaml")
    with pytest.raises(InputError, match=r"x.yaml: inner: folder: the path"):
        validate(_Outer, {"inner": {"folder": "$NOT_SET"}}, "x.yaml")


def test_a_recorded_config_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "/data/a$b")
    config = small("run_dir=$ODD/run", "data.manifest=./~/data", "checkpoint.resume=$ODD/x")
    assert config.run_dir == Path("/data/a$b/run")
    recorded = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert validate(RunConfig, recorded, "config.resolved.yaml") == config


def test_a_run_config_with_its_includes_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    base = {"data": {"manifest": "$SCRATCH/data", "seq_length": 32}, "model": {"preset": "neox-2m"}}
    train = {"steps": 10, "global_batch": 4, "micro_batch": 2, "lr": 1e-3}
    (tmp_path / "home/base.yaml").write_text(yaml.safe_dump({**base, "train": train}))
    (tmp_path / "c.yaml").write_text("include: ~/base.yaml\nrun_dir: ~/runs/x\nmixture: {file: $SCRATCH/w.json}\n")
    (tmp_path / "home/more.yaml").write_text("log: {every: 3}\n")
    config: Any = load_config(RunConfig, tmp_path / "c.yaml", ["~/more.yaml", "checkpoint.resume=$SCRATCH/step_1"])
    assert config.run_dir == tmp_path / "home/runs/x"
    assert config.data.manifest == tmp_path / "scratch/data"
    assert config.mixture.file == tmp_path / "scratch/w.json"
    assert (config.log.every, config.checkpoint.resume) == (3, f"{tmp_path}/scratch/step_1")
    with pytest.raises(InputError, match="NOT_SET"):
        apply_overrides({}, ["$NOT_SET/a.yaml"])
    (tmp_path / "d.yaml").write_text("include: [$NOT_SET/a.yaml]\n")
    with pytest.raises(InputError, match="NOT_SET"):
        read_yaml(tmp_path / "d.yaml")


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamix.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a.jsonl").write_bytes(jsonl([f"text number {n} of some" for n in range(40)]))
    options = ["--tokenizer", "train:300", "--workers", "1"]
    runner = CliRunner()
    runner.invoke(app, ["prepare", "a=~/a.jsonl", "--out", "$SCRATCH/data", *options], catch_exceptions=False)
    assert (tmp_path / "scratch/data/manifest.json").is_file()
    again = ["prepare", "a=~/*.jsonl", "--out", "$SCRATCH/more", "--tokenizer", "$SCRATCH/data", "--workers", "1"]
    runner.invoke(app, again, catch_exceptions=False)
    files = ["a=$SCRATCH/data/a/train", "b=~/../scratch/more/a/train"]
    adopt = ["blend", "adopt", *files, "--out", "~/adopted", "--tokenizer", "$SCRATCH/data/tokenizer.json"]
    runner.invoke(app, adopt, catch_exceptions=False)
    for data in ("~/adopted", "$SCRATCH/more"):
        assert runner.invoke(app, ["verify", data], catch_exceptions=False).exit_code == 0
    # Every command that takes a path refuses what is not set.
    for arguments in (
        ["inspect", "$NOT_SET"],
        ["prepare", "a=$NOT_SET/x.jsonl", "--out", "o"],
        ["train", "$NOT_SET/c"],
    ):
        with pytest.raises(InputError, match="NOT_SET"):
            runner.invoke(app, arguments, catch_exceptions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "scratch"]


@pytest.mark.parametrize("path", ["a$HOME/b", "~", "~/x", "$$", "plain"])
def test_another_command_is_told_the_same_path(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(expand(argument(Path(path)))) == tmp_path / path


def test_ranks_are_told_the_config_that_was_given(
    tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder has a name that would be another one, were it expanded twice."""
    from megamix.training import run

    folder = tmp_path / "a$HOME"
    folder.mkdir()
    path = tiny_config(run_dir=literal(folder / "run")).rename(folder / "c.yaml")
    told: list[str] = []
    monkeypatch.setattr(run, "run_local", lambda arguments, *_, **__: told.extend(arguments) or 0)
    run.train(path, [])
    assert Path(expand(told[1])) == path
    assert (folder / "run" / "config.resolved.yaml").is_file()


def test_runs_of_a_study_lie_in_its_folder(tiny_config: Any, tmp_path: Path) -> None:
    from megamix.studies.doremi.study import read_study as read_doremi

    folder = tmp_path / "a$HOME"
    path = tiny_config(run_dir=literal(folder), doremi={"target": {}})
    study = read_doremi(path, [])
    for name, data in (("reference", study.reference_run(1, None)), ("proxy", study.proxy_run(1))):
        config = validate(RunConfig, data, "written")
        assert config.run_dir == folder / name
    assert validate(RunConfig, {**study.target_run(), "mixture": "natural"}, "written").run_dir == folder / "target"
    assert expand(study.proxy_run(1)["mixer"]["reference"]) == str(folder / "cache")
