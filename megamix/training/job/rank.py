"""Life of a rank in any job: joining, the watchdog, the lock on the folder, leaving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megamix.core.errors import Preempted
from megamix.engines.config import EngineConfig
from megamix.training.config import WatchdogConfig
from megamix.training.job.lock import RunLock
from megamix.training.job.watchdog import Watchdog


def run_rank(engine: EngineConfig, work: Callable[[], None]) -> None:
    """Joins the job's process group, does ``work``, and leaves.

    Raises:
        Preempted: ``work`` was asked to stop.
        Exception: any other error; the process group is left as it is, as other ranks may wait in it.
    """
    import torch.distributed as dist

    from megamix.engines.choose import start_distributed

    start_distributed(engine)
    preempted = None
    try:
        work()
    except Preempted as stop:
        preempted = stop
    # All ranks end in the same way, so that none is missed by another on its way out.
    dist.barrier()
    dist.destroy_process_group()
    if preempted is not None:
        raise preempted


@contextmanager
def watched(config: WatchdogConfig, folder: Path) -> Iterator[Watchdog]:
    """A block in which the ranks of the process group watch each other, and rank 0 holds the lock on ``folder``.

    Raises:
        InputError: another job works there.
    """
    import torch.distributed as dist

    watchdog = Watchdog(config, dist.get_rank(), dist.get_world_size())
    watchdog.start()
    try:
        with RunLock(folder) if dist.get_rank() == 0 else nullcontext():
            yield watchdog
    except BaseException as error:
        watchdog.fail(error)
        raise
    watchdog.close()
