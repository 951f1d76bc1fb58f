"""``megamix launch``: one run, DoReMi, a folder of runs, or the preparation of a data set, as jobs of Slurm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megamix.core.errors import InputError
from megamix.core.paths import argument, expand
from megamix.studies.slurm.resources import DryRun, Limit, PlanOnly, Resources, slurm_options

if TYPE_CHECKING:
    from megamix.studies.tasks import Task

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE | FILE.yaml]...",
        help="Keys of the config to change, for example train.steps=100, or files of them.",
    ),
]


@slurm_options
def launch(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="CONFIG | FOLDER", help="A YAML file; of a swarm, a folder with one for each run.")
    ],
    arguments: Overrides = None,
    chain: Annotated[
        Literal["train", "doremi", "swarm", "prepare"], typer.Option(help="What to submit; train: one run.")
    ] = "train",
    limit: Limit = 0,
    shards: Annotated[int | None, typer.Option(min=2, help="Of the chain prepare.")] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="Of a swarm: only write its ratios.csv and metrics.csv.")
    ] = False,
    dry_run: DryRun = False,
    plan_only: PlanOnly = False,
    *,
    resources: Resources,
) -> None:
    """Submit a run, or a chain of runs, to Slurm. What is done or in the queue is not submitted again.

    Example: megamix launch configs/pile_1b_odm.yaml --nodes 1 --gpus-per-node 8 --time 24:00:00

    --chain doremi CONFIG: the tasks of `megamix doremi`; --chain swarm FOLDER: one run for each config, as an array;
    --chain prepare --shards 8 -- INPUTS... --out OUT [...]: `megamix prepare` in shards, and their merge.
    """
    from megamix.studies.doremi.tasks import submit_doremi
    from megamix.studies.slurm.submit import submit_or_show
    from megamix.studies.swarm.collect import collect
    from megamix.studies.swarm.tasks import submit_members

    for name, given, wanted in (("--shards", shards is not None, "prepare"), ("--gather", gather, "swarm")):
        if given and chain != wanted:
            raise InputError(f"{name} goes with --chain {wanted} only.")
    if limit and chain not in ("swarm", "prepare"):
        raise InputError("--limit goes with the arrays of --chain swarm and --chain prepare only.")
    dry_run = dry_run or plan_only
    path, overrides = Path(source if chain == "prepare" else expand(source)), arguments or []
    if gather:
        said = f"{collect(path, overrides, partial=True)}\n"
    elif chain == "doremi":
        said = submit_doremi(path, overrides, resources, dry_run=dry_run, check_data=not plan_only)
    elif chain == "swarm":
        said = submit_members(path, overrides, resources, limit, dry_run=dry_run, check_data=not plan_only)
    elif chain == "prepare":
        if shards is None:
            raise InputError("--chain prepare needs the number of shards. Add --shards N.")
        root = context.find_root()
        command: Any = root.command
        options = command.get_command(root, "prepare").make_context("prepare", [source, *overrides]).params
        options["out"] = Path(expand(str(options["out"])))
        if not plan_only:
            from megamix.prepare.documents import find_inputs

            find_inputs(options["inputs"], options["out"], options["text_files"] or ())
        tasks = _prepare_tasks((source, *overrides), options, resources, shards, limit)
        said = submit_or_show(options["out"], tasks, dry_run=dry_run)
    else:
        folder, task = _train_task(path, overrides, resources, check_data=not plan_only)
        said = submit_or_show(folder, [task], dry_run=dry_run)
    typer.echo(said, nl=False)


def _train_task(path: Path, overrides: list[str], resources: Resources, *, check_data: bool) -> tuple[Path, Task]:
    """A run, and its directory."""
    from megamix.core.config import load_config
    from megamix.studies.runs import absolute
    from megamix.studies.tasks import Job, Task, is_run_done
    from megamix.training.config import RunConfig

    config = load_config(RunConfig, path, overrides)
    options = resources.of_run(config, str(path), check_data=check_data)
    job = Job("train.sbatch", (argument(path), *absolute(overrides)), options)
    return config.run_dir, Task("train", lambda: is_run_done(config), job=job)


def _prepare_tasks(
    arguments: tuple[str, ...], options: Mapping[str, Any], resources: Resources, shards: int, limit: int
) -> list[Task]:
    """Tokenizer, shards and their merge."""
    from megamix.data.tokens.manifest import FILE_NAME, TOKENIZER_FILE
    from megamix.prepare.merge import shard_note_path
    from megamix.prepare.shards import Shard
    from megamix.studies.runs import command_job
    from megamix.studies.tasks import Job, Task

    for name, value in (("--shard", options["shard"]), ("--tokenizer-only", options["tokenizer_only"])):
        if value:
            raise InputError(f"the chain sets {name} itself. Leave it out, and say how many: --shards N.")
    out: Path = options["out"]
    left = tuple(i for i in range(1, shards + 1) if not shard_note_path(out, Shard(i, shards)).is_file())
    tokenizer = command_job(("prepare", *arguments, "--tokenizer-only"), resources)
    environment = {"MEGAMIX_SHARDS": str(shards)}
    array = Job("prepare.sbatch", arguments, resources.of_process(), left, limit, environment=environment)
    return [
        Task("tokenizer", (out / TOKENIZER_FILE).is_file, job=tokenizer),
        Task("shards", job=array),
        Task("merge", (out / FILE_NAME).is_file, job=command_job(("merge", argument(out)), resources)),
    ]
