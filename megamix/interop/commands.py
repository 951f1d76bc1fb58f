"""What ``megamix blend export`` does with its options."""

from __future__ import annotations

from pathlib import Path

from megamix.errors import InputError
from megamix.interop.export import export_blend, is_run, write_text
from megamix.interop.stages import cuts_at, equal_cuts, export_phases
from megamix.records.recorded_run import RecordedRun


def export_to(
    path: Path, format: str, which: str | None, weights: Path | None, out: Path | None
) -> tuple[list[str], list[str]]:
    """Writes one mixture to ``out``, or hands its text out.

    Returns:
        Lines to print, and notes.

    Raises:
        InputError: see `export_blend`.
    """
    blend = export_blend(path, format, which, weights)
    if out is None:
        return [blend.text.rstrip("\n")], blend.notes
    write_text(out, blend.text)
    return [str(out)], blend.notes


def export_phases_to(
    path: Path,
    format: str,
    which: str | None,
    weights: Path | None,
    stages: int | None,
    stages_at: str | None,
    out: Path | None,
) -> tuple[list[str], list[str]]:
    """Writes phases into the folder ``out``.

    Returns:
        Lines to print, and notes.

    Raises:
        InputError: see `export_phases`, or options that do not go together.
    """
    if stages is not None and stages_at is not None:
        raise InputError("--stages and --stages-at are both given. Give one of them.")
    option = "--stages" if stages is not None else "--stages-at"
    if not is_run(path):
        raise InputError(f"{option} is for runs, but {path} is a data set, whose weights do not change. Leave it out.")
    if which is not None or weights is not None:
        other = f"--which {which}" if which is not None else "--weights"
        raise InputError(f"{option} exports the mean weights of each phase; {other} does not go with it. Leave it out.")
    if out is None:
        raise InputError(f"{option} writes several files. Give their folder with --out.")
    run = RecordedRun.open(path)
    cuts = equal_cuts(run, stages) if stages is not None else cuts_at(run, stages_at or "")
    written, notes = export_phases(run, cuts, format, out)
    return [str(path) for path in written], notes
