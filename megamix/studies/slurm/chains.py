"""The chains: one run, DoReMi, a swarm of proxies, and the preparation of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamix.core.config import load_config
from megamix.core.errors import InputError
from megamix.data.reference_losses import FILE_NAME as CACHE
from megamix.data.tokens.manifest import FILE_NAME, TOKENIZER_FILE
from megamix.prepare.documents import find_inputs
from megamix.prepare.merge import shard_record_path
from megamix.prepare.shards import Shard
from megamix.studies.doremi.steps import WEIGHTS, read_job
from megamix.studies.slurm.placement import Resources
from megamix.studies.slurm.steps import Chain, Step
from megamix.studies.swarm.run.collect import is_collected, place_of_tables
from megamix.studies.swarm.run.members import is_done, members_of
from megamix.training.config import RunConfig
from megamix.training.plan import check_layout, make_data_plan


def train_chain(config_path: Path, overrides: Sequence[str], resources: Resources) -> Chain:
    """One run.

    Raises:
        InputError: a config that cannot be read, data that is not there, or a layout that does not fit the job.
    """
    config = load_config(RunConfig, config_path, list(overrides))
    options = _options(config, str(config_path), resources)
    arguments = (str(config_path.absolute()), *_absolute(overrides))
    return Chain(config.run_dir, [Step("train", "train.sbatch", arguments, options, done=is_done(config))])


def doremi_chain(config_path: Path, overrides: Sequence[str], resources: Resources) -> Chain:
    """The steps of DoReMi; writes the configs of their runs.

    Raises:
        InputError: as `train_chain`, and iterated rounds, of which nobody knows beforehand how many there will be.
    """
    job = read_job(config_path, list(overrides))
    if job.steps.rounds > 1:
        raise InputError(
            f"{config_path}: doremi.rounds is {job.steps.rounds}, and a chain of jobs has one round. Take doremi.rounds=1, "
            "then a chain with mixture: {file: RUN/weights.json} in another run_dir for the next."
        )
    folder = job.run_dir.absolute()
    command = ("doremi", str(config_path.absolute()), *_absolute(overrides))
    steps: list[Step] = []

    def add(name: str, script: str, arguments: tuple[str, ...], options: tuple[str, ...], done: bool) -> None:
        # What follows from a step that is not done is to be made again.
        steps.append(Step(name, script, arguments, options, done and all(step.done for step in steps)))

    def add_run(name: str) -> tuple[str, ...]:
        path = folder / f"{name}.yaml"
        config = load_config(RunConfig, path)
        # The weights of a target run are not there yet; the data of all was looked at when their configs were written.
        options = _options(config, str(path), resources, check_data=False)
        add(name, "train.sbatch", (str(path),), options, is_done(config))
        return options

    if job.needs_reference:
        options = add_run("reference")
        losses = (str(folder / "reference"), "--out", str(folder / "cache"), "--for", str(folder / "proxy.yaml"))
        add("cache", "reference.sbatch", losses, options, (folder / "cache" / CACHE).is_file())
    add_run("proxy")
    one = tuple(resources.options(1, None))
    add("weights", "command.sbatch", (*command, "--only", "weights"), one, (folder / WEIGHTS).is_file())
    if job.steps.target is not None:
        add_run("target")
    return Chain(folder, steps)


def swarm_chain(folder: Path, overrides: Sequence[str], resources: Resources, limit: int) -> Chain:
    """An array of runs, one for each config of a folder, and the gathering of their results.

    Raises:
        InputError: as `train_chain`, for any of them; members that need different numbers of ranks, or share a run_dir.
    """
    members = members_of(folder, overrides)
    options = [_options(member.config, str(member.path), resources) for member in members]
    odd = next((i for i, other in enumerate(options) if other != options[0]), None)
    if odd is not None:
        raise InputError(
            f"{members[odd].path} is for {' '.join(options[odd][:2])}, and {members[0].path} for {' '.join(options[0][:2])}: "
            "the jobs of an array are of one size. Put them into two folders."
        )
    left = tuple(index for index, member in enumerate(members) if not member.is_done)
    folder = folder.absolute()
    arguments = (str(folder), *_absolute(overrides))
    gather = ("launch", *arguments, "--chain", "swarm", "--gather")
    gathered = not left and is_collected(folder, members)
    return Chain(
        place_of_tables(folder),
        [
            Step("swarm", "swarm.sbatch", arguments, options[0], done=not left, members=left, limit=limit),
            # Of those that have ended well, too, where others have not.
            Step("results", "command.sbatch", gather, tuple(resources.options(1, None)), gathered, after="afterany"),
        ],
    )


@dataclass(frozen=True)
class PrepareJob:
    """A `megamix prepare` to be done in shards.

    Attributes:
        arguments: of the command.
        options: what they say, by parameter.
    """

    arguments: Sequence[str]
    options: Mapping[str, Any]


def prepare_chain(job: PrepareJob, resources: Resources, shards: int, limit: int) -> Chain:
    """Tokenizer, shards and their merge.

    Raises:
        InputError: text that is not there, or options that the chain sets itself.
    """
    for name, value in (("--shard", job.options["shard"]), ("--tokenizer-only", job.options["tokenizer_only"])):
        if value:
            raise InputError(f"the chain sets {name} itself. Leave it out, and say how many: --shards N.")
    find_inputs(job.options["inputs"])
    out = Path(job.options["out"])
    one = tuple(resources.options(1, None))
    left = tuple(i for i in range(1, shards + 1) if not shard_record_path(out, Shard(i, shards)).is_file())
    done = (out / FILE_NAME).is_file() and not left
    arguments = tuple(job.arguments)
    told = {"MEGAMIX_SHARDS": str(shards)}
    tokenizer = ("prepare", *arguments, "--tokenizer-only")
    return Chain(
        out,
        [
            Step("tokenizer", "command.sbatch", tokenizer, one, (out / TOKENIZER_FILE).is_file()),
            Step("shards", "prepare.sbatch", arguments, one, not left, left, limit, environment=told),
            Step("merge", "command.sbatch", ("merge", str(out)), one, done),
        ],
    )


def _options(config: RunConfig, source: str, resources: Resources, *, check_data: bool = True) -> tuple[str, ...]:
    """The options of sbatch for a run, once its plan is known to work.

    Finds what `megamix doctor` does, but for the machine, which is another than this.
    """
    nodes, tasks = resources.place(config, source)
    if check_data:
        _, data_size = check_layout(config, nodes * tasks)
        data = make_data_plan(config, data_size, verify=False)
        model = config.model.with_vocabulary(data.vocab_size)
        check_layout(config.model_copy(update={"model": model}), nodes * tasks)
    return tuple(resources.options(nodes, tasks))


def _absolute(overrides: Sequence[str]) -> list[str]:
    """Files of overrides by their whole path."""
    return [item if "=" in item else str(Path(item).absolute()) for item in overrides]
