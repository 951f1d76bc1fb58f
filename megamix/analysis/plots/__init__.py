"""``megamix plot``: PNGs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from megamix.analysis.labels import run_names
from megamix.analysis.movers import top_movers
from megamix.analysis.plots.drawing import STYLE, save_figure
from megamix.analysis.plots.figures import (
    comparison_figure,
    excess_figure,
    exploration_figure,
    loss_figure,
    stacked_figure,
    weights_figure,
)
from megamix.analysis.plots.shares import epochs_figure, proportions_figure
from megamix.core.errors import InputError
from megamix.training.records.recorded_run import RecordedRun

FOLDER = "plots"


def plot_run(run_dirs: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Writes the PNGs of every run and, for several runs, of their comparison; returns the files written.

    Args:
        out: folder for the PNGs, with a subfolder for each run where there are several. Default: RUN/plots of each run,
            the comparison in the first one's.

    Raises:
        InputError: no such run, one that has recorded nothing yet, a damaged line, or a folder that cannot be written.
    """
    if not run_dirs:
        raise InputError("no run given. Name the run_dir of at least one run.")
    runs = top_movers([RecordedRun.open(Path(run_dir)) for run_dir in run_dirs])
    names = run_names([run.run_dir for run in runs])
    written = []
    with matplotlib.rc_context(STYLE):
        for run, name in zip(runs, names, strict=True):
            folder = run.run_dir / FOLDER if out is None else out if len(runs) == 1 else out / name
            written += _save_all(folder, _of_one(run, name))
        if len(runs) > 1:
            folder = runs[0].run_dir / FOLDER if out is None else out
            written += _save_all(folder, _of_several(runs, names))
    return written


def _of_one(run: RecordedRun, name: str) -> dict[str, Figure | None]:
    return {
        "weights.png": weights_figure(run),
        "weights_stacked.png": stacked_figure(run),
        "loss.png": loss_figure(run),
        "proportions.png": proportions_figure(run),
        "epochs.png": epochs_figure([run], [name]),
        "exploration.png": exploration_figure([run], [name]),
        "excess.png": excess_figure(run),
    }


def _of_several(runs: Sequence[RecordedRun], names: Sequence[str]) -> dict[str, Figure | None]:
    return {
        "comparison.png": comparison_figure(runs, names),
        "comparison_epochs.png": epochs_figure(runs, names),
        "comparison_exploration.png": exploration_figure(runs, names),
    }


def _save_all(folder: Path, figures: Mapping[str, Figure | None]) -> list[Path]:
    return [save_figure(figure, folder / name) for name, figure in figures.items() if figure is not None]
