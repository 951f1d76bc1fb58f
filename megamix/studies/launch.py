"""``megamix launch``: one run, DoReMi, a folder of runs, or the preparation of a data set, as jobs of Slurm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamix.core.config import load_config
from megamix.core.errors import InputError
from megamix.data.tokens.manifest import FILE_NAME, TOKENIZER_FILE
from megamix.prepare.documents import find_inputs
from megamix.prepare.merge import shard_note_path
from megamix.prepare.shards import Shard
from megamix.studies.doremi.tasks import submit_doremi
from megamix.studies.runs import absolute, command_job
from megamix.studies.slurm.placement import Resources
from megamix.studies.slurm.submit import submit_or_show
from megamix.studies.swarm.run.collect import collect
from megamix.studies.swarm.tasks import submit_members
from megamix.studies.tasks import Job, Task, is_run_done
from megamix.training.config import RunConfig

ChainName = Literal["train", "doremi", "swarm", "prepare"]


@dataclass(frozen=True)
class PrepareCommand:
    """A `megamix prepare` that is done in shards.

    Attributes:
        options: the values of its arguments, by parameter.
    """

    arguments: Sequence[str]
    options: Mapping[str, Any]


def launch(
    source: str,
    arguments: Sequence[str],
    resources: Resources,
    *,
    chain: ChainName = "train",
    limit: int = 0,
    shards: int | None = None,
    prepare: PrepareCommand | None = None,
    only_gather: bool = False,
    dry_run: bool = False,
) -> str:
    """Submits a run or a chain; what is done or in the queue is not submitted again. Returns what to print.

    Args:
        source: the config; of a swarm, its folder.
        arguments: changes to the config, as of ``megamix train``.
        limit: members of an array that run at a time; 0: no limit.
        shards, prepare: of the chain prepare.
        only_gather: of a swarm, only write the tables of the runs that are done.
        dry_run: submit nothing.

    Raises:
        InputError: a plan that cannot work, or that the cluster refuses; nothing is submitted then.
    """
    for name, given, wanted in (("--shards", shards is not None, "prepare"), ("--gather", only_gather, "swarm")):
        if given and chain != wanted:
            raise InputError(f"{name} goes with --chain {wanted} only.")
    if limit and chain not in ("swarm", "prepare"):
        raise InputError("--limit goes with the arrays of --chain swarm and --chain prepare only.")
    path, overrides = Path(source), list(arguments)
    if only_gather:
        return f"{collect(path, overrides, partial=True)}\n"
    if chain == "doremi":
        return submit_doremi(path, overrides, resources, dry_run=dry_run)
    if chain == "swarm":
        return submit_members(path, overrides, resources, limit, dry_run=dry_run)
    if chain == "prepare":
        if shards is None or prepare is None:
            raise InputError("--chain prepare needs the number of shards. Add --shards N.")
        tasks = _prepare_tasks(prepare, resources, shards, limit)
        return submit_or_show(Path(prepare.options["out"]), tasks, dry_run=dry_run)
    config = load_config(RunConfig, path, overrides)
    job = Job("train.sbatch", (str(path.absolute()), *absolute(overrides)), resources.of_run(config, source))
    return submit_or_show(config.run_dir, [Task("train", lambda: is_run_done(config), job=job)], dry_run=dry_run)


def _prepare_tasks(command: PrepareCommand, resources: Resources, shards: int, limit: int) -> list[Task]:
    """Tokenizer, shards and their merge.

    Raises:
        InputError: text that is not there, or options that the chain sets itself.
    """
    for name, value in (("--shard", command.options["shard"]), ("--tokenizer-only", command.options["tokenizer_only"])):
        if value:
            raise InputError(f"the chain sets {name} itself. Leave it out, and say how many: --shards N.")
    find_inputs(command.options["inputs"])
    out, arguments = Path(command.options["out"]), tuple(command.arguments)
    left = tuple(i for i in range(1, shards + 1) if not shard_note_path(out, Shard(i, shards)).is_file())
    tokenizer = command_job(("prepare", *arguments, "--tokenizer-only"), resources)
    environment = {"MEGAMIX_SHARDS": str(shards)}
    array = Job("prepare.sbatch", arguments, resources.of_process(), left, limit, environment=environment)
    return [
        Task("tokenizer", (out / TOKENIZER_FILE).is_file, job=tokenizer),
        Task("shards", lambda: not left, job=array),
        Task("merge", (out / FILE_NAME).is_file, job=command_job(("merge", str(out)), resources)),
    ]
