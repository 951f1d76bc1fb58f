"""Resources of a job: the options of commands that submit, and the nodes and ranks of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamix.core.errors import InputError
from megamix.core.text import plural

if TYPE_CHECKING:
    from megamix.training.config import RunConfig

OPTIONS = {
    "nodes": (int, typer.Option(min=1, help="Of each Slurm job; default: as many as the ranks fill.")),
    "gpus_per_node": (int, typer.Option(min=1, help="And ranks on each node.")),
    "tasks_per_node": (int, typer.Option(min=1, help="Ranks on each node, without GPUs.")),
    "cpus_per_task": (int, typer.Option(min=1, help="CPUs of each rank; default: engine.threads, or with GPUs 4.")),
    "mem": (str, typer.Option(help="Memory of each node, for example 200G; 0: all of it.")),
    "exclusive": (bool, typer.Option("--exclusive", help="Whole nodes, with all their CPUs.")),
    "time": (str, typer.Option(help="The time limit of each start, for example 24:00:00.")),
    "partition": (str, typer.Option(help="The partition.")),
    "account": (str, typer.Option(help="The account.")),
    "sbatch": (list[str], typer.Option(metavar="OPTION", help="Any option of sbatch: --sbatch=--qos=high.")),
}
GPU_RANK_CPUS = 4
"""CPUs of a rank with a GPU: its own thread, and those that load, mix and save. Slurm's own default is one."""
Limit = Annotated[int, typer.Option(min=0, help="Members of an array that run at a time; 0: all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print commands and scripts, submit nothing.")]
PlanOnly = Annotated[
    bool, typer.Option("--plan-only", help="The same without looking for the data, which may not be there yet.")
]
Slurm = Annotated[bool, typer.Option("--slurm", help="Submit all tasks as jobs that wait for each other.")]


@dataclass(frozen=True)
class Resources:
    """Resources of each job; the attributes are `OPTIONS`."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    exclusive: bool | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    sbatch: Sequence[str] | None = None

    def of_run(self, config: RunConfig, source: str, *, check_data: bool = True) -> tuple[str, ...]:
        """Options of sbatch for a run, after a check of its plan (but not of the machine, which is another one).

        Args:
            source: of the config, for messages.

        Raises:
            InputError: data that is not there, or nodes and ranks that do not fit the layout.
        """
        from megamix.training.plan import check_layout, make_data_plan

        nodes, tasks = self._place(config, source)
        if check_data:
            _, data_size = check_layout(config, nodes * tasks)
            data = make_data_plan(config, data_size, verify=False)
            model = config.model.with_vocabulary(data.vocab_size)
            check_layout(config.model_copy(update={"model": model}), nodes * tasks)
        gpus = [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        cpus = self.cpus_per_task or config.engine.threads or (GPU_RANK_CPUS if gpus else None)
        return (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", *gpus, *self._common(cpus))

    def of_process(self) -> tuple[str, ...]:
        """Options of sbatch for one process, without GPUs."""
        return ("--nodes=1", *self._common(self.cpus_per_task))

    def arguments(self) -> list[str]:
        """Options of ``megamix`` that say these resources again."""
        given = {name.replace("_", "-"): getattr(self, name) for name in OPTIONS if name != "sbatch"}
        named = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items() if value]
        return [*named, *(f"--sbatch={option}" for option in self.sbatch or ())]

    def refuse_without_slurm(self, only_here: str | None = None, *, dry_run: bool, slurm: bool) -> None:
        """Raises InputError for options of a Slurm job without ``--slurm``, and for --only with it."""
        given = [*self.arguments(), *(["--dry-run"] if dry_run else [])]
        if given and not slurm:
            raise InputError(f"{given[0]} is an option of a Slurm job, and this command runs here. Add --slurm.")
        if only_here is not None and slurm:
            raise InputError(f"--only {only_here} runs here, and --slurm submits all that is not done. Leave out one.")

    def _common(self, cpus: int | None) -> list[str]:
        named = {
            "cpus-per-task": cpus,
            "mem": self.mem,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
        }
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*given, *(["--exclusive"] if self.exclusive else []), *(self.sbatch or ())]

    def _place(self, config: RunConfig, source: str) -> tuple[int, int]:
        """(nodes, ranks on each) of a run."""
        from megamix.training.plan import check_layout

        per_node = self._ranks_per_node()
        needed = config.engine.world_size()
        nodes = self.nodes
        if nodes is None:
            nodes = 1 if per_node is None else -(-needed // per_node)
        if per_node is None:
            per_node = max(1, needed // nodes)
        try:
            check_layout(config, nodes * per_node)
        except InputError as error:
            raise InputError(
                f"{source} on {plural(nodes, 'node')} of {plural(per_node, 'rank')}: {error} (--nodes, --gpus-per-node, --tasks-per-node)"
            ) from error
        return nodes, per_node

    def _ranks_per_node(self) -> int | None:
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        if gpus is not None and tasks is not None and gpus != tasks:
            raise InputError(
                f"--gpus-per-node is {gpus} and --tasks-per-node {tasks}: a rank has one GPU. Give one of the two."
            )
        return gpus if gpus is not None else tasks


def slurm_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `OPTIONS` to a command of typer, which gets them as ``resources``."""
    own = inspect.signature(command, eval_str=True).parameters
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
        for name, (kind, option) in OPTIONS.items()
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        resources = Resources(**{name: given.pop(name) for name in OPTIONS})
        command(**given, resources=resources)

    parameters = [*(each.replace(kind=added[0].kind) for name, each in own.items() if name != "resources"), *added]
    wrapped.__dict__["__signature__"] = inspect.Signature(parameters)
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
    return wrapped
