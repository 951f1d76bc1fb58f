"""A custom mixer, as somebody else would write and use it: the file that mixing's page shows, an installed package,
mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import ENVIRONMENT
from jobs import run_job
from readme_code import readme_code
from records import record
from small_config import small

from megamix.analysis.doctor import doctor
from megamix.core.config_help import config_help
from megamix.core.errors import InputError
from megamix.mixing.exchange import checked_loss_weights
from megamix.mixing.mixers import DomainStats, OdmMixer, ScheduleConfig, make_mixer, own
from megamix.training.config import RunConfig
from megamix.training.records.recorded_run import RecordedRun

README = readme_code("mixing", "class Progress(Mixer)")
TILT = """\
import numpy as np
from megamix.mixing.mixers import Mixer, ScheduleConfig

class TiltConfig(ScheduleConfig):
    weights: tuple[float, ...]

class Tilt(Mixer):
    config: TiltConfig

    def _new_weights(self, step):
        return None

    @property
    def loss_weights(self):
        return np.array(self.config.weights)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported, here and (with `environment`) in other processes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "progress.py").write_text(README)
    (folder / "tilt.py").write_text(TILT)
    monkeypatch.syspath_prepend(folder)
    for cached in (own.installed, own.own_mixer):
        cached.cache_clear()
    yield folder
    for cached in (own.installed, own.own_mixer):
        cached.cache_clear()
    for module in folder.glob("*.py"):
        sys.modules.pop(module.stem, None)


def environment(path: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(path), ENVIRONMENT["PYTHONPATH"]])}


def install(path: Path, package: str, **points: str) -> None:
    """What pip leaves of a package with these mixers."""
    folder = path / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[megamix.mixers]", *lines, ""]))
    own.installed.cache_clear()


def test_a_run_stops_resumes_and_is_the_uninterrupted_one(
    megamix: Callable[..., subprocess.CompletedProcess[str]],
    tiny_config: Callable[..., Path],
    path: Path,
    tmp_path: Path,
) -> None:
    """By import path and command line in two parts; as an installed mixer in one go. Its weights are what the
    statistics of two steps give. Loss weights act as they should."""
    assert README.count("\n") < 45
    mixer = {"name": "progress:Progress", "temperature": 0.05}
    config = tiny_config(mixer=mixer, train={"steps": 6}, evaluate={"every": 0}, checkpoint={"every": 0})
    megamix("train", config, "train.stop_after=3", **environment(path))
    refused = megamix("train", config, "mixer.temperature=0.5", code=3, **environment(path))
    assert "mixer: mixer was" in refused.stderr.replace("made with another ", "")
    megamix("train", config, **environment(path))
    install(path, "somebodys-mixers", progress="progress:Progress")
    twin, tilted = tmp_path / "twin", [tmp_path / name for name in ("plain", "alike", "first")]
    runs = [(config, [f"run_dir={twin}", "mixer={name: progress, temperature: 0.05}"])]
    for folder, kind in zip(
        tilted, ("static", "tilt:Tilt, weights: [2, 2, 2, 2]", "tilt:Tilt, weights: [1, 0, 0, 0]"), strict=True
    ):
        runs.append((config, [f"run_dir={folder}", f"mixer={{name: {kind}}}"]))
    run_job(1, runs, **environment(path))

    assert record(tmp_path / "run") == record(twin)
    (start, *lines) = record(twin)[1]
    fast = slow = np.zeros(4)
    for line in lines:
        nats, tokens = (np.array(line["statistics"][key]) for key in ("nats", "tokens"))
        now = np.where(tokens > 0, nats / np.maximum(tokens, 1), fast)
        fast = np.where(slow == 0, now, 0.95 * fast + 0.05 * now)
        slow = np.where(slow == 0, now, 0.99 * slow + 0.01 * now)
        wanted = np.array(start["domain_weights"]) * (1 + np.clip((slow - fast) / 0.05, 0, 1))
        np.testing.assert_allclose(line["domain_weights"], wanted / wanted.sum(), rtol=1e-12)
    assert len(lines) == 6
    assert np.ptp([line["domain_weights"] for line in lines], axis=0).max() > 1e-4

    # Nobody else's code is needed to look at a run.
    (path / "progress.py").unlink()
    run = RecordedRun.open(twin)
    assert run.config.mixer.model_dump()["temperature"] == 0.05

    last = [np.array(list(record(folder)[0][-1]["domain_loss"].values())) for folder in tilted]
    np.testing.assert_allclose(last[1], last[0], rtol=1e-5)  # equal loss weights change nothing
    worse = last[2] - last[0]  # trained on the first domain alone: the others are worse off
    assert worse[0] < worse[1:].mean()
    assert worse[1:].min() > 1e-3


