"""Commands about what a run will be, and what happened in it. ``doctor``, which takes a config with overrides as
``train`` does, is in `megamix.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="manifest.json, or its folder.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: NAME.yaml here, after the data's folder.")
    ] = None,
) -> None:
    """Write a first config for a data set, with comments: a model, steps and a rule that fit its tokens and domains. It
    asks nothing, and replaces nothing.

    Example: megamix init data/mine --out mine.yaml
    """
    from megamix.analysis.first_config import write_first_config

    path = write_first_config(data, out)
    typer.echo(f"{path}: read it, then: megamix doctor {path}; megamix train {path}")


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the PNGs; default: RUN/plots.")] = None,
) -> None:
    """Draw runs: weights, losses, exploration and excess loss over tokens; shares and epochs of every domain.

    Example: megamix plot runs/demo
    """
    from megamix.analysis.plots import plot_run

    for path in plot_run(runs, out):
        typer.echo(path)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML page about runs, side by side: weights, losses, shares, epochs, configs. It needs no network.

    Example: megamix report runs/demo runs/natural --out report.html
    """
    from megamix.analysis.report import write_report

    typer.echo(write_report(runs, out))


def why(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    domain: Annotated[
        str | None, typer.Option(help="Whose weight; default: the one that moved most in the change.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="The change that follows from this step, or the last before; default: the largest."),
    ] = None,
) -> None:
    """Say what moved a weight: the losses that the rule saw, what it made of them, the bounds, and the samples.

    Example: megamix why runs/demo --domain emails --step 237
    """
    from megamix.analysis.why import why as explain

    explain(run, domain, step).show()


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    mixer: Annotated[
        list[str] | None,
        typer.Option(metavar="CONFIG", help="A mixer as in a config; repeat for several. Default: the run's own."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the files; default: RUN/replay.")] = None,
) -> None:
    """Feed the recorded losses of a run to other mixers: which weights they would have asked for.

    Example: megamix replay runs/demo --mixer '{name: odm, preset: paper}' --mixer '{name: doremi}'
    """
    from megamix.analysis.replay import replay as run_replay
    from megamix.core.yaml_text import parse_yaml

    run_replay(run, [parse_yaml(text, "--mixer") for text in mixer or []], out).report().show()


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    target: Annotated[
        float | None,
        typer.Option(help="Objective loss to reach; default: what the baseline ends with."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The variant to compare with, by its name; default: that of the first run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write tables and a figure here.")] = None,
) -> None:
    """Compare runs by validation loss and by the steps they take to reach a target. Runs that differ in train.seed only
    count as one variant, and differences are taken seed by seed, with 95 % confidence intervals.

    Example: megamix compare runs/natural-* runs/odm-* --out runs/comparison
    """
    from megamix.analysis.compare import compare as run_compare

    run_compare(runs, target, baseline, out).report().show()


def inspect(
    path: Annotated[Path, typer.Argument(help="A data set, a run, a checkpoint or a token file.")],
    text: Annotated[bool, typer.Option("--text", help="Show the first document of each domain.")] = False,
    seq_length: Annotated[int | None, typer.Option(min=1, help="Count samples of this many tokens.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="The position in a run's data to show.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show a run as it goes on, until it is done.")] = False,
) -> None:
    """Say in words what a data set, a run, a checkpoint or a token file is.

    Example: megamix inspect runs/demo --sample 1000
    """
    if follow:
        from megamix.analysis.follow import follow as run

        run(path)
        return
    from megamix.analysis.inspect import inspect_path, inspect_sample

    report = inspect_path(path, text=text, seq_length=seq_length) if sample is None else inspect_sample(path, sample)
    report.show()
