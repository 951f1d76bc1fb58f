"""The job scripts on a real two-node Slurm, with a stand-in for Python: which processes they start with which
environment, and what they make of signals, exit codes and lost nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster
from on_cluster import StandIn

pytest_plugins = ["cluster_fixture"]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


def test_a_rank_for_each_task_and_a_log_for_each_node(slurm: Cluster, tmp_path: Path) -> None:
    job = StandIn(slurm, tmp_path).submit(*TWO_BY_TWO, arguments=("a.yaml", "train.steps=7"))
    job.wait_for("start", 4)
    job.tell("finish")
    assert job.ended() == ("COMPLETED", "0", 0)
    ranks = sorted(job.events("start"), key=lambda line: line["rank"])
    assert [(line["rank"], line["LOCAL_RANK"], line["node"]) for line in ranks] == [
        ("0", "0", "n1"),
        ("1", "1", "n1"),
        ("2", "0", "n2"),
        ("3", "1", "n2"),
    ]
    assert {(line["WORLD_SIZE"], line["MASTER_ADDR"], line["OMP_NUM_THREADS"]) for line in ranks} == {("4", "n1", "1")}
    assert {line["MASTER_PORT"] for line in ranks} == {str(20000 + job.job)}
    assert all(line["arguments"] == ["a.yaml", "train.steps=7"] for line in ranks)
    # Before them, once on each node.
    checks = job.events("start", "doctor")
    assert sorted(line["node"] for line in checks) == ["n1", "n2"]
    assert checks[0]["arguments"] == ["a.yaml", "train.steps=7", "--ranks", "4"]
    assert set(job.logs()) == {"n1", "n2"}


def test_a_rank_for_each_gpu_in_a_container_with_an_environment_of_ones_own(slurm: Cluster, tmp_path: Path) -> None:
    """Each node has two GPUs; apptainer is played by a script that says what it was asked for and runs the rest."""
    programs = tmp_path / "programs"
    programs.mkdir()
    apptainer = programs / "apptainer"
    apptainer.write_text(
        '#!/bin/bash\necho "apptainer $*"\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    own = tmp_path / "own.sh"
    own.write_text(f"PATH={programs}:$PATH\nexport OMP_NUM_THREADS=3\n")
    told = {"MEGAMIX_CONTAINER": "image.sif", "MEGAMIX_ENV": str(own), "MEGAMIX_MOUNTS": "/data:/data"}
    job = StandIn(slurm, tmp_path / "job", **told).submit("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=4")
    job.wait_for("start", 2)
    job.tell("finish")
    assert job.ended() == ("COMPLETED", "0", 0)
    assert {(line["WORLD_SIZE"], line["OMP_NUM_THREADS"]) for line in job.events("start")} == {("2", "3")}
    asked = [line for line in job.logs()["n1"].splitlines() if "apptainer" in line]
    assert len(asked) == 2
    assert all("exec --bind" in line and ",/data:/data --pwd" in line and "--nv image.sif" in line for line in asked)


def test_asked_to_stop_in_many_ways_a_job_is_requeued_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    """The signal to the batch script, as before a time limit; to the ranks; to ranks that do not catch it yet; under
    torchrun. Ranks that leave one after the other do not count as failed."""
    told = {"torchrun": {"MEGAMIX_LAUNCHER": "torchrun"}}
    jobs = {
        name: StandIn(slurm, tmp_path / name, **told.get(name, {})) for name in ("batch", "ranks", "deaf", "torchrun")
    }
    jobs["deaf"].tell("deaf")
    for job in jobs.values():
        job.submit(*TWO_BY_TWO)
    for name, job in jobs.items():
        job.wait_for("start", 4)
        slurm.run("scancel", "--signal=USR1", *([] if name == "ranks" else ["--batch"]), job.job)
    for job in jobs.values():
        job.wait_for("start", 4, restart=1)
        job.tell("finish")
    for name, job in jobs.items():
        assert job.ended() == ("COMPLETED", "0", 1), name
        stopped = [line["signal"] for line in job.events("stopped", restart=0)]
        assert stopped == ([] if name == "deaf" else ["SIGUSR1"] * 4), name
        assert len(job.events("start", restart=1)) == 4, name
        assert "asked to stop; the job is requeued" in job.said(), name
    assert {line["OMP_NUM_THREADS"] for line in jobs["torchrun"].events("start")} == {"1"}


def test_of_an_array_only_the_member_that_was_asked_to_stop_is_requeued(slurm: Cluster, tmp_path: Path) -> None:
    """The last member, which has the number of the array."""
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).touch()
    job = StandIn(slurm, tmp_path, MEGAMIX_PREFLIGHT="0")
    job.submit("--array=0-1", script="swarm.sbatch", arguments=(str(tmp_path),))
    job.wait_for("start", 2)
    slurm.run("scancel", "--signal=USR1", "--batch", f"{job.job}_1")
    job.wait_for("start", 1, restart=1)
    job.tell("finish")
    assert [slurm.wait(f"{job.job}_{member}") for member in (0, 1)] == ["COMPLETED"] * 2
    assert [line["arguments"] for line in job.events("start", restart=1)] == [[f"{tmp_path}/b.yaml"]]


def test_a_job_that_was_requeued_too_often_ends(slurm: Cluster, tmp_path: Path) -> None:
    job = StandIn(slurm, tmp_path, MEGAMIX_MAX_REQUEUES="0", MEGAMIX_PREFLIGHT="0").submit(*TWO_BY_TWO)
    job.wait_for("start", 4)
    slurm.run("scancel", "--signal=USR1", "--batch", job.job)
    assert job.ended() == ("FAILED", "75", 0)
    assert "requeued 0 times, the limit" in job.said()
    assert not job.events("start", "doctor")


def test_scancel_gives_the_ranks_time_and_does_not_requeue(slurm: Cluster, tmp_path: Path) -> None:
    job = StandIn(slurm, tmp_path).submit(*TWO_BY_TWO)
    job.wait_for("start", 4)
    slurm.run("scancel", job.job)
    job.wait_for("stopped", 4)
    assert job.ended()[0::2] == ("CANCELLED", 0)
    assert [line["signal"] for line in job.events("stopped")] == ["SIGTERM"] * 4


def test_a_node_that_doctor_refuses_is_named_before_any_rank_starts(slurm: Cluster, tmp_path: Path) -> None:
    job = StandIn(slurm, tmp_path)
    job.tell("bad_node", "n2")
    job.submit(*TWO_BY_TWO)
    assert job.ended() == ("FAILED", "2", 0)
    assert "node n2 cannot run this job (exit code 2): megamix: there is no GPU." in job.said()
    assert "node n1 cannot" not in job.said()
    assert not job.events("start")


def test_the_code_of_the_rank_that_failed_first_is_the_jobs(slurm: Cluster, tmp_path: Path) -> None:
    """The others end with 1 or by a signal, and the whole job ends; what was wrong is in the job's own file."""
    job = StandIn(slurm, tmp_path, MEGAMIX_PREFLIGHT="0").submit(*TWO_BY_TWO)
    job.wait_for("start", 4)
    job.tell("exit", "3")
    assert job.ended() == ("FAILED", "3", 0)
    assert "0: megamix: out of luck" in job.said()


