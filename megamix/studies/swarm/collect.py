"""The tables of a swarm (`megamix.studies.swarm.fit.tables`): the mixture each run was trained on, and its metrics.

    run,name,index,web,code      run,name,index,loss:web,loss:code
    0000,0000,0,0.7,0.3          0000,0000,0,3.1,2.2

A run's ratios are the mean of its weights over the samples trained on: those of its config, unless bounds there
(data.max_epochs, ...) or a mixer changed them. Those of an update are over its virtual domains. ``loss:DOMAIN`` is the
validation loss of its last evaluation, in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megamix.core.config import validate
from megamix.core.config_files import read_yaml
from megamix.core.errors import InputError
from megamix.core.files import parse_json, read_csv, read_text
from megamix.core.log import get_logger
from megamix.core.text import listed
from megamix.studies.runs import Member, members_of
from megamix.studies.swarm.config import MetricsConfig
from megamix.studies.swarm.fit.tables import write_metrics, write_ratios
from megamix.studies.swarm.propose.reuse import Update
from megamix.training.records.mean_weights import run_weights
from megamix.training.records.recorded_run import RecordedRun

RATIOS = "ratios.csv"
METRICS = "metrics.csv"
CONFIG = "swarm.yaml"
"""The resolved config of a swarm, in its directory."""
FOLDER = "members"


def place_of_tables(folder: Path) -> Path:
    """The directory of the swarm whose members a folder holds; of other folders the folder itself."""
    parent = folder.absolute().parent
    return parent if folder.name == FOLDER and (parent / CONFIG).is_file() else folder


def collect(
    folder: Path, overrides: Sequence[str], metrics: MetricsConfig | None = None, *, partial: bool = False
) -> Path:
    """Writes ratios.csv and metrics.csv of the runs of a folder of configs.

    Args:
        metrics: None: those in the config of the swarm.
        partial: of the runs that are done, where others are not.

    Returns:
        The folder of the two files.

    Raises:
        InputError: see `members_of`; runs that are not done; results that cannot be read, or are not of one kind.
    """
    members = members_of(folder, overrides)
    out = place_of_tables(folder)
    metrics = metrics or _metrics_of(out)
    missing = {member.name: _state(member) for member in members if not member.is_done}
    if missing:
        shown = listed(f"{name} ({state})" for name, state in missing.items())
        if not partial or len(missing) == len(members):
            raise InputError(
                f"{len(missing)} of the {len(members)} runs of {folder} are not done: {shown}. Run them (`megamix swarm run`)"
                + (", or take the others with --partial." if len(missing) < len(members) else ".")
            )
        get_logger().warning("%d of %d runs are not done and left out: %s", len(missing), len(members), shown)
    done = [member for member in members if member.name not in missing]
    runs = [RecordedRun.open(member.config.run_dir) for member in done]
    ratios = [run_weights(run, "mean") for run in runs]
    values = [_metrics(run, metrics) for run in runs]
    names = [member.name for member in done]
    domains, columns = _same_keys(ratios, names, "domains"), _same_keys(values, names, "metrics")
    weights = np.array([[row[name] for name in domains] for row in ratios])
    update = Update.open(out)
    if update is not None:
        weights = update.contract(np.array([[row[name] for name in update.domains] for row in ratios]))
        domains = list(update.virtual)
    write_ratios(out / RATIOS, names, domains, weights)
    write_metrics(out / METRICS, names, columns, np.array([[row[name] for name in columns] for row in values]))
    get_logger().info("%s and %s of %d of %d runs are in %s", RATIOS, METRICS, len(done), len(members), out)
    return out


def is_collected(folder: Path, members: Sequence[Member]) -> bool:
    """Whether the tables have all these runs."""
    path = place_of_tables(folder) / METRICS
    if not path.is_file():
        return False
    try:
        (_, header), *rows = read_csv(path)
        run = header.index("run")
        return {fields[run] for _, fields in rows} == {member.name for member in members}
    except (InputError, ValueError, IndexError):  # cut off: to be made anew
        return False


def _metrics_of(swarm: Path) -> MetricsConfig:
    """The metrics in a swarm's config; the default where there is none."""
    path = swarm / CONFIG
    section = read_yaml(path).get("swarm", {}) if path.is_file() else {}
    return validate(MetricsConfig, section.get("metrics", {}), f"{path}, swarm.metrics")


def _state(member: Member) -> str:
    try:
        run = RecordedRun.open(member.config.run_dir)
    except InputError:
        return "not begun"
    return f"{run.steps} of {member.config.train.steps} steps"


def _metrics(run: RecordedRun, config: MetricsConfig) -> dict[str, float]:
    """{metric: value}; NaN where a domain has no loss."""
    found: dict[str, float] = {}
    if not run.evaluations or run.evaluations[-1]["step"] < run.config.train.steps:
        raise InputError(
            f"the run {run.run_dir} has no evaluation after its last step on record: its metrics.jsonl is cut off. Delete "
            "the run and make it again."
        )
    losses = run.evaluations[-1]["domain_loss"]
    if config.validation:
        found |= {f"loss:{name}": math.nan if loss is None else float(loss) for name, loss in losses.items()}
    if config.mean:
        found["loss"] = math.nan if None in losses.values() else float(np.mean(list(losses.values())))
    return found | (_read_results(run.run_dir / config.file) if config.file else {})


def _read_results(path: Path) -> dict[str, float]:
    """A user's own results of a run."""
    lost = "swarm.metrics.file names a file in every run's directory: write it there, then collect again."
    try:
        if path.suffix == ".csv":
            (_, header), *rows = read_csv(path, lost=lost)
            metric, value = header.index("metric"), header.index("value")
            found = {fields[metric]: float(fields[value]) for _, fields in rows}
        else:
            found = {str(name): float(value) for name, value in parse_json(read_text(path, lost=lost)).items()}
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is no table of results ({error}): expected JSON {{metric: number}}, or CSV with the columns metric "
            "and value."
        ) from error
    return found


def _same_keys(rows: Sequence[dict[str, float]], names: Sequence[str], what: str) -> list[str]:
    """The keys that all rows have; raises InputError if they differ."""
    first = list(rows[0])
    for row, name in zip(rows, names, strict=True):
        odd = sorted(set(row) ^ set(first))
        if odd:
            raise InputError(
                f"the runs {names[0]} and {name} do not have the same {what}: only one of them has {', '.join(odd[:8])}. "
                "A swarm's runs are evaluated alike, on the same domains."
            )
    return first
