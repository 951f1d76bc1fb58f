"""``megamix swarm all``: from a config to a mixture and a run with it, what is passed over, and an update."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_swarm import DOMAINS, swarm_config
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import Manifest
from megamix.studies.swarm.fit.fitted import Fitted
from megamix.studies.swarm.fit.tables import read_table
from megamix.studies.swarm.propose.proposal import Proposal, read_proposal, write_proposal
from megamix.studies.swarm.study import read_study
from megamix.studies.swarm.tasks import swarm
from megamix.training.records.recorded_run import RecordedRun

Megamix = Callable[..., subprocess.CompletedProcess[str]]
Write = Callable[..., Path]
MADE = ("priors.json", "swarm.csv", "ratios.csv", "metrics.csv", "fit.json", "mixture.json")


def times(run: Path) -> dict[str, int]:
    """When the results of the steps were written."""
    found = [run / name for name in ("fit.json", "mixture.json", "runs/0001/metrics.jsonl", "target/metrics.jsonl")]
    return {path.name + path.parent.name: os.stat(path).st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first swarm is; `test_all_steps` makes it."""
    return tmp_path_factory.mktemp("first")


FIT = {"bootstrap": 5, "starts": 2}
QUICK = {"steps": 6, "lr": 3.0e-2}


def first_config(tiny_config: Write) -> Path:
    swarm_keys = {
        "generate": {"members": 5}, "proxy": {"train": QUICK}, "fit": FIT, "propose": {"resamples": 2},
        "target": {"train": {"steps": 9}},
    }  # fmt: skip
    return swarm_config(tiny_config, swarm=swarm_keys, checkpoint={"every": 0})


def test_all_steps_and_again(megamix: Megamix, tiny_config: Write, first: Path) -> None:
    config, run = first_config(tiny_config), first / "run"
    place = f"run_dir={run}"
    done = megamix("swarm", "all", config, place)
    assert "5 proxy runs of 3,072 tokens, 15,360 together" in done.stderr
    assert "and a target run of 4,608 tokens" in done.stderr
    assert done.stderr.index("15,360 together") < done.stderr.index("member 0000: done")
    assert "rank correlation" in done.stdout
    assert all((run / name).is_file() for name in MADE)
    mixture = read_proposal(run).weights
    assert sum(mixture.values()) == pytest.approx(1)
    target = RecordedRun.open(run / "target")
    assert target.steps == 9
    assert dict(zip(target.domain_names, target.ledger.lines[0]["domain_weights"], strict=True)) == pytest.approx(
        mixture
    )
    # The target's tokens bound the mixture: 4 readings of a domain, of which the data has more than enough.
    assert json.loads((run / "propose.json").read_text())["target_tokens"] == 9 * 8 * 64

    before = times(run)
    again = megamix("swarm", "all", config, place)
    assert "5 of 5 members done" in again.stderr
    assert times(run) == before
    # Another objective is another mixture of the same fit; the target was trained with the old one.
    changed = megamix("swarm", "all", config, place, "swarm.propose.objective={'loss:code': 1}", code=3)
    after = times(run)
    assert {name for name in before if after[name] != before[name]} == {f"mixture.json{run.name}"}
    assert "mixture" in changed.stderr
    assert read_proposal(run).weights != mixture


def test_a_step_alone(tiny_config: Write, first: Path, tmp_path: Path) -> None:
    """Each is as good as in the whole; out of its turn it says what is missing."""
    config, run = first_config(tiny_config), first / "run"
    if not run.is_dir():
        pytest.skip("the swarm was not run")
    with pytest.raises(InputError, match=r"holds no \*\.yaml"):
        swarm(config, [], "run")
    with pytest.raises(InputError, match="cannot read"):
        swarm(config, [], "fit")
    with pytest.raises(InputError, match=r"swarm\.target is null"):
        swarm(config, ["swarm.target=null"], "target")
    before = Fitted.open(run)
    (run / "fit.json").unlink()
    assert swarm(config, [f"run_dir={run}"], "fit") == 0
    after = Fitted.open(run)
    assert after.details["inputs"] == before.details["inputs"]
    mixtures = before.table.ratios_RK  # the two were fitted with different numbers of threads
    np.testing.assert_allclose(after.predict(mixtures), before.predict(mixtures), rtol=1e-6)
    assert swarm(config, [f"run_dir={run}"], "propose") == 0
    assert times(run)[f"mixture.json{run.name}"]


