"""The acceptance on a CPU, tiny: it goes on where it was interrupted, and its page says what was not measured."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton_interpreter
from commands import ROOT

BENCH = ROOT / "kernels" / "bench"
pytestmark = pytest.mark.skipif(triton_interpreter.why_not() is not None, reason=str(triton_interpreter.why_not()))


def accept(out: Path, *options: str) -> str:
    command = [sys.executable, str(BENCH / "acceptance.py"), "--out", str(out), "--device", "cpu", "--minutes", "60"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(row: dict[str, str]) -> None:
    """Asserts that a row is a figure, or the absence of a package of others."""
    assert row["device"] == "CPU (times mean nothing)"
    if row["metric"] == "failed":
        assert not row["value"]
        assert "not installed" in row["note"] or row["note"] == "no", row
    else:
        assert float(row["value"]) >= 0


def test_it_goes_on_and_names_what_is_missing(tmp_path: Path) -> None:
    failed = {"task": "linear/8x16x320/megamix linear", "kind": "linear", "metric": "failed"}
    rest = {"name": "megamix linear", "note": "no", "device": "CPU (times mean nothing)", "date": "2"}
    # A task that failed, and the beginning of a line, as a killed run leaves them.
    (tmp_path / "results.jsonl").write_text(json.dumps(failed | rest) + '\n{"task": "loss/2x3')
    assert "linear/8x16x320/megamix" not in accept(tmp_path, "--only", "linear/8x16x320/megamix,host", "--minutes", "0")
    page = (tmp_path / "page.md").read_text()
    assert "| megamix linear | not measured | no |" in page
    assert "**not measured**: host/megamix A (triton)" in page
    said = accept(tmp_path, "--only", "linear/8x16x320/megamix,host", "--retry")
    assert "linear/8x16x320/megamix linear: forward + backward" in said
    assert "host/megamix A (triton): forward" in said
    assert "not measured" not in (tmp_path / "page.md").read_text()
    rows = [row for row in rows_of(tmp_path) if row["date"] != "2"]
    host = {f"{name}{of}" for name in ("forward", "backward") for of in ("", " of an empty function", " / empty")}
    assert {row["metric"] for row in rows} == {"forward + backward", *host}
    for row in rows:
        check(row)


@pytest.mark.slow
def test_every_task_has_figures_or_a_reason(tmp_path: Path) -> None:
    keys = accept(tmp_path, "--list").split("\n")[:-1]
    accept(tmp_path)
    rows = rows_of(tmp_path)
    assert {row["task"] for row in rows} == set(keys)
    for row in rows:
        check(row)
    assert "not measured**" not in (tmp_path / "page.md").read_text()
