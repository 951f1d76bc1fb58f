"""`megamix launch --chain`, and studies with ``--slurm``: the chains of jobs. The jobs run a stand-in."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from json_lines import jsonl
from on_cluster import SCRIPTS, Launch, command, commands, wait_until
from tiny_swarm import swarm_config

from megamix.core.errors import InputError
from megamix.studies.slurm.commands import queued
from megamix.studies.swarm.collect import collect
from megamix.studies.tasks import Task
from megamix.training.job.lock import RunLock

pytest_plugins = ["cluster_fixture"]


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
