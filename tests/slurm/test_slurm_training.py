"""Real training on a real two-node Slurm: preempted, cancelled, cut off, in chains and arrays. Everything that a run
has on record is then what an undisturbed run has.

A rank takes seconds to start, so that the longer forms are slow tests.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from commands import ENVIRONMENT, run_megamix
from on_cluster import SCRIPTS, wait_until
from records import lines, record, samples
from safetensors.numpy import load_file
from typer.testing import CliRunner

from megamix.cli import app

pytest_plugins = ["cluster_fixture"]
SECONDS = 600.0
STEPS, EVERY = 160, 80


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, slurm: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose jobs find this checkout. Not every test waits for doctor, which costs as much as a rank."""
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("MEGAMIX_PYTHON", sys.executable)
    monkeypatch.setenv("MEGAMIX_PREFLIGHT", "0")
    monkeypatch.chdir(tmp_path)
    yield slurm
    for path in sorted(tmp_path.rglob("*.out")):  # Shown when the test fails.
        print(f"--- {path}\n{path.read_text(encoding='utf-8')}")


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Callable[..., Path]:
    """A run that is long enough to be met on its way."""

    def write(**sections: Any) -> Path:
        train = {"steps": STEPS, "global_batch": 8, "micro_batch": 1, "lr": 3.0e-3}
        return tiny_config(
            **{"train": train, "evaluate": {"every": EVERY, "batches": 1}, "checkpoint": {"every": EVERY}, **sections}
        )

    return write


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def launch(*arguments: object) -> None:
    command("launch", *arguments)


def reached(run: Path) -> int:
    """The last step on record."""
    path = run / "metrics.jsonl"
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A line that is being written is not counted.
    return max((line["step"] for line in lines(path)), default=0) if written.endswith("\n") else 0


def assert_same(run: Path, other: Path) -> None:
    """Metrics, weights, samples and the tensors of the last checkpoint are equal, bit for bit."""
    assert record(run) == record(other)
    assert samples(run) == samples(other)
    last, twin = (sorted((path / "checkpoints" / f"step_{STEPS}").rglob("*.safetensors")) for path in (run, other))
    assert [path.name for path in last] == [path.name for path in twin]
    assert last
    for path, same in zip(last, twin, strict=True):
        tensors, others = load_file(path), load_file(same)
        assert all((tensors[name] == others[name]).all() for name in tensors), path


def undisturbed(cluster: Cluster, config: Path, ranks: int) -> Path:
    """The same run, on one node."""
    run = config.parent / "undisturbed"
    script = (SCRIPTS / "train.sbatch", config, f"run_dir={run}")
    job = cluster.submit(f"--ntasks-per-node={ranks}", *script, cwd=config.parent)
    assert cluster.wait(job, seconds=SECONDS) == "COMPLETED"
    return run


def stop(cluster: Cluster, job: int, run: Path, step: int) -> None:
    """Sends the warning of a preemption once a run is past a step."""
    wait_until(f"step {step}", lambda: reached(run) > step, SECONDS)
    cluster.run("scancel", "--signal=USR1", "--batch", job)


