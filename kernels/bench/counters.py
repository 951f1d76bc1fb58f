"""Bytes that the kernels move, by the device's own counters: NVIDIA's Nsight Compute (``ncu``), where it may count.

A reading alone is mode B's forward pass, so what mode A reads beyond it is what its second reading reads.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECTOR = 32  # bytes
# The factor makes bytes of the counter.
COUNTERS = {
    "DRAM read": ("dram__bytes_read.sum", 1),
    "DRAM written": ("dram__bytes_write.sum", 1),
    "L2 read": ("lts__t_sectors_op_read.sum", SECTOR),
    "L2 written": ("lts__t_sectors_op_write.sum", SECTOR),
}
# One step of each mode launches these, in this order.
LAUNCHES = {"A": ["mode A"], "B": ["mode B, forward", "mode B, backward"]}
Figure = Callable[..., dict[str, Any]]


def measure(request: dict[str, Any], figure: Figure) -> list[dict[str, Any]]:
    """Returns bytes a logit of every kernel, and those read from memory by the second reading, as a share of one."""
    counter = shutil.which("ncu")
    if counter is None:
        return [{"metric": "failed", "note": "not installed (ncu is not on the PATH)"}]
    num_rows, width = (int(part) for part in request["shape"].split("x"))
    found: dict[str, dict[str, float]] = {}
    for mode, names in LAUNCHES.items():
        printed = _counted(counter, request | {"kind": "step", "mode": mode})
        launches = parse(printed)
        if len(launches) != len(names):
            # Without the permission to count, for example, it says so and counts nothing.
            return [{"metric": "failed", "note": _reason(printed, len(launches), len(names))}]
        found |= dict(zip(names, launches, strict=True))
    rows = [
        figure(f"{name}: {what}", launch[counter] * factor / (num_rows * width), "bytes a logit")
        for name, launch in found.items()
        for what, (counter, factor) in COUNTERS.items()
        if counter in launch
    ]
    read, _ = COUNTERS["DRAM read"]
    once, twice = (found[name].get(read) for name in ("mode B, forward", "mode A"))
    if once and twice:
        note = "0: from the cache; 1: from memory"
        rows.append(figure("second reading, from DRAM", (twice - once) / once, "readings", note))
    return rows


def parse(printed: str) -> list[dict[str, float]]:
    """Counters of each launch, in order, from the lines of CSV among what ncu prints."""
    lines = printed.splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[first:]):
        value = (row.get("Metric Value") or "").replace(",", "")
        counters = launches.setdefault(row["ID"], {})
        if value.replace(".", "", 1).isdigit():  # else it has no such counter
            counters[row["Metric Name"]] = float(value)
    return list(launches.values())


def _counted(counter: str, request: dict[str, Any]) -> str:
    """What ncu prints of the last launches of one step."""
    names = "|".join(("loss_rows", "gradient_rows"))
    metrics = ",".join(name for name, _ in COUNTERS.values())
    options = ["--csv", "--print-units", "base", "--clock-control", "none", "--target-processes", "all"]
    options += ["--kernel-name", f"regex:^({names})", "--metrics", metrics]
    command = [counter, *options, sys.executable, str(Path(__file__).with_name("measure.py")), json.dumps(request)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    return done.stdout + done.stderr


def _reason(printed: str, num_found: int, num_wanted: int) -> str:
    said = [line for line in printed.splitlines() if "ERR" in line or "rror" in line] or printed.splitlines()[-1:]
    return f"ncu counted {num_found} launches of {num_wanted}: {' '.join(said)[:160]}"
