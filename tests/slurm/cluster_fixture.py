"""The fixture of the tests on Slurm; a plugin of each of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, NoCluster


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