def test_the_example_is_still_where_losses_are_noise(path: Path) -> None:
    """16 samples a step over 12 domains, losses of samples that differ by a nat, one in a hundred far off: a rule that
    follows single steps gives a domain nearly all of the weight again and again."""
    rng = np.random.default_rng(0)
    mixer = make_mixer({"name": "progress:Progress"}, [f"d{i}" for i in range(12)], rng.dirichlet(np.full(12, 5.0)))
    mixture = mixer.weights
    level, before, hasty = rng.uniform(2, 5, 12), np.zeros(12), []
    for step in range(1, 601):
        samples = rng.multinomial(16, mixture)
        noise = rng.standard_normal(12) / np.sqrt(np.maximum(samples, 1)) + 5 * (rng.random(12) < 0.01)
        loss = np.where(samples > 0, level + 4 * step**-0.5 + noise, before)
        weights = mixer.update(DomainStats(loss * samples * 256, samples * 256), step)
        if step > 20:
            assert weights.max() < 0.5
            assert (weights < 2.01 * mixture).all()
        share = np.exp((before - loss) / 0.1)
        hasty.append(share.max() / share.sum())
        before = loss
    assert np.mean(np.array(hasty) > 0.9) > 0.5


def test_the_default_objective_is_the_weighted_mean_over_tokens() -> None:
    rng = np.random.default_rng(0)
    domain = rng.integers(0, 3, 50)
    losses, weights = rng.random(50), np.array([0.2, 3.0, 0.0])
    tokens = np.bincount(domain, minlength=3)
    factors, normaliser = ScheduleConfig().loss_factors(weights, tokens, np.full(3, 1 / 3))
    assert (factors[domain] * losses).sum() / normaliser == pytest.approx(np.average(losses, weights=weights[domain]))
    factors, normaliser = ScheduleConfig().loss_factors(weights, np.array([0, 0, 9]), np.full(3, 1 / 3))
    assert (factors @ [0, 0, 9.0]) / normaliser == 0  # not 0 / 0


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (1.0, float("nan"))])
def test_bad_loss_weights(path: Path, weights: tuple[float, ...]) -> None:
    mixer = make_mixer({"name": "tilt:Tilt", "weights": weights}, ["a", "b"], [1, 1])
    with pytest.raises(InputError, match=r"'tilt:Tilt': loss_weights is .* expected 2 finite numbers"):
        checked_loss_weights(mixer)


def test_state_and_name(path: Path) -> None:
    mixer = make_mixer({"name": "progress:Progress"}, ["a", "b"], [1, 1])
    assert mixer.name == "progress:Progress"
    mixer.update(DomainStats([3.0, 2.0], [1, 1]), 1)
    twin = make_mixer({"name": "progress:Progress"}, ["a", "b"], [1, 1])
    twin.load_state_dict(json.loads(json.dumps(mixer.state_dict())))
    expected = 1 + np.array([0.04, 0.02]) / 0.1  # 2.99 - 2.95 and 1.995 - 1.975
    for each in (mixer, twin):
        weights = each.update(DomainStats([2.0, 1.5], [1, 1]), 2)
        np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-12)


def test_its_estimates_follow_when_domains_change(path: Path) -> None:
    """Without a word in the mixer: parts have those of the whole, a new domain the mean."""
    old = make_mixer({"name": "progress:Progress"}, ["a", "b"], [1, 1])
    old.update(DomainStats([3.0, 2.0], [1, 1]), 1)
    new = make_mixer({"name": "progress:Progress"}, ["b1", "new", "b2", "a"], [1, 1, 1, 1])
    new.adopt_state(old.state_dict(), [1, None, 1, 0], np.full(4, 0.25))
    assert new.state_dict()["fast"] == [2.0, 2.5, 2.0, 3.0]
    weights = new.update(DomainStats([1.9, 2.4, 1.9, 2.9], [1, 1, 1, 1]), 2)
    np.testing.assert_allclose(weights, 0.25, rtol=1e-12)


