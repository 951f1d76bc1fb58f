"""`megamix launch`: what it submits, what it refuses, and what it does not submit again. The jobs run a stand-in."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from json_lines import jsonl
from on_cluster import SCRIPTS, STAND_IN, wait_until
from tiny_swarm import swarm_config
from typer.testing import CliRunner

from megamix.cli import app
from megamix.core.errors import InputError
from megamix.studies.slurm.commands import queued
from megamix.studies.swarm.collect import collect
from megamix.studies.tasks import Task
from megamix.training.job.lock import RunLock

pytest_plugins = ["cluster_fixture"]
Launch = Callable[..., str]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """``megamix launch ARGUMENTS``, in a folder of its own: what it prints. Jobs run the stand-in, until told."""
    monkeypatch.setenv("MEGAMIX_PYTHON", str(STAND_IN))
    monkeypatch.setenv("MEGAMIX_PREFLIGHT", "0")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    return lambda *arguments: command("launch", *arguments)


def command(*arguments: object) -> str:
    """What ``megamix ARGUMENTS`` prints."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def commands(printed: str) -> dict[str, list[str]]:
    """The words of each sbatch command of a dry run, by its step."""
    lines = printed.splitlines()
    found = {}
    for title, line in itertools.pairwise(lines):
        if " sbatch " in line and not line.startswith("#"):
            words = shlex.split(line)
            found[title.removeprefix("# ")] = words[words.index("sbatch") :]
    return found


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
        ({}, ("--nodes", 3), r"on 3 nodes of 1 ranks: .*global_batch"),
        ({"engine": {"pipeline": 2, "data": 2}}, ("--nodes", 3), "on 3 nodes of 1 ranks: engine: .*makes 4 ranks"),
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


