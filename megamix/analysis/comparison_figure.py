"""Figure of a comparison: the objective loss of every variant and run, over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from megamix.analysis.plots.drawing import STYLE, Label, look, name_lines, new_figure, points, save_figure


def draw_comparison(path: Path, curves: Mapping[str, Sequence[Mapping[int, float]]], objective: str) -> None:
    """Draws the mean of each variant's runs (bold) and, of several, every run (thin).

    Args:
        curves: variant -> {tokens: objective loss} of each run.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(f"Validation loss: objective ({objective})", len(curves))
        labels = []
        for index, (variant, runs) in enumerate(curves.items()):
            colour, style = look(index)
            for curve in runs if len(runs) > 1 else ():
                axes.plot([*curve][1:], [*curve.values()][1:], color=colour, linewidth=0.7, alpha=0.4)
            shared = sorted(set.intersection(*map(set, runs)))
            if not shared:  # records without natural shares have no objective loss
                continue
            means = [sum(curve[tokens] for curve in runs) / len(runs) for tokens in shared]
            points(axes, shared, means, colour, style, 1.8)
            labels.append(Label(means[-1], f"{variant}  {means[-1]:.3f}", colour, style))
        axes.set_xlim(0, max((tokens for runs in curves.values() for curve in runs for tokens in curve), default=1))
        axes.set_ylabel("loss, nats per token")
        name_lines(figure, axes, labels)
        save_figure(figure, path)