def test_help_and_doctor_know_its_keys(path: Path) -> None:
    install(path, "somebodys-mixers", mine="progress:Progress", broken="nowhere:Mixer")
    assert "Fall, in nats per token, from which on a weight is doubled." in config_help(RunConfig)
    assert "weights: list[float]  (required)" not in config_help(RunConfig)
    assert "weights: list[float]  (required)" in config_help(RunConfig, data={"mixer": {"name": "tilt:Tilt"}})
    config = small("mixer={name: mine, temperature: 0.5}", "model.vocab_size=512")
    assert config.mixer.model_dump()["name"] == "mine"
    assert "mine; weights act 2 steps after" in doctor(config, plan_only=True).text()


def test_a_mixer_derived_from_one_of_ours(path: Path) -> None:
    (path / "derived.py").write_text("from megamix.mixing.mixers import OdmMixer\nclass Derived(OdmMixer):\n    pass\n")
    mixer = make_mixer({"name": "derived:Derived", "preset": "paper"}, ["a", "b"], [1, 1])
    assert isinstance(mixer, OdmMixer)
    assert (mixer.name, mixer.config.policy) == ("derived:Derived", "gibbs")


FILE = "from megamix.mixing.mixers import Mixer, ScheduleConfig\nclass Mine(Mixer):\n    {}\n    def _new_weights(self, step): ...\n"


@pytest.mark.parametrize(
    ("source", "mixer", "message"),
    [
        ("", "name: nowhere:Mine", r"mixer\.name: the mixer nowhere:Mine: there is no module 'nowhere'\. Install its"),
        ("import nowhere", "name: bad:Mine", r"cannot be imported: ModuleNotFoundError: No module named 'nowhere' \(.*bad\.py, line 1"),
        ("\nx = 1 / 0", "name: bad:Mine", r"cannot be imported: ZeroDivisionError: division by zero \(.*bad\.py, line 2\)"),
        ("def", "name: bad:Mine", r"cannot be imported: SyntaxError"),
        (FILE, "name: bad:Mien", r"the module bad has no 'Mien'\. Did you mean 'Mine'"),
        (FILE, "name: bad.Mine", r"unknown mixer 'bad\.Mine'\. Did you mean 'bad:Mine'"),
        (FILE, "name: bad:a b", r"expected an import path of the form package\.module:Class"),
        ("Mine = 3", "name: bad:Mine", r"bad:Mine is of type int, expected a class that derives from megamix\.mixing\.Mixer"),
        ("Mine = dict", "name: bad:Mine", r"bad:Mine is the class dict, expected a class that derives"),
        ("from megamix.mixing.mixers import Mixer as Mine", "name: bad:Mine", r"does not define _new_weights\. Add it"),
        (FILE.format("config: dict"), "name: bad:Mine", r"config is annotated as the class dict, expected .*ScheduleConfig"),
        (FILE.format("config: 'Nothing'"), "name: bad:Mine", r"annotations cannot be read: name 'Nothing' is not defined"),
        (FILE.format("name = 'odm'"), "name: bad:Mine", r"calls itself 'odm', which is megamix's own"),
        ("", "name: progress:Progress, temperatures: 1", r"unknown key 'mixer\.temperatures'\. Did you mean 'temperature'"),
        ("", "name: progress:Progress, temperature: -1", r"mixer\.temperature: Input should be greater than 0, got -1"),
        ("", "name: progress:Progress, update_every: 0", r"mixer\.update_every: Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_mistakes_are_named_when_the_config_is_read(path: Path, source: str, mixer: str, message: str) -> None:
    (path / "bad.py").write_text(source.replace("{}", "pass"))
    with pytest.raises(InputError, match=message):
        small(f"mixer={{{mixer}}}")


def test_installed_names_clash(path: Path) -> None:
    install(path, "first", mine="progress:Progress")
    install(path, "again", mine="progress:Progress")  # the same class twice: an old version's traces
    assert small("mixer={name: mine}").mixer.model_dump()["temperature"] == 0.1
    install(path, "second", mine="tilt:Tilt")
    own.own_mixer.cache_clear()
    with pytest.raises(InputError, match="'mine' is installed more than once: again and first and second"):
        small("mixer={name: mine}")
    with pytest.raises(InputError, match=r"unknown mixer 'mien'\. Did you mean 'mine'"):
        small("mixer={name: mien}")
    install(path, "third", odm="progress:Progress")
    with pytest.raises(InputError, match="'odm' is megamix's own, and third installs another mixer under it"):
        small()
