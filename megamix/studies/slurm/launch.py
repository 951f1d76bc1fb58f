"""From the command's options to a chain, and on to Slurm or the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megamix.core.errors import InputError
from megamix.studies.slurm.chains import PrepareJob, doremi_chain, prepare_chain, swarm_chain, train_chain
from megamix.studies.slurm.placement import Resources
from megamix.studies.slurm.steps import Chain, show, submit
from megamix.studies.swarm.run.collect import collect

ChainName = Literal["train", "doremi", "swarm", "prepare"]


def launch(
    source: str,
    arguments: Sequence[str],
    resources: Resources,
    *,
    chain: ChainName = "train",
    limit: int = 0,
    shards: int | None = None,
    prepare: PrepareJob | None = None,
    only_gather: bool = False,
    dry_run: bool = False,
) -> str:
    """Submits a run or a chain; what is done or in the queue is not submitted again.

    Args:
        source: the config; of a swarm, its folder.
        arguments: changes to the config, as of ``megamix train``.
        limit: members of an array that run at a time; 0: no limit.
        shards, prepare: of the chain prepare.
        only_gather: of a swarm, only write its tables, of the runs that are done.
        dry_run: submit nothing.

    Returns:
        What there is to print.

    Raises:
        InputError: a plan that cannot work, or one that the cluster refuses; nothing is submitted then.
    """
    for name, given, wanted in (("--shards", shards is not None, "prepare"), ("--gather", only_gather, "swarm")):
        if given and chain != wanted:
            raise InputError(f"{name} goes with --chain {wanted} only.")
    if limit and chain not in ("swarm", "prepare"):
        raise InputError("--limit goes with the arrays of --chain swarm and --chain prepare only.")
    if only_gather:
        return f"{collect(Path(source), arguments, partial=True)}\n"
    made = _chain(source, arguments, resources, chain, limit, shards, prepare)
    if dry_run:
        return show(made)
    submit(made)
    return ""


def _chain(
    source: str,
    arguments: Sequence[str],
    resources: Resources,
    chain: ChainName,
    limit: int,
    shards: int | None,
    prepare: PrepareJob | None,
) -> Chain:
    if chain == "doremi":
        return doremi_chain(Path(source), arguments, resources)
    if chain == "swarm":
        return swarm_chain(Path(source), arguments, resources, limit)
    if chain == "prepare":
        if shards is None or prepare is None:
            raise InputError("--chain prepare needs the number of shards. Add --shards N.")
        return prepare_chain(prepare, resources, shards, limit)
    return train_chain(Path(source), arguments, resources)
