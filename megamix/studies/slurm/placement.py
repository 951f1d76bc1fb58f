"""What is asked of the cluster, and how the ranks of a run are spread over it."""

from __future__ import annotations

from dataclasses import dataclass

from megamix.core.errors import InputError
from megamix.training.config import RunConfig
from megamix.training.plan import check_layout


@dataclass(frozen=True)
class Resources:
    """The options of ``megamix launch`` that Slurm is told.

    Attributes:
        nodes: of each job; None: as many as the ranks fill.
        gpus_per_node: also the ranks on a node.
        tasks_per_node: the ranks on a node, where there are no GPUs.
        extra: further options of sbatch, as they stand.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()

    def place(self, config: RunConfig, source: str) -> tuple[int, int]:
        """(nodes, ranks on each) of a run.

        Args:
            source: of the config, for messages.

        Raises:
            InputError: nodes and ranks that are not those of the config's layout.
        """
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

    def options(self, nodes: int, tasks: int | None) -> list[str]:
        """The options of sbatch for a job.

        Args:
            tasks: ranks on a node; None: one process, without GPUs.
        """
        found = [f"--nodes={nodes}"]
        if tasks is not None:
            found.append(f"--ntasks-per-node={tasks}")
            if self.gpus_per_node is not None:
                found.append(f"--gpus-per-node={self.gpus_per_node}")
        asked = {"time": self.time, "partition": self.partition, "account": self.account}
        return [*found, *(f"--{name}={value}" for name, value in asked.items() if value is not None), *self.extra]

    def _ranks_per_node(self) -> int | None:
        gpus, tasks = self.gpus_per_node, self.tasks_per_node
        if gpus is not None and tasks is not None and gpus != tasks:
            raise InputError(
                f"--gpus-per-node is {gpus} and --tasks-per-node {tasks}: a rank has one GPU. Give one of the two."
            )
        return gpus if gpus is not None else tasks