@pytest.mark.slow
def test_when_a_node_is_lost_the_job_starts_again(slurm: Cluster, tmp_path: Path) -> None:
    """Everything on the node is killed at once; somebody, or the timeout, tells Slurm that it is down. Slow, as Slurm
    sometimes lets the requeued job wait for two minutes."""
    job = StandIn(slurm, tmp_path, MEGAMIX_PREFLIGHT="0").submit(*TWO_BY_TWO)
    job.wait_for("start", 4)
    slurm.cut_node(2)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    slurm.start_node(2)
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    job.wait_for("start", 4, restart=1)
    job.tell("finish")
    assert job.ended() == ("COMPLETED", "0", 1)


def test_an_array_runs_the_members_asked_for_and_a_shard_knows_how_many_there_are(
    slurm: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "swarm"
    folder.mkdir()
    for name in ("B", "a", "c"):
        (folder / f"{name}.yaml").write_text("")
    members = StandIn(slurm, tmp_path / "members", MEGAMIX_PREFLIGHT="0")
    members.tell("finish")
    members.submit("--array=0,2", script="swarm.sbatch", arguments=(str(folder), "x=1"))
    shards = StandIn(slurm, tmp_path / "shards", MEGAMIX_SHARDS="5")
    shards.tell("finish")
    shards.submit("--array=2", "--cpus-per-task=3", script="prepare.sbatch", arguments=("text", "--out", "data"))
    missing = StandIn(slurm, tmp_path / "missing").submit("--array=3", script="swarm.sbatch", arguments=(str(folder),))
    assert members.ended()[0] == "COMPLETED"
    assert shards.ended()[0] == "COMPLETED"
    assert missing.ended()[:2] == ("FAILED", "2")
    # In the order of the names' bytes.
    asked = sorted(line["arguments"] for line in members.events("start"))
    assert asked == [[str(folder / "B.yaml"), "x=1"], [str(folder / "c.yaml"), "x=1"]]
    (shard,) = shards.events("start", "prepare")
    assert shard["arguments"] == ["text", "--out", "data", "--workers", "3", "--shard", "2/5"]
    assert (shard["rank"], shard["OMP_NUM_THREADS"]) == ("", "3")
    assert "has no member 3: it holds 3 *.yaml files" in missing.said()
