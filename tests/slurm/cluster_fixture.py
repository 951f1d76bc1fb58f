"""The fixtures of the tests on Slurm; a plugin of each of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, NoCluster
from on_cluster import STAND_IN, Launch, command


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """Two nodes, up once."""
    try:
        cluster = Cluster()
    except NoCluster as reason:
        pytest.skip(f"no Slurm here: {reason}")
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def slurm(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, with its commands on PATH, and without jobs afterwards."""
    monkeypatch.setenv("PATH", f"{running_cluster.programs}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MEGAMIX_", "OMP_NUM_THREADS"))]:
        monkeypatch.delenv(name)
    yield running_cluster
    running_cluster.cancel_all()


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """``megamix launch ARGUMENTS``, in a folder of its own: what it prints. Jobs run the stand-in, until told."""
    monkeypatch.setenv("MEGAMIX_PYTHON", str(STAND_IN))
    monkeypatch.setenv("MEGAMIX_PREFLIGHT", "0")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    return lambda *arguments: command("launch", *arguments)
