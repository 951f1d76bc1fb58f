"""The folder of a run's checkpoints: by which renames one gets its name, which stay, and what a killed run leaves.

    step_N              a checkpoint
    step_N.partial      one that is being written
    step_N.before       the step_N that was there, while step_N.partial gets its name
    step_N.removed      one that is being removed

Only rank 0 of a run renames and removes. A run that is killed between two of the renames below leaves a folder in which
`megamix.training.checkpoints.store.candidates` still finds each checkpoint that was there, and the next start, or the
next checkpoint, clears away the rest (`mend`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megamix.core.files import sync_folder
from megamix.core.log import get_logger
from megamix.training.checkpoints.store import BEFORE, PARTIAL, candidates, steps_in

REMOVED = ".removed"


def mend(folder: Path) -> None:
    """Finishes what a killed run left half done. Not to be called while a checkpoint is being written there.

    Raises:
        OSError: it cannot be done.
    """
    for path in candidates(folder):
        final = path.with_suffix("")
        if path != final:
            os.replace(path, final)
            get_logger().info("%s has its name again, which the run before was killed in giving it", final)
    for path in steps_in(folder, BEFORE).values():
        _remove(path)
    for path in steps_in(folder, PARTIAL).values():
        get_logger().info("passing over %s: it was not finished, and is removed", path)
        shutil.rmtree(path, ignore_errors=True)
    for suffix in (REMOVED, BEFORE + REMOVED):
        for path in steps_in(folder, suffix).values():
            shutil.rmtree(path, ignore_errors=True)


def give_name(partial: Path) -> Path:
    """Makes a finished ``step_N.partial`` the checkpoint ``step_N``; one of that name from before is there until then.

    Raises:
        OSError: it cannot be done.
    """
    final = partial.with_suffix("")
    before = final.with_suffix(BEFORE)
    if final.exists():
        os.replace(final, before)
    os.replace(partial, final)
    sync_folder(final.parent)
    if before.exists():
        _remove(before)
    return final


def drop_old(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Removes the checkpoints that need not stay, now that there is one of ``step``.

    Those of later steps are of a course that the run has left: it was resumed from a checkpoint before them, because
    they were damaged or because the user said so, and its record goes on from there.

    Args:
        keep: how many of the newest stay.
        keep_every: those of steps that divide by this stay too; 0 for none.
    """
    found = steps_in(folder)
    later = [other for other in found if other > step]
    earlier = sorted(other for other in found if other <= step)[:-keep]
    for other in later:
        get_logger().info("removing %s: the run was resumed from a step before it", found[other])
    for other in [*later, *(other for other in earlier if not keep_every or other % keep_every)]:
        try:
            _remove(found[other])
        except OSError as problem:
            get_logger().warning("cannot remove %s: %s", found[other], problem.strerror or problem)


def _remove(path: Path) -> None:
    """Removes a directory, under another name first: half of it must not look like a damaged checkpoint."""
    gone = path.with_name(path.name + REMOVED)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