def test_the_commands_of_the_steps(tiny_config: Write, data_dir: Path, first: Path, tmp_path: Path) -> None:
    def megamix(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["swarm", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    said = megamix("priors", data_dir, "--domains", "topics,code", "--out", tmp_path / "priors.json")
    found = json.loads((tmp_path / "priors.json").read_text())
    tokens = {entry.name: entry.train.tokens for entry in Manifest.load(data_dir).domains}
    assert found["token_counts"] == {name: tokens[name] for name in ("topics", "code")}
    share = tokens["topics"] / (tokens["topics"] + tokens["code"])
    assert found["relative_sizes"] == pytest.approx({"topics": share, "code": 1 - share})
    assert f"{tokens['topics'] + tokens['code']:,}" in said
    with pytest.raises(InputError, match=r"has no domain 'topic'. Did you mean 'topics'"):
        megamix("priors", data_dir, "--domains", "topic")

    (tmp_path / "old").mkdir()
    write_proposal(tmp_path / "old", Proposal({"code": 0.3, "topics": 0.5, "tables": 0.2}, {}))
    (tmp_path / "update.yaml").write_text(f"{{previous: {tmp_path / 'old'}, remove: [tables]}}")
    with pytest.raises(
        InputError, match="also has tables, which the update takes away; and packages, which it does not"
    ):
        megamix("update", tmp_path / "update.yaml", data_dir)
    megamix("update", tmp_path / "update.yaml", data_dir, "--domains", "topics,code", "--out", tmp_path / "new")
    assert read_proposal(tmp_path / "new").weights == pytest.approx({"code": 3 / 8, "topics": 5 / 8})
    with pytest.raises(InputError, match="chosen from a data set"):
        megamix("update", tmp_path / "update.yaml", tmp_path / "priors.json", "--domains", "code")

    config, run = first_config(tiny_config), first / "run"
    if not run.is_dir():
        pytest.skip("the swarm was not run")
    tables = [(run / name).read_bytes() for name in ("ratios.csv", "metrics.csv")]
    assert megamix("collect", config, f"run_dir={run}") == f"{run}\n"
    assert [(run / name).read_bytes() for name in ("ratios.csv", "metrics.csv")] == tables
    megamix("collect", config, f"run_dir={run}", "swarm.metrics.mean=true")
    assert read_table(run / "ratios.csv", run / "metrics.csv").metrics[-1] == "loss"
    for name, content in zip(("ratios.csv", "metrics.csv"), tables, strict=True):
        (run / name).write_bytes(content)
    megamix("generate", config, f"run_dir={tmp_path}/other")
    with pytest.raises(InputError, match=r"5 of the 5 runs .* not done: 0000 \(not begun\)"):
        megamix("collect", config, f"run_dir={tmp_path}/other", "--partial")


def test_an_update_swarms_what_it_touches(megamix: Megamix, tiny_config: Write, first: Path, tmp_path: Path) -> None:
    """A fourth domain is added to the first swarm's three, which keep their ratios: members, tables, mixture and the
    cost are of two domains; removing one takes no runs."""
    old = read_proposal(first / "run").weights if (first / "run" / "mixture.json").is_file() else None
    if old is None:
        pytest.skip("the swarm was not run")
    update = {"previous": str(first / "run"), "add": ["packages"]}
    generate = {"members": 4, "min_strength": 2.0}
    keys = {"generate": generate, "proxy": {"train": QUICK}, "fit": FIT, "propose": {"resamples": 2}, "update": update}
    config = swarm_config(tiny_config, swarm=keys, data={"domains": [*DOMAINS, "packages"]}, checkpoint={"every": 0})
    said = megamix("swarm", "all", config).stderr
    assert said.index("full recomputation") < said.index("member 0000: done")
    run = tmp_path / "run"
    inner = np.array([old[name] for name in DOMAINS])
    for number in range(4):
        member = read_yaml(run / "members" / f"{number:04}.yaml")["mixture"]
        weights = np.array([member[name] for name in DOMAINS])
        np.testing.assert_allclose(weights, inner * weights.sum(), atol=1e-12)
    table = read_table(run / "ratios.csv", run / "metrics.csv")
    assert table.domains == ("packages", "existing")
    assert len(table.metrics) == 4
    counts = read_study(config, []).token_counts
    assert table.ratios_RK[0] == pytest.approx(
        [counts["packages"] / sum(counts.values()), 1 - counts["packages"] / sum(counts.values())]
    )
    found = read_proposal(run)
    kept = np.array([found.weights[name] for name in DOMAINS])
    np.testing.assert_allclose(kept / kept.sum(), inner, atol=1e-9)
    assert [link["directory"] for link in found.history] == [str(first / "run"), str(run)]

    removal = {"swarm.update": {"previous": str(run), "add": [], "remove": ["topics"]}}
    overrides = [f"{key}={json.dumps(value)}" for key, value in removal.items()]
    smaller = ["code", "tables", "packages"]
    done = swarm(config, [*overrides, f"run_dir={tmp_path}/smaller", f"data.domains={json.dumps(smaller)}"])
    assert done == 0
    left = read_proposal(tmp_path / "smaller").weights
    total = sum(found.weights[name] for name in smaller)
    assert left == pytest.approx({name: found.weights[name] / total for name in smaller})
    assert not (tmp_path / "smaller" / "members").exists()
    with pytest.raises(InputError, match=r"leaves no weight to be found"):
        swarm(config, [*overrides, f"run_dir={tmp_path}/smaller", f"data.domains={json.dumps(smaller)}"], "generate")


def test_the_help_of_the_config_names_every_step(megamix: Megamix) -> None:
    said = megamix("swarm", "all", "--help-config").stdout
    for key in ("generate", "min_strength", "repetition", "at_once", "regression", "kl", "previous", "target"):
        assert f"{key}" in said