def test_the_chain_of_doremi_and_what_of_it_is_submitted_again(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    mixer, target = {"name": "doremi"}, {"train": {"steps": 5}}
    config = tiny_config(mixer=mixer, doremi={"target": target}, checkpoint={"keep": 1})
    planned = commands(launch("--chain", "doremi", config, "--dry-run"))
    assert list(planned) == ["reference", "cache", "proxy", "weights", "target"]
    for before, step in itertools.pairwise(planned):
        assert f"--dependency=afterok:<{before}>,singleton" in planned[step]
    run = tmp_path / "run"
    assert planned["reference"][-2:] == [str(SCRIPTS / "train.sbatch"), str(run / "reference.yaml")]
    losses = ["reference.sbatch", str(run / "reference"), "--out", str(run / "cache"), "--for", str(run / "proxy.yaml")]
    assert planned["cache"][-6:] == [str(SCRIPTS / losses[0]), *losses[1:]]
    assert planned["weights"][-4:] == ["doremi", str(config), "--only", "weights"]
    launch("--chain", "doremi", config)

    def jobs() -> dict[str, int]:
        shown = [line.split() for line in slurm.run("squeue", "--noheader", "--format=%j %A").stdout.splitlines()]
        found = {name.split("-")[2]: int(job) for name, job in shown}
        assert len(found) == len(shown), shown
        return found

    first = jobs()
    assert sorted(first) == sorted(planned)
    launch("--chain", "doremi", config)
    assert jobs() == first
    # The first fails: those after it can never begin, and go.
    (tmp_path / "exit").write_text("1")
    wait_until("an empty queue", lambda: not jobs())
    (tmp_path / "exit").unlink()
    launch("--chain", "doremi", config)
    again = jobs()
    assert sorted(again) == sorted(planned)
    assert not set(again.values()) & set(first.values())


def test_the_chain_of_a_preparation(
    slurm: Cluster, launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shards that are there are not made again, and two that are made at a time hold the merge up."""
    text, out = tmp_path / "web.jsonl", tmp_path / "data"
    text.write_bytes(jsonl(["one", "two"]))
    out.mkdir()
    (out / "shard-00002-of-00004.json").write_text("{}")
    arguments = ("--", f"web={text}", "--out", out, "--tokenizer", "train:300")
    options = ("--chain", "prepare", "--shards", 4, "--limit", 2)
    planned = commands(launch(*options, "--dry-run", *arguments))
    assert list(planned) == ["tokenizer", "shards", "merge"]
    assert "--array=1,3,4%2" in planned["shards"]
    assert "--dependency=afterok:<tokenizer>" in planned["shards"]
    assert "--dependency=afterok:<shards>,singleton" in planned["merge"]
    assert planned["merge"][-2:] == ["merge", str(out)]
    with pytest.raises(InputError, match="is neither a folder nor"):
        launch(*options, "--", "nowhere", "--out", out)
    with pytest.raises(InputError, match="the chain sets --shard itself"):
        launch(*options, *arguments, "--shard", "1/2")
    (tmp_path / "finish").write_text("yes")
    launch(*options, *arguments)
    wait_until("an empty queue", lambda: not slurm.run("squeue", "--noheader").stdout)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    ran = [(line["command"], line["arguments"][-1]) for line in events if line["event"] == "start"]
    assert ran[0] == ("prepare", "--tokenizer-only")
    assert sorted(ran[1:-1]) == [("prepare", "1/4"), ("prepare", "3/4"), ("prepare", "4/4")]
    assert ran[-1] == ("merge", str(out))


def test_a_swarm_submits_members_that_are_not_done_nor_in_the_queue(
    slurm: Cluster, launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    folder = swarm_of(tmp_path / "swarm", tiny_config, 3)
    launch("--chain", "swarm", folder, "--limit", 2)
    names = slurm.run("squeue", "--noheader", "--format=%j").stdout.split()
    (name,) = {name for name in names if "-swarm-swarm-" in name}

    def members() -> dict[int | None, int]:
        return {found.member: found.job for found in queued(name)}

    before = members()
    assert sorted(before, key=str) == [0, 1, 2]
    wait_until("two to run", lambda: [found.state for found in queued(name)].count("RUNNING") == 2)
    launch("--chain", "swarm", folder)
    assert members() == before
    slurm.run("scancel", f"{before[1]}_1")
    wait_until("the end of one", lambda: 1 not in members())
    launch("--chain", "swarm", folder)
    after = members()
    assert sorted(after, key=str) == [0, 1, 2]
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]


@pytest.mark.usefixtures("slurm", "launch")  # in this order: the cluster clears the environment that jobs inherit
def test_a_swarm_in_one_command_and_what_of_it_waits_for_a_member_submitted_again(
    slurm: Cluster, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {"generate": {"members": 3, "min_strength": 4}, "target": {"engine": {"data": 2}}}
    path = swarm_config(tiny_config, swarm=keys)
    arguments = ("swarm", "all", path, "train.lr=1e-3", "--slurm", "--limit", 3, "--target-nodes", 2)
    planned = commands(command(*arguments, "--dry-run"))
    assert list(planned) == ["swarm", "collect", "fit", "propose", "target"]
    assert "--array=0,1,2%3" in planned["swarm"]
    for before, task in itertools.pairwise(planned):
        assert f"--dependency=afterok:<{before}>,singleton" in planned[task]
    for task in ("collect", "fit", "propose"):
        assert planned[task][-6:] == ["swarm", "all", str(path), "train.lr=1e-3", "--only", task]
    assert planned["target"][-2:] == [str(SCRIPTS / "train.sbatch"), f"{tmp_path}/run/target.yaml"]
    assert ("--nodes=1" in planned["swarm"], "--nodes=2" in planned["target"]) == (True, True)
    assert not slurm.run("squeue", "--noheader").stdout

    def jobs() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for line in slurm.run("squeue", "--noheader", "--array", "--format=%j %i").stdout.splitlines():
            name, job = line.split()
            found.setdefault(name.split("-")[2], set()).add(job)
        return found

    command(*arguments)
    first = jobs()
    assert {name: len(found) for name, found in first.items()} == {
        "swarm": 3, "collect": 1, "fit": 1, "propose": 1, "target": 1
    }  # fmt: skip
    (lost,) = {job for job in first["swarm"] if job.endswith("_1")}
    wait_until("a member to run", lambda: slurm.field(lost, "JobState") == "RUNNING")
    slurm.run("scancel", lost)
    wait_until("its end", lambda: slurm.field(lost, "JobState") == "CANCELLED")
    command(*arguments)
    again = jobs()
    (new,) = again["swarm"] - first["swarm"]
    assert again["swarm"] == {*first["swarm"] - {lost}, new}
    assert {name: len(found) for name, found in again.items()} == {name: len(found) for name, found in first.items()}
    (collecting,) = again["collect"]
    waits = slurm.field(collecting, "Dependency")
    assert f"afterok:{new.split('_')[0]}" in waits
    assert f"{lost}(" not in waits
    (tmp_path / "finish").write_text("yes")
    wait_until("an empty queue", lambda: not jobs())
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    ran = [Path(line["arguments"][-1]).name for line in events if line["event"] == "end"]
    assert sorted(ran[:3]) == ["0000.yaml", "0001.yaml", "0002.yaml"]
    assert ran[3:] == ["collect", "fit", "propose", "target.yaml", "target.yaml"]  # the last on two ranks


def test_a_swarm_is_free_while_its_jobs_are_submitted(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that begins at once takes the lock of the swarm itself."""
    path = swarm_config(tiny_config, swarm={"generate": {"members": 3, "min_strength": 4}, "target": {}})
    free: list[bool] = []

    def submitted(folder: Path, tasks: Sequence[Task], *, dry_run: bool) -> str:
        with RunLock(folder):
            free.append(len(list((folder / "members").glob("*.yaml"))) == 3)
        return ", ".join(task.name for task in tasks)

    monkeypatch.setattr("megamix.studies.swarm.tasks.submit_or_show", submitted)
    assert command("swarm", "all", path, "train.lr=1e-3", "--slurm") == "swarm, collect, fit, propose, target"
    assert free == [True]


@pytest.mark.parametrize("study", [("launch", "--chain", "doremi"), ("doremi", "--slurm")])
def test_what_is_wrong_with_all_runs_of_doremi_is_said_of_the_first(
    tiny_config: Callable[..., Path], tmp_path: Path, study: tuple[str, ...]
) -> None:
    config = tiny_config(mixer={"name": "doremi"}, doremi={"target": {}})
    with pytest.raises(InputError, match=f"^{tmp_path}/run/reference.yaml on 3 nodes"):
        command(*study, config, "--nodes", 3, "--dry-run")


def test_a_swarm_that_runs_here_is_not_submitted(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Its members' configs would be written anew under the run."""
    path = swarm_config(tiny_config, swarm={"generate": {"members": 3, "min_strength": 4}})
    with RunLock(tmp_path / "run"), pytest.raises(InputError, match="another job works in"):
        command("swarm", "all", path, "train.lr=1e-9", "--slurm", "--dry-run")
    assert not (tmp_path / "run" / "members").exists()


@pytest.mark.parametrize("study", [("doremi",), ("swarm", "all")])
def test_options_of_slurm_without_it_are_refused(tiny_config: Callable[..., Path], study: tuple[str, ...]) -> None:
    for option in ("--time=1:00:00", "--dry-run"):
        with pytest.raises(InputError, match=f"{option} is an option of a Slurm job.*Add --slurm"):
            command(*study, tiny_config(), option)
    with pytest.raises(InputError, match="--only target runs here, and --slurm submits all"):
        command(*study, tiny_config(), "--slurm", "--only", "target")


def swarm_of(folder: Path, tiny_config: Callable[..., Path], number: int) -> Path:
    """A folder with configs of runs of one step."""
    folder.mkdir()
    for index in range(number):
        weights = {"code": 1.0 + index, "tables": 1.0, "topics": 1.0, "packages": 1.0}
        config = yaml.safe_load(tiny_config(run_dir=str(folder / "runs" / f"m{index}"), mixture=weights).read_text())
        config["mixer"] = {"name": "static"}
        (folder / f"m{index}.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_swarm_of_runs_in_one_place_or_of_different_sizes_is_refused(
    launch: Launch, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    folder = swarm_of(tmp_path / "swarm", tiny_config, 2)
    with pytest.raises(InputError, match="have the same run_dir"):
        launch("--chain", "swarm", folder, "run_dir=runs/one", "--dry-run")
    config = yaml.safe_load((folder / "m1.yaml").read_text())
    config["engine"] = {"pipeline": 2}
    (folder / "m1.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="the jobs of an array are of one size"):
        launch("--chain", "swarm", folder, "--dry-run")
    with pytest.raises(InputError, match=r"holds no \*\.yaml"):
        launch("--chain", "swarm", tmp_path / "nothing", "--dry-run")


def test_results_name_runs_that_have_none(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    folder = swarm_of(tmp_path / "swarm", tiny_config, 2)
    with pytest.raises(InputError, match=r"2 of the 2 runs .* are not done: m0 \(not begun\), m1 \(not begun\)"):
        collect(folder, [], partial=True)
