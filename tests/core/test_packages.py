"""What works without the optional packages, and what the rest says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import ENVIRONMENT, SUPPORT
from recorded_runs import write_config, write_data

from megamix.cli import app
from megamix.core.errors import InputError
from megamix.core.packages import MODULES, check_extra, missing_package, need

ALL = sorted({module for modules in MODULES.values() for module in modules})
CORE = """\
import sys
for name in {absent!r}: sys.modules[name] = None
from megamix.data import Blend, Manifest
from megamix.mixing import DomainStats, make_mixer
from megamix.mixing.mixers import MIXERS
blend = Blend(num_samples=[1000, 50, 300], weights=[0.5, 0.3, 0.2], seed=1)
for name in MIXERS:
    mixer = make_mixer({{"name": name}}, domains=["web", "code", "papers"], initial_weights=[0.5, 0.3, 0.2])
    for step in range(1, 30):
        blend.take(48)
        stats = DomainStats(nats=[310.0 / step, 95.0, 70.0], tokens=[100, 40, 30], excess_nats=[3.0, 1.0, 2.0])
        blend.set_weights(mixer.update(stats, step=step))
print(blend.position, *blend.counts)
"""


def test_blend_and_every_mixer_work_without_torch(tmp_path: Path) -> None:
    code = CORE.format(absent=ALL)
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    position, *counts = map(int, done.stdout.split())
    assert position == sum(counts) == 6 * 29 * 48
    assert min(counts) > 0


def all_commands(command: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if not hasattr(command, "commands"):
        return {path}
    return {found for name, each in command.commands.items() for found in all_commands(each, (*path, name))}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, the config of a run, and text."""
    folder = tmp_path_factory.mktemp("home")
    write_data(folder / "data")
    write_config(folder / "run", folder / "data" / "manifest.json")
    (folder / "run" / "config.resolved.yaml").rename(folder / "config.yaml")
    (folder / "run").rmdir()
    (folder / "text").mkdir()
    (folder / "text" / "web.txt").write_text("words\n")
    (folder / "fit.json").write_text("{}")
    return folder


# Command -> its arguments, and the extra that it asks for; "": none, it works or says what else it lacks.
COMMANDS: dict[str, tuple[str, str]] = {
    "corpus": ("out-corpus", "prepare"),
    "prepare": ("text --out out --tokenizer train:300", "prepare"),
    "merge": ("data", "prepare"),
    "verify": ("data", ""),
    "blend adopt": ("web=data/web/train --out adopted", ""),
    "blend export": ("data", ""),
    "init": ("data --out first.yaml", ""),
    "doctor": ("config.yaml", "deepspeed"),
    "train": ("config.yaml", "deepspeed"),
    "steer": ("run --hold", ""),
    "launch": ("config.yaml --dry-run", ""),
    "evaluate": ("run", "torch"),
    "export": ("run --out hf", "torch"),
    "inspect": ("data", ""),
    "plot": ("run", "plot"),
    "report": ("run", ""),
    "compare": ("run", ""),
    "why": ("run", ""),
    "replay": ("run", "plot"),
    "arena": ("config.yaml --slurm --dry-run", "prepare"),
    "doremi": ("config.yaml --slurm --dry-run", ""),
    "reference": ("run --out cache", ""),
    **{f"swarm {name}": ("config.yaml", "") for name in ("generate", "collect", "propose", "explain")},
    # Here they would train.
    **{f"swarm {name}": ("config.yaml --slurm --dry-run", "") for name in ("all", "run")},
    "swarm fit": ("--ratios r.csv --metrics m.csv --out fit", "plot"),
    "swarm priors": ("data", ""),
    "swarm update": ("update.yaml data", ""),
}


def test_every_command_says_which_extra_it_lacks(home: Path, tmp_path: Path) -> None:
    """In one line, without a traceback; and many need none."""
    names = {" ".join(name) for name in all_commands(typer.main.get_command(app))}
    assert COMMANDS.keys() == names
    commands = [[*name.split(), *arguments.split()] for name, (arguments, _) in COMMANDS.items()]
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, SUPPORT / "without_packages.py", json.dumps(ALL), json.dumps(commands), out],
        env=ENVIRONMENT, cwd=home, check=True,
    )  # fmt: skip
    found = dict(zip(COMMANDS, json.loads(out.read_text()), strict=True))
    assert {name: said for name, (_, said) in found.items() if "Traceback" in said} == {}
    asked = {
        name: re.findall(r"^megamix: .*pip install 'megamix\[(\w+)\]'\.$", said, re.M)
        for name, (_, said) in found.items()
    }
    assert asked == {name: [extra] if extra else [] for name, (_, extra) in COMMANDS.items()}
    assert {code for name, (code, _) in found.items() if asked[name]} == {2}
    assert {name for name, (code, _) in found.items() if code == 0} >= {
        "inspect",
        "init",
        "verify",
        "launch",
        "blend export",
    }


def test_a_missing_module_is_known_by_its_extra() -> None:
    told = missing_package(ModuleNotFoundError("No module named 'sklearn.svm'", name="sklearn.svm"), "the regression")
    assert str(told) == (
        "the regression needs the package sklearn, which is not installed: pip install 'megamix[swarm]'."
    )
    assert missing_package(ModuleNotFoundError("No module named 'megamix.nothing'", name="megamix.nothing")) is None
    assert missing_package(ModuleNotFoundError("raised by hand")) is None


def test_need_and_check_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert need("json", "reading") is json
    with pytest.raises(ModuleNotFoundError):
        need("megamix.nothing", "a defect")
    monkeypatch.setitem(sys.modules, "triton", None)
    for check in (lambda: need("triton", "the kernel"), lambda: check_extra("cuda", "the kernel")):
        with pytest.raises(InputError, match=r"^the kernel needs the package triton, .*megamix\[cuda\]"):
            check()
    (tmp_path / "wandb.py").write_text("raise ImportError('libgone.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match=r"wandb, which does not work here: libgone\.so"):
        need("wandb", "log.wandb")
