"""`megamix init`: the config it writes is one that the run's own checks accept, for data of any size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import recorded_runs
import yaml
from recorded_runs import NAMES, write_data
from typer.testing import CliRunner

from megamix.analysis.doctor import doctor
from megamix.analysis.first_config import first_config, sizes_of
from megamix.cli import app
from megamix.core.config import load_config, validate
from megamix.core.errors import InputError
from megamix.core.yaml_text import parse_yaml
from megamix.training.config import RunConfig
from megamix.training.plan import check_layout


def a_manifest(*tokens: int, validation: int = 10**6, vocab_size: int = 50304) -> Any:
    """As much of a manifest as sizes depend on."""
    domains = [
        SimpleNamespace(
            name=f"d{number}",
            train=SimpleNamespace(tokens=count),
            validation=SimpleNamespace(tokens=min(validation, count)),
        )
        for number, count in enumerate(tokens)
    ]
    return SimpleNamespace(
        domains=domains,
        tokenizer=SimpleNamespace(vocab_size=vocab_size),
        natural_weights=lambda: np.array(tokens) / sum(tokens),
    )


@pytest.mark.parametrize("folder", ["data", "$home's data: #1"])
def test_what_is_written_passes_the_checks_of_a_run(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / folder)
    said = CliRunner().invoke(app, ["init", folder.replace("$", "$$"), "--out", "mine.yaml"], catch_exceptions=False)
    assert said.output == "mine.yaml: read it, then: megamix doctor mine.yaml; megamix train mine.yaml\n"
    text = Path("mine.yaml").read_text()
    config = load_config(RunConfig, Path("mine.yaml"), [])
    assert config.run_dir == Path("runs/mine")
    assert config.data.manifest == Path(folder)
    report = doctor(config).text()
    assert "epochs" in report
    for name, tokens, share in zip(NAMES, ("3,000", "1,000", "500"), ("66.667%", "22.222%", "11.111%"), strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith(f"#   {name} ")]
        assert line.split()[2:] == [tokens, share]
    with pytest.raises(InputError, match=r"mine\.yaml is there, and is left as it is"):
        CliRunner().invoke(app, ["init", folder.replace("$", "$$"), "--out", "mine.yaml"], catch_exceptions=False)
    assert Path("mine.yaml").read_text() == text


def test_the_file_is_named_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path / "data" / "mine")
    CliRunner().invoke(app, ["init", "."], catch_exceptions=False)
    assert load_config(RunConfig, Path("mine.yaml"), []).run_dir == Path("runs/mine")


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "preset"),
    [
        ((3000, 1000, 17), 1024, "neox-2m"),
        ((10**6,), 1024, "neox-2m"),
        ((4 * 10**8, 10**6), 1024, "neox-70m"),
        ((2 * 10**9,), 50304, "neox-70m"),
        ((300 * 10**9,) * 22, 50304, "neox-1b"),
        ((10**12, 50), 50304, "neox-1b"),
    ],
)
def test_sizes_fit_the_tokens(tokens: tuple[int, ...], vocab_size: int, preset: str) -> None:
    """20 tokens a parameter where there are as many, no more than 4 epochs where there are fewer, a sample in every
    domain and split, and a batch that divides into micro-batches."""
    manifest = a_manifest(*tokens, validation=40, vocab_size=vocab_size)
    sizes = sizes_of(manifest)
    assert sizes.preset == preset
    text = first_config(manifest, Path("data"), Path("runs/mine"))
    config = validate(RunConfig, parse_yaml(text, "text"), "text")
    step = config.train.global_batch * config.data.seq_length
    wanted = min(20 * sizes.parameters, 4 * sum(tokens))
    assert wanted - step < sizes.tokens <= max(wanted, step)
    assert config.data.seq_length < min(40, *tokens)
    assert config.train.lr == pytest.approx(sizes.lr, rel=0.05)
    assert check_layout(config.model_copy(update={"model": config.model.with_vocabulary(vocab_size)}), 1) == (1, 1)
    assert all(len(line) <= 170 for line in text.splitlines())
    assert yaml.safe_load(text)["mixer"]["name"] == ("recommended" if len(tokens) > 1 else "static")


def test_tokens_that_fill_no_sample_are_not_counted() -> None:
    """Else the run would ask for more epochs than its own max_epochs allows."""
    tokens = (10_000,) * 40
    sizes = sizes_of(a_manifest(*tokens, validation=9_000, vocab_size=1024))
    samples = sum((each - 1) // sizes.seq_length for each in tokens)
    assert sizes.steps * sizes.global_batch <= 4 * samples < 4 * sum(tokens) // sizes.seq_length - sizes.global_batch


def test_of_many_domains_the_largest_are_listed() -> None:
    text = first_config(a_manifest(*range(100, 1100)), Path("data"), Path("runs/mine"))
    listed = [line.split()[1] for line in text.splitlines() if line.startswith("#   d")]
    assert listed == [f"d{number}" for number in range(999, 959, -1)]
    assert "#   and 960 more" in text


def test_a_domain_without_a_whole_sample_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is written."""
    monkeypatch.setattr(recorded_runs, "TRAIN_TOKENS", (3000, 1000, 5))
    write_data(tmp_path / "data")
    with pytest.raises(InputError, match=r"_books.*5"):
        CliRunner().invoke(
            app, ["init", str(tmp_path / "data"), "--out", str(tmp_path / "m.yaml")], catch_exceptions=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
