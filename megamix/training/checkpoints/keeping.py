"""Keeping: renames in the folder of a run's checkpoints, and which checkpoints stay.

    step_N              a checkpoint
    step_N.partial      being written
    step_N.before       an older step_N, while step_N.partial is renamed
    step_N.removed      being removed

Only rank 0 of a run renames and removes. If a run is killed between two renames,
`megamix.training.checkpoints.store.candidates` still finds every checkpoint; the next start, or the next checkpoint,
clears away the rest (`mend`).
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from megamix.core.files import sync_folder
from megamix.core.log import get_logger
from megamix.training.checkpoints.store import BEFORE, PARTIAL, candidates, misnamed, read_listing, steps_in

REMOVED = ".removed"


def mend(folder: Path) -> None:
    """Completes the renames of a killed run. Must not be called while a checkpoint is being written there.

    Raises:
        OSError: it cannot be done.
    """
    for path in candidates(folder):
        final = path.with_suffix("")
        if path != final:
            os.replace(path, final)
            get_logger().info("%s: completed the rename that a killed run had begun", final)
    for path in steps_in(folder, BEFORE).values():
        _remove(path)
    for path in steps_in(folder, PARTIAL).values():
        get_logger().info("passing over %s: it was not finished, and is removed", path)
        shutil.rmtree(path, ignore_errors=True)
    for suffix in (REMOVED, BEFORE + REMOVED):
        for path in steps_in(folder, suffix).values():
            shutil.rmtree(path, ignore_errors=True)


def give_name(partial: Path) -> Path:
    """Renames a finished ``step_N.partial`` to ``step_N``; an older ``step_N`` stays until then.

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
    """Removes old checkpoints once the one of ``step`` is there.

    Checkpoints of later steps go too: the run was resumed from one before them, because they were damaged or because
    the user said so, and its record continues from there.

    A checkpoint that was saved while steps were left out, or is damaged, takes the place of no other: the weights in it
    may be why. Of the former the newest stays, or as many as are missing from ``keep``.

    Args:
        keep: number of the newest others that stay.
        keep_every: multiples of this stay too; 0 for none.
    """
    found = steps_in(folder)
    sound, after_skips = [], []
    for other, path in sorted(found.items()):
        with suppress(ValueError):
            listing = read_listing(path)
            if misnamed(path, listing) is not None:
                del found[other]  # a copy that somebody made
            elif other <= step:
                (after_skips if listing.after_skips else sound).append(other)
    later = [other for other in found if other > step]
    oldest = sound[-keep] if len(sound) >= keep else 0
    old = [other for other in found if other < oldest or other in after_skips[: -max(1, keep - len(sound))]]
    for other in later:
        get_logger().info("removing %s: the run was resumed from a step before it", found[other])
    for other in [*later, *(other for other in old if not keep_every or other % keep_every)]:
        try:
            _remove(found[other])
        except OSError as problem:
            get_logger().warning("cannot remove %s: %s", found[other], problem.strerror or problem)


def _remove(path: Path) -> None:
    """Removes a directory after renaming it: half of it must not look like a damaged checkpoint."""
    gone = path.with_name(path.name + REMOVED)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
