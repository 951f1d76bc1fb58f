"""`megamix launch`: what it submits, what it refuses, and what it does not submit again. The jobs run a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from on_cluster import SCRIPTS, Launch, command, commands, wait_until

from megamix.core.errors import InputError
from megamix.studies.slurm.commands import queued

pytest_plugins = ["cluster_fixture"]


def test_a_dry_run_shows_the_command_and_the_script_and_makes_nothing(
    launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without Slurm, too."""
    monkeypatch.setenv("PATH", "/usr/sbin-without-slurm")
    config = tiny_config(run_dir="runs/mine", engine={"pipeline": 2})
    options = (
        "--gpus-per-node",
        2,
        "--nodes",
        2,
        "--time",
        "1:00:00",
        "--account",
        "me",
        "--sbatch=--qos=high",
        "--mem",
        0,
    )
    printed = launch(config, "train.lr=1e-3", "log.every=2", *options, "--dry-run")
    (command,) = commands(printed).values()
    assert command[-3:] == [str(config), "train.lr=1e-3", "log.every=2"]
    assert command[-4] == str(SCRIPTS / "train.sbatch")
    assert {
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=4",
        "--mem=0",
        "--time=1:00:00",
        "--account=me",
        "--qos=high",
        "--dependency=singleton",
    } <= set(command)
    assert "--exclusive" not in command
    for script in ("train.sbatch", "env.sh", "common.sh", "rank.sh"):
        assert f"# ---- {SCRIPTS / script}\n{(SCRIPTS / script).read_text()}" in printed
    assert f"MEGAMIX_LOGS={tmp_path}/runs/mine/slurm" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        ({}, (), []),
        ({}, ("--gpus-per-node", 1), ["--cpus-per-task=4"]),
        ({"threads": 12}, ("--gpus-per-node", 1, "--exclusive"), ["--cpus-per-task=12", "--exclusive"]),
        ({"threads": 12}, ("--cpus-per-task", 6), ["--cpus-per-task=6"]),
    ],
)
def test_a_rank_gets_the_cpus_that_it_needs(
    launch: Launch,
    tiny_config: Callable[..., Path],
    engine: dict[str, Any],
    options: tuple[object, ...],
    expected: list[str],
) -> None:
    (command,) = commands(launch(tiny_config(engine=engine), *options, "--dry-run")).values()
    assert [word for word in command if word.startswith(("--cpus-per-task", "--exclusive"))] == expected


