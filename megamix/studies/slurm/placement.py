"""Resources of a job, and the nodes and ranks of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megamix.core.errors import InputError
from megamix.training.config import RunConfig
from megamix.training.plan import check_layout, make_data_plan


@dataclass(frozen=True)
class Resources:
    """Resources of a job, as the options of ``megamix launch`` say them.

    Attributes:
        nodes: of each job; None: as many as the ranks fill.
        gpus_per_node: also the ranks on a node.
        tasks_per_node: the ranks on a node, where there are no GPUs.
        extra: further options of sbatch.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()

    def of_run(self, config: RunConfig, source: str, *, check_data: bool = True) -> tuple[str, ...]:
        """Options of sbatch for a run, after a check of its plan (but not of the machine, which is another one).

        Args:
            source: of the config, for messages.

        Raises:
            InputError: data that is not there, or nodes and ranks that do not fit the layout.
        """
        nodes, tasks = self._place(config, source)
        if check_data:
            _, data_size = check_layout(config, nodes * tasks)
            data = make_data_plan(config, data_size, verify=False)
            model = config.model.with_vocabulary(data.vocab_size)
            check_layout(config.model_copy(update={"model": model}), nodes * tasks)
        gpus = [] if self.gpus_per_node is None else [f"--gpus-per-node={self.gpus_per_node}"]
        return (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", *gpus, *self._common())

    def of_process(self) -> tuple[str, ...]:
        """Options of sbatch for one process, without GPUs."""
        return ("--nodes=1", *self._common())

    def arguments(self) -> tuple[str, ...]:
        """Options of ``megamix`` that say these resources again."""
        counts = {"nodes": self.nodes, "gpus-per-node": self.gpus_per_node, "tasks-per-node": self.tasks_per_node}
        given = [f"--{name}={value}" for name, value in counts.items() if value is not None]
        named = [f"--{name}={value}" for name, value in self._named().items()]
        return (*given, *named, *(f"--sbatch={option}" for option in self.extra))

    def refuse_without_slurm(self, dry_run: bool) -> None:
        """Raises InputError for options of a Slurm job where nothing is submitted."""
        given = [*self.arguments(), *(["--dry-run"] if dry_run else [])]
        if given:
            raise InputError(f"{given[0]} is an option of a Slurm job, and this command runs here. Add --slurm.")

    def _named(self) -> dict[str, str]:
        named = {"time": self.time, "partition": self.partition, "account": self.account}
        return {name: value for name, value in named.items() if value is not None}

    def _common(self) -> list[str]:
        return [*(f"--{name}={value}" for name, value in self._named().items()), *self.extra]

    def _place(self, config: RunConfig, source: str) -> tuple[int, int]:
        """(nodes, ranks on each) of a run."""
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
                f"{source} on {nodes} nodes of {per_node} ranks: {error} (--nodes, --gpus-per-node, --tasks-per-node)"
            ) from error
        return nodes, per_node

    def _ranks_per_node(self) -> int | None:
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        if gpus is not None and tasks is not None and gpus != tasks:
            raise InputError(
                f"--gpus-per-node is {gpus} and --tasks-per-node {tasks}: a rank has one GPU. Give one of the two."
            )
        return gpus if gpus is not None else tasks
