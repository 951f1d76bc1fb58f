"""The charts of the report, and the numbers that the pointer reads from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, Literal

import numpy as np

from megamix.analysis.marks import Mark, marks
from megamix.analysis.movers import prominent
from megamix.analysis.report.looks import domain_class, run_class, swatch
from megamix.analysis.report.svg import (
    HEIGHT,
    WIDTH,
    Axis,
    Chart,
    End,
    dot_path,
    line_path,
    nice_axis,
    step_path,
    tokens_text,
)
from megamix.analysis.series import (
    Floats,
    Series,
    asked_shares,
    mean_series,
    recorded_series_of,
    recorded_tokens,
    score_series,
    training_series,
    validation_series,
)
from megamix.analysis.summary import RunTable
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import RecordedRun

POINTS, ALL_POINTS = 400, 1000
"""At most so many changes of weights of a run are drawn, and of all runs of a page together."""


@dataclass
class Data:
    """Data of the page's script: rows of numbers by the key of a chart.

    Attributes:
        charts: {key: {mode, rows, x, y}}; ``mode`` is ``step`` (a value holds until the next) or ``near``; ``rows``
            are [name, CSS class]; ``x`` has one list of tokens, or one for each row; ``y`` has one list for each row.
    """

    charts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        key: str,
        mode: Literal["step", "near"],
        rows: Sequence[tuple[str, str]],
        x: Sequence[Sequence[int]],
        y: Sequence[Sequence[float | None]],
    ) -> str:
        """Returns the key."""
        self.charts[key] = {"mode": mode, "rows": [list(row) for row in rows], "x": list(x), "y": list(y)}
        return key


@dataclass(frozen=True)
class Shown:
    """The runs of a page.

    Attributes:
        runs, tables, names: one for each run.
        domains: of all runs, those of the first run first; the index of a domain decides its colour.
    """

    runs: Sequence[RecordedRun]
    tables: Sequence[RunTable]
    names: Sequence[str]

    @cached_property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for run in self.runs for name in run.domain_names))

    def look(self, domain: str) -> str:
        """The CSS class of a domain's colour."""
        return domain_class(self.domains.index(domain))

    def run_look(self, index: int) -> str:
        """The CSS class of a run's colour; none where there is only one run."""
        return "" if len(self.runs) == 1 else run_class(index)

    @cached_property
    def x(self) -> Axis:
        """The tokens of the longest run."""
        return nice_axis(0.0, float(max(1, *(recorded_tokens(run) for run in self.runs))), 5, inside=True)

    @cached_property
    def prominent(self) -> frozenset[str]:
        """The domains whose lines have names and full colour."""
        return prominent(self.runs)

    @property
    def points(self) -> int:
        """Changes drawn for each run: the page stays small however many there are."""
        return max(60, min(POINTS, ALL_POINTS // len(self.runs)))


def weight_charts(shown: Shown, index: int, series: Series, y: Axis, key: str, what: str, data: Data) -> str:
    """Weights of one run: stacked, and as lines on the axis ``y``."""
    name = shown.names[index]
    _add_domains(shown, series, data, key, "step")
    last = series.values[-1]
    places = shown.x.at(series.tokens)
    above = np.cumsum(np.nan_to_num(series.values), axis=1)
    looks = [shown.look(domain) for domain in series.names]
    areas = "".join(
        f'<path class="area {look}" data-d="{look}" d="{step_path(places, above[:, k], close=True)}"/>'
        for k, look in reversed(list(enumerate(looks)))
    )
    lines, ends = _domain_lines(shown, series, y, step_path)
    middle = np.nan_to_num(above[-1] - np.nan_to_num(last) / 2)
    shares = [
        End(float(middle[k]), domain, looks[k])
        for k, domain in enumerate(series.names)
        if last[k] > 0 and domain in shown.prominent
    ]
    label = f"{what} of {name} over tokens, at the end: {_spoken(series.names, last)}"
    height = max(300, 13 * len(shown.prominent))  # room for the names
    note = "square-root scale" if y.scale == "sqrt" else ""
    found = marks(shown.runs[index])
    marked = mark_lines(shown.x, found)
    stacked = Chart(
        f"{what}, stacked", label, shown.x, nice_axis(0.0, 1.0), areas + marked, key, ends=shares, height=height
    )
    each = Chart(f"{what}, each", label, shown.x, y, marked + lines, key, note=note, ends=ends, height=height)
    head = "" if len(shown.runs) == 1 else f"<h3>{swatch(run_class(index))}{escape(name)}</h3>"
    return f'{head}<div class="pair">{stacked.html()}{each.html()}</div>{mark_list(found)}'


def mark_lines(x: Axis, found: Sequence[Mark]) -> str:
    """A dotted line from top to bottom at each mark."""
    places = x.at(np.array([mark.tokens for mark in found], np.float64))
    return "".join(f'<path class="mark" d="M{round(at * WIDTH)} 0V{HEIGHT}"/>' for at in places.tolist())


def mark_list(found: Sequence[Mark]) -> str:
    """The marks in words."""
    rows = "".join(f"<li>{tokens_text(mark.tokens)} tokens: {escape(mark.text)}</li>" for mark in found)
    return f'<ul class="note marks">{rows}</ul>' if rows else ""


def _add_domains(shown: Shown, series: Series, data: Data, key: str, mode: Literal["step", "near"]) -> None:
    rows = [(domain, shown.look(domain)) for domain in series.names]
    data.add(key, mode, rows, [series.tokens.tolist()], [_short(column) for column in series.values.T])


def _domain_lines(
    shown: Shown, series: Series, y: Axis, path: Callable[[Floats, Floats], str]
) -> tuple[str, list[End]]:
    """A line for each domain, and the names at the ends of the prominent ones; the others are faint until picked."""
    places, heights = shown.x.at(series.tokens), y.at(series.values)
    lines, ends = "", []
    for k, name in enumerate(series.names):
        look = shown.look(name)
        quiet = "" if name in shown.prominent else " quiet"
        lines += f'<path class="line {look}{quiet}" data-d="{look}" d="{path(places, heights[:, k])}"/>'
        if np.isfinite(heights[-1, k]) and not quiet:
            ends.append(End(float(heights[-1, k]), name, look))
    return lines, ends


def mean_charts(shown: Shown, data: Data) -> str:
    """Validation loss by the objective, macro, micro and of the worst domain, runs overlaid."""
    series = [mean_series(run, 200) for run in shown.runs]
    objectives = dict.fromkeys(objective_name(run.config.objective) for run in shown.runs)
    titles = {
        "objective": ("Objective", ", ".join(objectives)),
        "macro": ("Mean over domains", "macro"),
        "micro": ("By natural share", "micro"),
        "worst": ("Worst domain", ""),
    }
    charts = [
        _loss_chart(shown, list(enumerate(series)), column, f"mean:{column}", data, title=title, note=note)
        for column, (title, note) in titles.items()
    ]
    return f'<div class="grid three">{"".join(charts)}</div>' if any(charts) else ""


def domain_charts(shown: Shown, data: Data) -> str:
    """The validation loss of every domain, runs overlaid; training losses as thin lines."""
    validation = [(index, validation_series(run, 120)) for index, run in enumerate(shown.runs)]
    training = [(index, training_series(run, 80)) for index, run in enumerate(shown.runs)]
    charts = []
    for domain in shown.domains:
        having = [(index, series) for index, series in validation if domain in series.names]
        thin = [(index, series) for index, series in training if domain in series.names]
        absent = [shown.names[index] for index, series in validation if domain not in series.names]
        note = f"not in {', '.join(absent)}" if absent else ""
        charts.append(
            _loss_chart(
                shown, having, domain, f"loss:{domain}", data, title=domain, note=note, training=thin, small=True
            )
        )
    return f'<div class="grid many">{"".join(charts)}</div>' if any(charts) else ""


def _loss_chart(
    shown: Shown,
    series: Sequence[tuple[int, Series]],
    column: str,
    key: str,
    data: Data,
    *,
    title: str,
    note: str = "",
    training: Sequence[tuple[int, Series]] = (),
    small: bool = False,
) -> str:
    """One column of several runs; empty where none has it."""
    curves = [(index, *one.column(column)) for index, one in series]
    curves = [(index, tokens, loss) for index, tokens, loss in curves if loss]
    thin = [(index, *one.column(column)) for index, one in training]
    if not curves and not any(loss for _, _, loss in thin):
        return ""
    # The loss before the first step would press what training does into a corner.
    drawn = [
        (i, *((tokens[1:], loss[1:]) if tokens[0] == 0 and len(tokens) > 1 else (tokens, loss)))
        for i, tokens, loss in curves
    ]
    # Training losses from where validation is drawn; without any, all of them.
    begin = min((tokens[0] for _, tokens, _ in drawn), default=0)
    thin = [(index, *_from(begin, tokens, loss)) for index, tokens, loss in thin]
    limits = [value for _, _, loss in (*drawn, *thin) for value in loss]
    y = nice_axis(min(limits), max(limits), 3 if small else 4)
    x = shown.x if not small else nice_axis(0.0, shown.x.high, 3, inside=True)
    body = "".join(
        f'<path class="thin {run_class(index)}" d="{line_path(x.at(np.array(tokens)), y.at(np.array(loss)))}"/>'
        for index, tokens, loss in thin
        if loss
    )
    for index, tokens, loss in drawn:
        places, heights = x.at(np.array(tokens)), y.at(np.array(loss))
        body += f'<path class="line {run_class(index)}" d="{line_path(places, heights)}"/>'
        body += f'<path class="dots {run_class(index)}" d="{dot_path(places, heights)}"/>'
    rows = [(shown.names[index], run_class(index)) for index, _, _ in curves]
    data.add(key, "near", rows, [t for _, t, _ in curves], [loss for _, _, loss in curves])
    last = ", ".join(f"{shown.names[index]} {loss[-1]:.3f}" for index, _, loss in curves)
    label = f"{title}: validation loss in nats per token, last {last or 'none'}"
    return Chart(
        title, label, x, y, body, key if curves else None,
        look=shown.look(column) if small else "", note=note, height=120 if small else 200,
        size="small" if small else "",
    ).html()  # fmt: skip


def _from(begin: int, tokens: Sequence[int], loss: Sequence[float]) -> tuple[list[int], list[float]]:
    """The part of a curve from ``begin`` on."""
    kept = [(at, value) for at, value in zip(tokens, loss, strict=True) if at >= begin]
    return [at for at, _ in kept], [value for _, value in kept]


_NOTES = {
    "perdomain_scores": "nats per token over the reference model",
    "loss_slope": "nats per e-fold of a domain's own tokens",
}


def exploration_chart(shown: Shown, data: Data) -> str:
    """The exploration rates, runs overlaid; empty where no run has one."""
    known = recorded_series_of(shown.runs, "exploration_rate", shown.points)
    if not known:
        return ""
    x, y = shown.x, nice_axis(0.0, max(float(series.values.max()) for _, series in known))
    body = "".join(
        f'<path class="line {run_class(index)}" d="{step_path(x.at(series.tokens), y.at(series.values[:, 0]))}"/>'
        for index, series in known
    )
    rows = [(shown.names[index], run_class(index)) for index, _ in known]
    values = [_short(series.values[:, 0]) for _, series in known]
    key = data.add("exploration", "step", rows, [series.tokens.tolist() for _, series in known], values)
    spoken = ", ".join(f"{shown.names[index]} {series.values[-1, 0]:.4f}" for index, series in known)
    return Chart("Exploration rate", f"Exploration rate, at the end: {spoken}", x, y, body, key, height=200).html()


def score_charts(shown: Shown, key: str, title: str, data: Data) -> str:
    """The mixers' scores of the domains, under ``key`` of weights.jsonl, by run; empty where no run has one."""
    charts = []
    for index, run in enumerate(shown.runs):
        series = score_series(run, key, 200)
        if series is None or not np.isfinite(series.values).any():
            continue
        y = nice_axis(float(np.nanmin(series.values)), float(np.nanmax(series.values)))
        body, ends = _domain_lines(shown, series, y, line_path)
        _add_domains(shown, series, data, f"{key}:{index}", "near")
        note = _NOTES[key]
        if key == "perdomain_scores" and getattr(run.config.mixer, "reference", None) is None:
            note = "of a reference loss 0: the run's own loss"
        label = f"{title} of {shown.names[index]}, at the end: {_spoken(series.names, series.values[-1])}"
        chart = Chart(
            title if len(shown.runs) == 1 else shown.names[index], label, shown.x, y, body, f"{key}:{index}",
            look=shown.run_look(index), note=note, ends=ends, height=260,
        )  # fmt: skip
        charts.append(chart.html())
    return f'<div class="pair">{"".join(charts)}</div>' if charts else ""


def proportion_charts(shown: Shown) -> str:
    """Realised against asked shares of every domain, by run."""
    figures = []
    for index, (run, table) in enumerate(zip(shown.runs, shown.tables, strict=True)):
        asked = asked_shares(run)
        if not asked:
            continue
        drawn = [row for row in table.rows if row.domain in asked]
        shares = [*asked.values(), *(row.natural_share or 0.0 for row in drawn)]
        axis = nice_axis(0.0, max(*shares, 1e-6))
        rows = []
        for row in drawn:
            realised, natural = row.realised_share or 0.0, row.natural_share
            said = f"{row.domain}: realised {realised:.4f}, asked {asked[row.domain]:.4f}"
            said += "" if natural is None else f", natural {natural:.4f}"
            marks = f'<i class="bar" style="width:{_percent(axis, realised)}"></i>'
            marks += "" if natural is None else f'<i class="natural" style="left:{_percent(axis, natural)}"></i>'
            marks += f'<i class="asked" style="left:{_percent(axis, asked[row.domain])}"></i>'
            rows.append(_bar_row(row.domain, shown.look(row.domain), said, marks))
        off = max(abs((row.realised_share or 0.0) - asked[row.domain]) for row in drawn) * run.position
        title = "Shares of the samples" if len(shown.runs) == 1 else shown.names[index]
        note = f"furthest from what was asked: {off:.2g} of {run.position:,} samples"
        figures.append(_bars(title, note, "".join(rows), axis, shown.run_look(index)))
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def epoch_chart(shown: Shown) -> str:
    """Epochs read of each domain, a bar for each run; empty without a data set."""
    known = [(i, {row.domain: row.epochs for row in table.rows}) for i, table in enumerate(shown.tables)]
    every = [value for _, epochs in known for value in epochs.values() if value is not None]
    if not every:
        return ""
    axis = nice_axis(0.0, max(*every, 1e-6))
    rows = []
    for domain in shown.domains:
        found = [(index, epochs.get(domain)) for index, epochs in known]
        read = [(index, value) for index, value in found if value is not None]
        said = f"{domain}: " + ", ".join(f"{shown.names[index]} {value:.3f} epochs" for index, value in read)
        # The colour of a bar is its run's, where there are several, else its domain's.
        marks = "".join(
            f'<i class="bar {shown.run_look(index)}" style="width:{_percent(axis, value)}"></i>'
            for index, value in read
        )
        rows.append(_bar_row(domain, shown.look(domain), said, marks, swatch(shown.look(domain))))
    return _bars("Epochs", "how often each domain has been read", "".join(rows), axis)


def _bars(title: str, note: str, rows: str, axis: Axis, look: str = "") -> str:
    ticks = "".join(f'<span class="tx" style="left:{_percent(axis, tick)}">{tick:.4g}</span>' for tick in axis.ticks)
    return (
        f'<figure class="bars"><figcaption>{swatch(look)}{escape(title)} <small>{escape(note)}</small></figcaption>'
        f'<div class="rows" role="list">{rows}</div><div class="scale" aria-hidden="true"><div>{ticks}</div></div>'
        "</figure>"
    )


def _bar_row(domain: str, look: str, said: str, marks: str, square: str = "") -> str:
    return (
        f'<div class="row {look}" data-d="{look}" role="listitem" aria-label="{escape(said)}" title="{escape(said)}">'
        f'<span class="name">{square}{escape(domain)}</span><span class="track">{marks}</span></div>'
    )


def _percent(axis: Axis, value: float) -> str:
    return f"{100 * float(axis.at(value)):.4g}%"


def _short(values: Floats) -> list[float | None]:
    """To six digits, for the page's data; None for NaN."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _spoken(names: Sequence[str], values: np.ndarray) -> str:
    known = [(name, value) for name, value in zip(names, values.tolist(), strict=True) if math.isfinite(value)]
    known.sort(key=lambda pair: -pair[1])
    return ", ".join(f"{name} {value:.3f}" for name, value in known)
