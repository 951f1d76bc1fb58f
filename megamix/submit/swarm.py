"""A swarm: a folder with one config per proxy run, and the table of what the runs found.

    member,run_dir,step,steps,done,weight:web,weight:code,loss:web,loss:code
    a,runs/swarm/a,200,200,1,0.5,0.5,3.1,2.2

``weight:DOMAIN`` is the mean of the weights over the samples trained on, ``loss:DOMAIN`` the validation loss of the
last evaluation in nats per token; a field is empty where a run has none yet.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamix.config import load_config
from megamix.errors import InputError
from megamix.files import replace_file
from megamix.interop.average import run_weights
from megamix.log import get_logger
from megamix.recorded_run import RecordedRun
from megamix.run_config import RunConfig

RESULTS = "results.csv"


@dataclass(frozen=True)
class Member:
    """One run of a swarm."""

    path: Path
    config: RunConfig


def members_of(folder: Path, overrides: Sequence[str]) -> list[Member]:
    """The runs of a swarm, in the order of the array's indices (that of the names' bytes).

    Raises:
        InputError: no config, one that cannot be read, or two of one run directory.
    """
    paths = sorted(folder.glob("*.yaml"), key=lambda path: path.name.encode())
    if not paths:
        raise InputError(f"{folder} holds no *.yaml: a swarm is a folder with one config for each run.")
    members = [Member(path, load_config(RunConfig, path, list(overrides))) for path in paths]
    taken: dict[Path, Path] = {}
    for member in members:
        run_dir = member.config.run_dir.absolute()
        if run_dir in taken:
            raise InputError(f"{member.path} and {taken[run_dir]} have the same run_dir, {run_dir}. Give each its own.")
        taken[run_dir] = member.path
    return members


def gather(folder: Path, overrides: Sequence[str]) -> Path:
    """Writes ``results.csv`` of what a swarm's runs have on record so far; returns its path.

    Raises:
        InputError: see `members_of`; or a damaged record.
    """
    rows = [_row(member) for member in members_of(folder, overrides)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns.sort(key=lambda name: ("weight:", "loss:").index(name[: name.index(":") + 1]) if ":" in name else -1)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / RESULTS
    replace_file(path, text.getvalue().encode())
    done = sum(bool(row["done"]) for row in rows)
    get_logger().info("%s: %d of %d runs are done", path, done, len(rows))
    return path


def is_gathered(folder: Path, members: Sequence[Member]) -> bool:
    """Whether ``results.csv`` has all these runs to their end."""
    path = folder / RESULTS
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", newline="") as file:
        done = {row["member"] for row in csv.DictReader(file) if row["done"] == "1"}
    return done == {member.path.stem for member in members}


def _row(member: Member) -> dict[str, object]:
    config = member.config
    row: dict[str, object] = {
        "member": member.path.stem,
        "run_dir": str(config.run_dir),
        "step": 0,
        "steps": config.train.steps,
        "done": 0,
    }
    try:
        run = RecordedRun.open(config.run_dir)
    except InputError as problem:
        get_logger().warning("%s has no results: %s", member.path.name, problem)
        return row
    row |= {"step": run.steps, "done": int(run.steps >= config.train.steps)}
    if run.position:
        row |= {f"weight:{name}": weight for name, weight in run_weights(run, "mean").items()}
    losses = run.evaluations[-1]["domain_loss"] if run.evaluations else {}
    return row | {f"loss:{name}": "" if loss is None else loss for name, loss in losses.items()}
