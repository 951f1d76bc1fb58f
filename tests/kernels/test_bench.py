"""The benchmark runs from end to end on a CPU, small, and writes what it says."""

import csv
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "cross_entropy.py"
KERNELS = str(SCRIPT.parents[1])


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_runs_and_writes_its_tables_and_its_plot(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", KERNELS)
    options = ["--device", "cpu", "--shapes", "8x64,4x100", "--repeats", "1", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(SCRIPT), *options, "--only", "megamix,quack"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "these times mean nothing" in done.stdout
    results = rows_of(tmp_path / "out" / "cross_entropy.csv")
    names = ["megamix A (torch)", "megamix B (torch)", "quack", "quack return_dx"]
    assert [(row["shape"], row["name"]) for row in results] == [(s, name) for s in ("8x64", "4x100") for name in names]
    for row in results:
        if not row["name"].startswith("quack"):
            assert row["note"] == ""
            assert float(row["total_ms"]) > 0
            floor = 2 * 2 * math.prod(int(part) for part in row["shape"].split("x"))
            assert abs(float(row["gb_per_s"]) * float(row["total_ms"]) * 1e6 / floor - 1) < 1e-6
        else:  # not installed, or in need of a GPU
            assert row["note"]
            assert row["total_ms"] == ""
    domains = rows_of(tmp_path / "out" / "domains.csv")
    assert [int(row["domains"]) for row in domains] == [1, 22, 1024] * 4
    assert (tmp_path / "out" / "cross_entropy.png").stat().st_size > 1000
