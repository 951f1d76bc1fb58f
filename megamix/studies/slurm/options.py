"""Options of the commands that submit to Slurm."""

from __future__ import annotations

from typing import Annotated

import typer

Nodes = Annotated[int | None, typer.Option(min=1, help="Of each job; default: as many as the ranks fill.")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="And ranks on each node.")]
TasksPerNode = Annotated[int | None, typer.Option(min=1, help="Ranks on each node, without GPUs.")]
Time = Annotated[str | None, typer.Option(help="The time limit of each start, for example 24:00:00.")]
Partition = Annotated[str | None, typer.Option(help="The partition.")]
Account = Annotated[str | None, typer.Option(help="The account.")]
Sbatch = Annotated[list[str] | None, typer.Option(metavar="OPTION", help="Any option of sbatch: --sbatch=--qos=high.")]
Limit = Annotated[int, typer.Option(min=0, help="Members of an array that run at a time; 0: all.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print commands and scripts, submit nothing.")]