def test_a_dry_run_before_the_data_is_there(launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    static = tiny_config(data={"manifest": "nowhere"}).rename(tmp_path / "static.yaml")
    config = tiny_config(data={"manifest": "nowhere"}, mixer={"name": "doremi"}, doremi={"target": {}})
    with pytest.raises(InputError, match="nowhere"):
        launch(static, "--dry-run")
    assert list(commands(launch(static, "--plan-only"))) == ["train"]
    tasks = ["reference", "cache", "proxy", "weights", "target"]
    assert list(commands(launch("--chain", "doremi", config, "--plan-only"))) == tasks
    assert list(commands(command("doremi", config, "--slurm", "--exclusive", "--plan-only"))) == tasks
    options = ("--chain", "prepare", "--shards", 2, "--plan-only", "--", "web=nowhere", "--out", "out")
    assert list(commands(launch(*options))) == ["tokenizer", "shards", "merge"]
    folder = tmp_path / "members"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.yaml").write_text(static.read_text().replace(str(tmp_path / "run"), f"runs/{name}"))
    printed = launch("--chain", "swarm", folder, "--plan-only")
    assert f"#   0: {folder}/a.yaml\n#   1: {folder}/b.yaml\n" in printed
    with pytest.raises(InputError, match=r"engine.pipeline is 3"):
        launch(static, "engine.pipeline=3", "--plan-only")


def test_an_environment_that_is_not_there_is_said(
    launch: Launch, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGAMIX_ENV", "/nowhere/env.sh")
    with pytest.raises(InputError, match=r"MEGAMIX_ENV is /nowhere/env\.sh, which is no file"):
        launch(tiny_config(), "--dry-run")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ("--nodes", 3), r"on 3 nodes of 1 rank: .*global_batch"),
        ({"engine": {"pipeline": 2, "data": 2}}, ("--nodes", 3), "on 3 nodes of 1 rank: engine: .*makes 4 ranks"),
        ({"engine": {"pipeline": 3}}, (), "engine.pipeline is 3, but the model has 2"),
        ({}, ("--gpus-per-node", 2, "--tasks-per-node", 4), "a rank has one GPU"),
        ({"data": {"manifest": "nowhere"}}, (), "nowhere"),
        ({"train": {"stepps": 3}}, (), "Did you mean 'steps'"),
        ({}, ("--shards", 2), "--shards goes with --chain prepare only"),
        ({}, ("--limit", 2), "--limit goes with the arrays"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_at_once(
    launch: Launch,
    tiny_config: Callable[..., Path],
    changes: dict[str, Any],
    options: tuple[object, ...],
    message: str,
) -> None:
    """Without a cluster to ask."""
    with pytest.raises(InputError, match=message):
        launch(tiny_config(**changes), *options, "--dry-run")


def test_what_the_cluster_does_not_have_is_refused(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny_config(engine={"data": 4}, train={"global_batch": 32})
    with pytest.raises(InputError, match=r"Slurm refuses this job: .*partition"):
        launch(config, "--partition", "gold")
    with pytest.raises(InputError, match=r"Slurm refuses this job: .*(node|Node)"):
        launch(config, "--nodes", 4)
    assert not slurm.run("squeue", "--noheader").stdout
    assert not (tmp_path / "run").exists()


def test_without_slurm_the_reason_is_said(
    launch: Launch, tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/sbin-without-slurm")
    with pytest.raises(InputError, match="there is no squeue on this machine"):
        launch(tiny_config())


def test_a_run_is_not_submitted_twice(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(run_dir="runs/mine")
    launch(config)
    (name,) = slurm.run("squeue", "--noheader", "--format=%j").stdout.split()
    assert name.startswith("megamix-mine-train-")
    (job,) = queued(name)
    # The same run directory, spelt differently.
    launch(config, f"run_dir={tmp_path}/runs/mine")
    assert [found.job for found in queued(name)] == [job.job]
    assert f"train: not submitted again, job {job.job} is" in caplog.text
    # Another run is another job.
    launch(config, "run_dir=runs/other")
    assert len(slurm.run("squeue", "--noheader").stdout.splitlines()) == 2
    (tmp_path / "finish").write_text("yes")
    assert slurm.wait(job.job) == "COMPLETED"
    output = (tmp_path / "runs" / "mine" / "slurm" / f"{name}-{job.job}.out").read_text()
    assert "megamix: done" in output
    # It is not done, for the stand-in trains nothing: now it is submitted again.
    launch(config)
    assert len(slurm.run("squeue", "--noheader", f"--name={name}", "--states=all").stdout.splitlines()) == 2


def test_a_run_whose_name_means_something_to_slurm(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """A comma ends a name for squeue, and %j is replaced in the path of the output, of the job and of its ranks."""
    run = tmp_path / "a,b %j c"
    config = tiny_config(run_dir=str(run))
    launch(config)
    name, number = slurm.run("squeue", "--noheader", "--format=%j %A").stdout.split()
    assert name.startswith("megamix-a_b__j_c-train-")
    launch(config)
    assert [str(found.job) for found in queued(name)] == [number]
    (tmp_path / "finish").write_text("yes")
    assert slurm.wait(int(number)) == "COMPLETED"
    assert "megamix: done" in (run / "slurm" / f"{name}-{number}.out").read_text()
    assert [path.name for path in (run / "slurm").glob("*.log")] == [f"{number}-n1.log"]


def test_two_launches_that_meet_run_one_after_the_other(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees the other in the queue."""
    config = tiny_config()
    monkeypatch.setattr("megamix.studies.slurm.commands.queued", lambda name: [])
    launch(config)
    launch(config)
    jobs = sorted(map(int, slurm.run("squeue", "--noheader", "--format=%A").stdout.split()))
    wait_until("the first to run", lambda: slurm.field(jobs[0], "JobState") == "RUNNING")
    assert slurm.field(jobs[1], "JobState") == "PENDING"
    assert slurm.field(jobs[1], "Reason") == "Dependency"