@pytest.mark.slow
def test_preempted_and_cancelled_a_run_is_the_undisturbed_one(real: Cluster, config: Callable[..., Path]) -> None:
    """Two nodes with a rank each: the warning of a preemption, a requeue, scancel, and the job submitted again."""
    path = config(engine={"pipeline": 2})
    run = path.parent / "run"
    submit = ("--nodes=2", "--ntasks-per-node=1", SCRIPTS / "train.sbatch", path)
    job = real.submit(*submit, cwd=path.parent)
    stop(real, job, run, 10)
    wait_until("the requeue", lambda: real.field(job, "Restarts") == "1", SECONDS)
    first = reached(run)
    assert 10 < first < STEPS
    wait_until("more steps", lambda: reached(run) > first + 10, SECONDS)
    real.run("scancel", job)
    wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
    assert reached(run) < STEPS
    again = real.submit(*submit, cwd=path.parent)
    assert real.wait(again, seconds=SECONDS) == "COMPLETED"
    said = "".join(log.read_text(encoding="utf-8") for log in (path.parent / "logs").glob(f"{again}-*.log"))
    # From where it was cancelled, where no checkpoint was due.
    (resumed,) = {int(step) for step in re.findall(r"resuming from \S+/step_(\d+)", said)}
    assert resumed > first
    assert resumed % EVERY
    assert_same(run, undisturbed(real, path, 2))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_ranks_on_each_of_two_nodes_preempted_twice(
    real: Cluster, config: Callable[..., Path], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(engine={"pipeline": 2, "data": 2})
    run = path.parent / "run"
    monkeypatch.setenv("MEGAMIX_LAUNCHER", launcher)
    monkeypatch.setenv("MEGAMIX_PREFLIGHT", "1")
    job = real.submit("--nodes=2", "--ntasks-per-node=2", SCRIPTS / "train.sbatch", path, cwd=path.parent)
    for restarts, step in (("1", 10), ("2", 60)):
        stop(real, job, run, step)
        wait_until("the requeue", lambda restarts=restarts: real.field(job, "Restarts") == restarts, SECONDS)
    assert real.wait(job, seconds=SECONDS) == "COMPLETED"
    assert_same(run, undisturbed(real, path, 4))


@pytest.mark.slow
@pytest.mark.parametrize("told", ["by somebody", "by the timeout"])
def test_a_node_is_killed_and_the_run_goes_on(config: Callable[..., Path], told: str, request: Any) -> None:
    """Slurm requeues the job: when somebody says that the node is down, or when it has missed it for long enough."""
    cluster: Cluster = request.getfixturevalue("real")
    own = Cluster(missed=15) if told == "by the timeout" else None
    try:
        real = own or cluster
        path = config(engine={"pipeline": 2})
        run = path.parent / "run"
        job = real.submit("--nodes=2", "--ntasks-per-node=1", SCRIPTS / "train.sbatch", path, cwd=path.parent)
        wait_until("a checkpoint", lambda: reached(run) > EVERY + 5, SECONDS)
        real.cut_node(2)
        if own is None:
            real.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
        wait_until("the requeue", lambda: real.field(job, "Restarts") == "1", SECONDS)
        real.start_node(2)
        real.run("scontrol", "update", "nodename=n2", "state=resume", check=False)
        assert real.wait(job, seconds=SECONDS) == "COMPLETED"
        assert_same(run, undisturbed(real, path, 2))
    finally:
        if own is not None:
            own.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_of_a_swarm_only_the_run_that_failed_runs_again(
    real: Cluster, tiny_config: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    """One cannot write to its place, which is mended before the second launch; then all results are in one table."""
    folder = tmp_path / "swarm"
    (folder / "runs").mkdir(parents=True)
    for index in range(number):
        weights = {"code": 1.0 + index, "tables": 1.0, "topics": 1.0, "packages": 1.0}
        path = tiny_config(run_dir=str(folder / "runs" / f"m{index}"), mixture=weights, checkpoint={"every": 0})
        settings = {**yaml.safe_load(path.read_text(encoding="utf-8")), "mixer": {"name": "static"}}
        (folder / f"m{index}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    in_the_way = folder / "runs" / "m1"
    in_the_way.touch()

    def launched() -> set[str]:
        """The members that a launch starts, once all its jobs have ended."""
        before = set((folder / "slurm").glob("*.out")) if (folder / "slurm").is_dir() else set()
        launch("--chain", "swarm", folder, "--limit", "2")
        wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
        new = set((folder / "slurm").glob("*.out")) - before
        return {path.stem.rsplit("_", 1)[1] for path in new if "-swarm-swarm-" in path.name}

    assert launched() == {str(index) for index in range(number)}
    assert "m1" not in results(folder)
    in_the_way.unlink()
    kept = {
        index: os.stat(folder / "runs" / f"m{index}" / "metrics.jsonl").st_mtime_ns
        for index in (0, number - 1)
        if index != 1
    }
    assert launched() == {"1"}
    assert all(os.stat(folder / "runs" / f"m{index}" / "metrics.jsonl").st_mtime_ns == at for index, at in kept.items())
    assert launched() == set()
    rows = results(folder)
    assert list(rows) == [f"m{index}" for index in range(number)]
    for index, row in enumerate(rows.values()):
        assert float(row["code"]) == pytest.approx((1 + index) / (4 + index))
        evaluations = [
            line for line in lines(folder / "runs" / row["run"] / "metrics.jsonl") if line["event"] == "evaluate"
        ]
        for name, loss in evaluations[-1]["domain_loss"].items():
            assert float(row[f"loss:{name}"]) == loss


@pytest.mark.slow
def test_doremi_submits_its_next_round_and_goes_on_after_scancel(
    real: Cluster, config: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of two proxy runs, without a reference, is cancelled; in the end all is that of ``megamix doremi``."""
    train = {"steps": 60, "global_batch": 8, "micro_batch": 1, "lr": 3.0e-3}
    keys = {"rounds": 2, "tolerance": 1e-12}
    path = config(mixer={"name": "doremi", "reference": None, "eta": 0.1}, doremi=keys, train=train)
    run, submit_all = tmp_path / "run", ("doremi", path, "--slurm")
    command(*submit_all)
    shown = [line.split() for line in real.run("squeue", "--noheader", "--format=%j %A").stdout.splitlines()]
    first = {name.split("-")[2]: job for name, job in shown}
    assert sorted(first) == ["proxy", "weights"]
    wait_until("a step", lambda: reached(run / "proxy") > 5, SECONDS)
    real.run("scancel", first["proxy"])
    wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
    stopped = reached(run / "proxy")
    assert stopped < 60
    command(*submit_all)
    wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
    command(*submit_all)
    assert not real.run("squeue", "--noheader").stdout
    for task in ("proxy-2", "weights"):
        assert f"{task}: done" in caplog.text
    run_megamix("doremi", path, f"run_dir={tmp_path}/alone")
    assert (run / "weights.json").read_bytes() == (tmp_path / "alone" / "weights.json").read_bytes()
    for folder in ("proxy", "round_2/proxy"):
        assert record(run / folder) == record(tmp_path / "alone" / folder)
        assert samples(run / folder) == samples(tmp_path / "alone" / folder)


@pytest.mark.slow
def test_a_swarm_runs_through_to_its_target_though_a_member_is_cancelled(
    real: Cluster, tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its members are one array, with the weights that were drawn; the same command again is all that is needed."""
    keys = {
        "generate": {"members": 6, "min_strength": 4}, "fit": {"bootstrap": 3}, "propose": {"resamples": 0},
        "target": {"train": {"steps": 9}},
    }  # fmt: skip
    path = tiny_config(
        mixer={"name": "static"}, data={"domains": ["code", "tables", "topics"]}, checkpoint={"every": 0}, swarm=keys
    )
    run = tmp_path / "run"
    submit_all = ("swarm", "all", path, "--slurm", "--limit", "2")
    command(*submit_all)
    shown = real.run("squeue", "--noheader", "--array", "--format=%i %j").stdout.splitlines()
    (member,) = {line.split()[0] for line in shown if line.split()[0].endswith("_1")}
    wait_until("a member", lambda: real.field(member, "JobState") == "RUNNING", SECONDS)
    real.run("scancel", member)
    wait_until("its end", lambda: real.field(member, "JobState") == "CANCELLED", SECONDS)
    command(*submit_all)
    wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
    with (run / "swarm.csv").open(encoding="utf-8", newline="") as file:
        drawn = {row["run"]: row for row in csv.DictReader(file)}
    assert len(drawn) == 6
    for name, row in results(run).items():
        for domain in ("code", "tables", "topics"):
            assert float(row[domain]) == pytest.approx(float(drawn[name][domain]))
    proposal = json.loads((run / "mixture.json").read_text(encoding="utf-8"))
    assert proposal["fit"]["runs"] == 6
    first = record(run / "target")[1][0]
    assert dict(zip(first["domain_names"], first["domain_weights"], strict=True)) == pytest.approx(proposal["weights"])
    capsys.readouterr()
    command(*submit_all)
    assert not real.run("squeue", "--noheader").stdout
    # Here there is nothing left to do either.
    assert "collect: done" in run_megamix("swarm", "all", path).stderr


def results(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of both tables, by member."""
    rows: dict[str, dict[str, str]] = {}
    for name in ("ratios.csv", "metrics.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["run"], {}).update(row)
    return rows


@pytest.mark.slow
def test_the_chain_of_doremi_and_a_second_launch_that_finds_it_done(
    real: Cluster, tiny_config: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its weights are those of ``megamix doremi``, which takes the same steps on this machine."""
    target = {"train": {"steps": 3}, "checkpoint": {"every": 0}}
    path = tiny_config(mixer={"name": "doremi"}, doremi={"target": target}, engine={"data": 2})
    options = ("--chain", "doremi", "--nodes", "2", path)
    launch(*options)
    wait_until("an empty queue", lambda: not real.run("squeue", "--noheader").stdout, SECONDS)
    run = tmp_path / "run"
    launch(*options)
    for step in ("reference", "cache", "proxy", "weights", "target"):
        assert f"{step}: done" in caplog.text or step == "target", caplog.text
    alone = (sys.executable, "-m", "megamix", "doremi", str(path), f"run_dir={tmp_path}/alone")
    subprocess.run(alone, check=True, env=ENVIRONMENT, timeout=SECONDS)
    assert (run / "weights.json").read_bytes() == (tmp_path / "alone" / "weights.json").read_bytes()
    assert record(run / "target") == record(tmp_path / "alone" / "target")
