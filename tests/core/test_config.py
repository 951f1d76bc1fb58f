"""Config classes: every way to get one wrong is named in words, every key is documented, and what ships is valid."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from small_config import SMALL, small
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.config import Config, load_config, validate
from megamix.core.config_files import read_yaml
from megamix.core.config_help import config_help, key_help
from megamix.core.errors import EXIT_BAD_INPUT, InputError
from megamix.core.files import shipped_folder
from megamix.core.yaml_text import parse_yaml
from megamix.engines.models import ModelConfig
from megamix.mixing.mixers import OdmConfig, StaticConfig
from megamix.studies.arena.config import ArenaConfig
from megamix.studies.config import STUDIES, AnyConfig
from megamix.training.config import RunConfig

# The training config that the design document shows.
DESIGN_EXAMPLE = """\
run_dir: runs/demo
data:   {manifest: data/mini-pile/manifest.json, seq_length: 256, max_epochs: 4}
model:  {preset: neox-2m}                       # or every dimension spelt out; architecture: neox | llama
mixture: natural
mixer:  {name: odm, preset: official, warmup_steps: 50, update_every: 1}
engine: {name: deepspeed, pipeline: 2, tensor: 1, data: 1, zero: 1, precision: fp32}
train:  {steps: 600, global_batch: 32, micro_batch: 8, lr: 2.0e-3, min_lr: 2.0e-4, warmup: 0.05, clip: 1.0, seed: 1234}
evaluate: {every: 100, batches: 16}
checkpoint: {every: 200, keep: 2, resume: auto}
loss:   {implementation: auto}
log:    {every: 10, tensorboard: false, wandb: null}
"""


def message(*overrides: str, text: str = SMALL) -> str:
    with pytest.raises(InputError) as error:
        small(*overrides, text=text)
    assert error.value.exit_code == EXIT_BAD_INPUT
    return str(error.value)


def config_classes(model: type[Config]) -> Iterator[type[Config]]:
    """``model`` and every config class that can stand inside it."""
    yield model
    for field in model.model_fields.values():
        for nested in nested_configs(field.annotation):
            yield from config_classes(nested)


def nested_configs(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for argument in typing.get_args(annotation) for config in nested_configs(argument)]


# Configs that must load


def test_the_example_of_the_design_is_valid_as_it_stands() -> None:
    config = small(text=DESIGN_EXAMPLE)
    assert config.mixer == OdmConfig(preset="official", warmup_steps=50, update_every=1)
    assert (config.train.lr, config.train.steps, config.engine.pipeline) == (2e-3, 600, 2)
    assert (config.mixture, config.model.hidden_size) == ("natural", 192)


@pytest.mark.parametrize("path", sorted(shipped_folder("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    """Each loads, and what it resolves to loads as the same config again (as config.resolved.yaml must)."""
    config = load_config(RunConfig, path)
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert validate(RunConfig, parse_yaml(resolved, "resolved"), "resolved") == config


@pytest.mark.parametrize(
    "path", sorted((shipped_folder("configs") / "models").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_presets_build_a_model_config(path: Path) -> None:
    config = validate(ModelConfig, {"preset": path.stem}, path.stem)
    assert config.model_dump(include=set(read_yaml(path))) == read_yaml(path)


def test_there_are_configs_to_ship() -> None:
    assert (shipped_folder("configs") / "demo.yaml").is_file()
    assert len(list((shipped_folder("configs") / "models").glob("*.yaml"))) >= 6


def test_configs_are_frozen() -> None:
    config = small()
    for target, field in ((config, "mixture"), (config.train, "lr"), (config.mixer, "warmup_steps")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(target, field, getattr(target, field))


# Every key has a meaning


def test_every_field_has_a_docstring_and_is_printed() -> None:
    """Each field, at any depth, has a docstring of its own or, where it holds another config, that class's; the printed
    help has its name and docstring."""
    printed = [line.strip() for line in config_help(AnyConfig).splitlines()]
    classes = set(config_classes(AnyConfig))
    assert {AnyConfig, *STUDIES.values(), ModelConfig, OdmConfig, StaticConfig} < classes
    assert RunConfig.model_fields.keys() | STUDIES.keys() == AnyConfig.model_fields.keys()
    undocumented = []
    for config_class in classes:
        assert config_class.__doc__
        for name, field in config_class.model_fields.items():
            nested = nested_configs(field.annotation)
            if not field.description and not (nested and all(config.__doc__ for config in nested)):
                undocumented.append(f"{config_class.__name__}.{name}")
            assert any(line == name or line.startswith((f"{name}: ", f"{name}  (")) for line in printed), name
            for line in (field.description or "").splitlines():
                assert line.strip() in printed
    assert undocumented == []


def test_help_of_a_small_config() -> None:
    """Types, defaults, required keys and the branches of a union, word for word."""

    class Inner(Config):
        """What is inside.

        Not shown."""

        size: float | None = None
        """In metres."""

    class Outer(Config):
        """The outside."""

        count: int
        """How
        many."""
        kinds: tuple[typing.Literal["a", "b"], ...] = ()
        """Which."""
        fast: bool = True
        """Whether."""
        inner: Inner = Inner()
        mixer: StaticConfig | OdmConfig = StaticConfig()
        """Either."""

    lines = config_help(Outer).splitlines()
    assert lines[: lines.index("mixer") + 2] == [
        "count: int  (required)",
        "    How",
        "    many.",
        "kinds: list[a | b] = ()",
        "    Which.",
        "fast: bool = true",
        "    Whether.",
        "inner",
        "    What is inside.",
        "  size: float | null = null",
        "      In metres.",
        "mixer",
        "    Either.",
    ]
    assert [line.strip() for line in lines if " as " in line and line.endswith(":")] == [
        "mixer as static:",
        "mixer as odm:",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--help-config"], lambda: config_help(RunConfig)),
        (["doremi", "--help-config"], lambda: config_help(STUDIES["doremi"])),
        (["arena", "--help-config"], lambda: config_help(ArenaConfig)),
        (["--help-config", "doremi.rounds"], lambda: key_help(AnyConfig, "doremi.rounds")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_of_keys_needs_no_config_file(arguments: list[str], expected: Callable[[], str]) -> None:
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).output.strip() == expected().strip()


def test_help_of_one_key() -> None:
    """By its whole name, or by the end of it; once where several keys mean the same."""
    assert key_help(AnyConfig, "doremi.rounds").splitlines() == [
        "doremi.rounds",
        "  rounds: int = 1",
        "      Rounds at most; each takes the result of the one before as reference weights.",
    ]
    every = key_help(AnyConfig, "every").splitlines()
    assert [line for line in every if line and not line.startswith(" ")] == [
        "checkpoint.every",
        "evaluate.every",
        "log.every",
    ]
    names = key_help(AnyConfig, "min_exploration_rate").splitlines()[:2]
    assert names == ["mixer.min_exploration_rate of odm", "shadow.min_exploration_rate of odm"]
    assert "    steps: int  (required)" in key_help(AnyConfig, "train").splitlines()[2:5]
    for key, hint in (("data.max_epoch", "Did you mean 'data.max_epochs'"), ("qqq", "`megamix train --help-config`")):
        with pytest.raises(InputError, match=f"there is no key '{key}' in a config.*{hint}"):
            key_help(AnyConfig, key)


# Keys and values that are wrong


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mixtrue=natural", "unknown key 'mixtrue'. Did you mean 'mixture'?"),
        ("trai={steps: 3}", "unknown key 'trai'. Did you mean 'train'?"),
        ("train.stps=3", "unknown key 'train.stps'. Did you mean 'steps'?"),
        ("model.hiden_size=3", "unknown key 'model.hiden_size'. Did you mean 'hidden_size'?"),
        ("mixer.warmup_step=3", "unknown key 'mixer.warmup_step'. Did you mean 'warmup_steps'?"),
        ("mixer.odm.alpha=0.5", "unknown key 'mixer.odm'. Known: alpha, "),
        ("mixer={name: static, alpha: 0.5}", "unknown key 'mixer.alpha'. Known: name."),
        ("engine.pipelines=3", "unknown key 'engine.pipelines'. Did you mean 'pipeline'?"),
        ("mixer.name=omd", "mixer.name: unknown mixer 'omd'. Did you mean 'odm'?"),
        (
            "mixer.name=replay",
            "mixer.name: unknown mixer 'replay'. Known: ado, aioli, doremi, odm, recommended, static",
        ),
        ("mixer={warmup_steps: 3, name: null}", "mixer.name: a mixer needs the key 'name'"),
        ("mixer.preset=officia", "Did you mean 'official'?"),
        ("model.preset=neox2m", "model.preset: unknown 'neox2m'. Did you mean 'neox-2m'?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_right_one(override: str, expected: str) -> None:
    """At every level, inside the mixer's union too, where the path must be that of the file (pydantic would say
    ``mixer.odm.warmup_step``)."""
    assert expected in message(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=0", "small.yaml: train.steps: Input should be greater than 0, got 0."),
        ("train.steps=ten", "train.steps: Input should be a valid integer"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer"),
        ("train.steps=true", "train: steps is true, expected a number"),
        ("mixer.update_times=no", "mixer.update_times: Input should be a valid integer"),
        ("train.lr=.nan", "train.lr: Input should be a finite number, got nan"),
        ("train.lr=.inf", "train.lr: Input should be a finite number, got inf"),
        ("train.min_lr=1", "train: min_lr 1.0 is above lr 0.001"),
        ("mixer.alpha=1.5", "mixer.alpha: Input should be less than 1, got 1.5"),
        ("mixer=3", "mixer: got 3, expected a mapping with the key 'name'"),
        (
            "mixture=natura",
            "mixture: got 'natura', expected uniform, natural, {domain: weight}, {documents: {domain: share}}, {temperature: POWER}, {unimax: {max_epochs: N}}, {file: PATH}, {from_run: RUN}, {from_swarm: DIR} or {stages: [...]}.",
        ),
        ("mixture=[0.5, 0.5]", "mixture: got [0.5, 0.5], expected uniform"),
        ("mixture={web: heavy}", "small.yaml: mixture.web: Input should be a valid number"),
        ("data=3", "data: Input should be a valid dictionary"),
        ("engine.tensor=2", "engine.tensor: tensor is 2"),
        ("engine={precision: fp16, zero: 0}", "engine: precision fp16 with zero 0 has no fp32 gradients"),
        ("engine={name: megatron, precision: fp16}", "engine.precision: precision is fp16, whose range is so small"),
        ("engine.precision=bf17", "engine.precision: Input should be 'fp32', 'bf16' or 'fp16', got 'bf17'."),
        ("engine={pipeline: 2, zero: 2}", "engine: zero is 2, which spreads gradients over"),
        ("engine={pipeline: 4, zero: 3}", "engine: zero is 3, which spreads gradients and weights over"),
        ("engine.zero=4", "engine.zero: Input should be 0, 1, 2 or 3, got 4."),
        ("engine={name: megatron, compile: true}", "engine: compile is True, but engine megatron takes the fused"),
        ("engine={compile: true, zero: 3}", "engine: compile is true and zero is 3, which gathers the weights"),
        ("engine={name: megatron, fsdp: true}", "engine: fsdp is True, but no engine shards by FSDP"),
        ("engine={name: megatron, zero: 1}", "engine: zero is 1, but ZeRO is of engine deepspeed"),
        ("engine.distributed_optimizer=true", "engine: distributed_optimizer is True, but it is of engine megatron"),
        ("checkpoint.accept_changed=[dta]", "checkpoint.accept_changed.0: Input should be 'data', 'tokenizer'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override: str, expected: str) -> None:
    assert expected in message(override)


@pytest.mark.parametrize("key", ["run_dir", "data", "model", "train"])
def test_a_missing_key(key: str) -> None:
    data = parse_yaml(SMALL, "small.yaml")
    del data[key]
    with pytest.raises(InputError, match=rf"^small\.yaml: the key '{key}' is missing\. Add it\.$"):
        validate(RunConfig, data, "small.yaml")


def test_missing_keys_below_the_top() -> None:
    assert message(text=SMALL.replace("steps: 10, ", "")) == "small.yaml: the key 'train.steps' is missing. Add it."
    assert "mixer.name: a mixer needs the key 'name'. Known: ado, aioli, doremi, odm" in message(
        text=SMALL.replace("name: odm, ", "")
    )


def test_all_problems_are_reported_at_once() -> None:
    lines = message("train.stps=3", "mixer.alpa=0.5", "log.every=0", "data.seq_length=null").splitlines()
    assert lines[0] == "small.yaml:"
    assert sorted(line.strip() for line in lines[1:]) == [
        "data.seq_length: Input should be a valid integer, got None.",
        "log.every: Input should be greater than 0, got 0.",
        "unknown key 'mixer.alpa'. Did you mean 'alpha'?",
        "unknown key 'train.stps'. Did you mean 'steps'?",
    ]


def test_a_config_of_another_type() -> None:
    for data in (None, [1], "text", 3):
        with pytest.raises(InputError, match=r"^x\.yaml: Input should be a valid dictionary"):
            validate(RunConfig, data, "x.yaml")
