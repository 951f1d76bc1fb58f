"""The page as a whole: sections in reading order, style, script and data in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from megamix import __version__
from megamix.analysis.labels import run_names
from megamix.analysis.movers import movers_note, top_movers
from megamix.analysis.report import charts
from megamix.analysis.report.charts import Data, Shown
from megamix.analysis.report.looks import rules, run_class, swatch
from megamix.analysis.report.svg import tokens_text, weight_axis
from megamix.analysis.report.tables import cards, config_table, domain_table, mixer_name
from megamix.analysis.series import (
    Series,
    asked_shares,
    equal_tokens,
    objective_losses,
    recorded_series_of,
    shared_objective,
    up_to,
    weight_series,
)
from megamix.analysis.summary import run_table
from megamix.core.errors import InputError
from megamix.core.files import replace_file
from megamix.training.records.recorded_run import RecordedRun

DEFAULT = "report.html"


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one page about all runs, finished or not; returns the file written.

    Args:
        out: the file; default: report.html in the directory of the first run.

    Raises:
        InputError: no such run, one that has recorded nothing yet, a damaged line, or a file that cannot be written.
    """
    if not run_dirs:
        raise InputError("no run given. Name the run_dir of at least one run.")
    out = Path(run_dirs[0]) / DEFAULT if out is None else Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder. Give --out the name of the file, for example {out / DEFAULT}.")
    page = report_page([RecordedRun.open(Path(run_dir)) for run_dir in run_dirs])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, page.encode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}. Choose another file with --out.") from error
    return out


def report_page(runs: Sequence[RecordedRun]) -> str:
    """The page as text."""
    runs = top_movers(runs)
    shown = Shown(runs, [run_table(run) for run in runs], run_names([run.run_dir for run in runs]))
    data = Data()
    sampling = [(index, weight_series(run, shown.points)) for index, run in enumerate(runs)]
    # DoReMi's, where they act on the loss.
    alpha = recorded_series_of(runs, "loss_weights", shown.points)
    parts = [
        ("", "", cards(shown) + _verdict(shown)),
        ("loss", "Validation loss", _legend(shown) + charts.mean_charts(shown, data)),
        ("weights", "Sampling weights", _domain_key(shown) + _weights(shown, sampling, "weights", "Weights", data)),
        ("alpha", "Loss weights", _weights(shown, alpha, "alpha", "Loss weights", data)),
        ("domains", "Loss by domain", _by_domain(shown, data)),
        ("shares", "Realised and asked shares", _shares(shown)),
        ("epochs", "Epochs read", _run_key(shown, charts.epoch_chart(shown))),
        ("exploration", "Exploration", _run_key(shown, charts.exploration_chart(shown, data))),
        ("excess", "Excess loss", charts.score_charts(shown, "perdomain_scores", "Excess loss", data)),
        ("slope", "What is still being learnt", charts.score_charts(shown, "loss_slope", "Loss slope", data)),
        ("table", "Domains", domain_table(shown, [asked_shares(run) for run in runs])),
        ("config", "Config" if len(runs) == 1 else "Differences between the configs", config_table(shown)),
    ]
    title = f"megamix: {', '.join(shown.names)}"
    heading = escape(shown.names[0]) if len(runs) == 1 else f"{len(runs)} runs side by side"
    return whole_page(title, heading, parts, rules(len(shown.domains), len(runs)), data, _notes(shown, sampling, alpha))


def whole_page(
    title: str, heading: str, parts: Sequence[tuple[str, str, str]], looks: str, data: Data, footer: str
) -> str:
    """A page in one file.

    Args:
        title: as text; heading, footer: as HTML.
        parts: (anchor, title, HTML) of each section; those without HTML are left out.
        looks: `rules` of the domains and runs that are drawn.
    """
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts if key)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{content}</section>' if key else content for key, title, content in parts
    )
    # Inside a script element only "<" could end it.
    numbers = json.dumps(data.charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{looks}{_asset('report.css')}</style></head><body>"
        f'<header><h1>{heading}</h1><nav aria-label="Sections">{links}</nav></header>'
        f"<main>{body}</main>{footer}"
        '<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="data">{numbers}</script><script>{_asset("report.js")}</script>'
        "</body></html>\n"
    )


def _asset(name: str) -> str:
    return files("megamix.analysis.report").joinpath(name).read_text(encoding="utf-8")


def _verdict(shown: Shown) -> str:
    """The run with the lowest objective loss, or of different objectives the lowest mean loss, after equally many
    tokens and where losses are comparable."""
    objective = shared_objective(shown.runs)
    what = "mean loss over domains" if objective is None else f"loss by the objective ({objective})"
    tokens = equal_tokens(shown.runs)
    if tokens is None:
        return ""
    runs = [up_to(run, tokens) for run in shown.runs]
    losses = [run.evaluations[-1].get("macro_loss") if objective is None else objective_losses(run)[-1] for run in runs]
    known = [loss for loss in losses if loss is not None]
    if len(shown.runs) == 1 or len(known) < len(losses) or _not_comparable(shown):
        return ""
    best, second = sorted(range(len(known)), key=lambda index: known[index])[:2]
    gap = known[second] - known[best]
    if gap == 0:
        return ""
    words = f"<b>{escape(shown.names[best])}</b> has the lowest {what}, {gap:.3g} nats per token below "
    words += f"<b>{escape(shown.names[second])}</b>"
    is_end = all(run.evaluations[-1]["tokens"] == tokens for run in shown.runs)
    words += "." if is_end else f" at {tokens_text(tokens)} tokens, the most after which all were evaluated."
    return f'<p class="verdict">{words}</p>'


def _not_comparable(shown: Shown) -> list[str]:
    """Reasons why losses of the runs are not comparable."""
    reasons = []
    manifests = [run.manifest for run in shown.runs if run.manifest is not None]
    if len({manifest.tokenizer.sha256 for manifest in manifests}) > 1:
        reasons.append("The runs have different tokenizers: losses per token are not comparable.")
    elif len({manifest.fingerprint for manifest in manifests}) > 1:
        reasons.append("The runs were trained on different data sets: losses of the same name may be of other text.")
    sets = [set(table_names) for table_names in (run.ledger.lines[-1]["domain_names"] for run in shown.runs)]
    shared = set.intersection(*sets)
    if any(names != shared for names in sets):
        only = [
            f"only {name} has {', '.join(domain for domain in shown.domains if domain in extra)}"
            for name, extra in (
                (name, names.difference(*(other for other in sets if other is not names)))
                for name, names in zip(shown.names, sets, strict=True)
            )
            if extra
        ]
        said = f" ({'; '.join(only)})" if only else ""
        reasons.append(
            f"The runs share {len(shared)} of {len(shown.domains)} domains{said}: means over domains, and the worst, "
            "are each run's own."
        )
    return reasons


def _legend(shown: Shown) -> str:
    reasons = _not_comparable(shown)
    warning = f'<p class="warning">{" ".join(map(escape, reasons))}</p>' if reasons and len(shown.runs) > 1 else ""
    without = [name for name, run in zip(shown.names, shown.runs, strict=True) if not run.evaluations]
    if without:
        warning += f'<p class="warning">Not evaluated yet: {escape(", ".join(without))}.</p>'
    note = (
        ""
        if len(without) == len(shown.runs)
        else '<p class="note">nats per token on held-out text, over tokens trained on</p>'
    )
    return warning + note + _key(shown)


def _key(shown: Shown) -> str:
    """Names of the runs beside their colours."""
    if len(shown.runs) == 1:
        return ""
    entries = "".join(
        f"<li>{swatch(run_class(index))}{escape(name)} <small>{escape(mixer_name(run))}</small></li>"
        for index, (name, run) in enumerate(zip(shown.names, shown.runs, strict=True))
    )
    return f'<ul class="key">{entries}</ul>'


def _run_key(shown: Shown, chart: str) -> str:
    return _key(shown) + chart if chart else ""


def _domain_key(shown: Shown) -> str:
    """Every domain as a button that lights it up in all charts."""
    entries = "".join(
        f'<li><button type="button" data-pick="{shown.look(name)}">{swatch(shown.look(name))}'
        f"{escape(name)}</button></li>"
        for name in shown.domains
    )
    note = ""
    if len(shown.prominent) < len(shown.domains):
        note = (
            f'<p class="note">{len(shown.prominent)} of {len(shown.domains)} domains, those whose weights moved most, have full '
            "colour and a name at their line; pick any by its name.</p>"
        )
    return f'{note}<ul class="key domains">{entries}</ul>'


def _weights(shown: Shown, found: Sequence[tuple[int, Series]], key: str, what: str, data: Data) -> str:
    """The weights of runs, by their index, on one axis."""
    if not found:
        return ""
    y = weight_axis([series.values for _, series in found])
    return "".join(
        charts.weight_charts(shown, index, series, y, f"{key}:{index}", what, data) for index, series in found
    )


def _by_domain(shown: Shown, data: Data) -> str:
    drawn = charts.domain_charts(shown, data)
    note = (
        "each on its own scale; dots: validation, thin lines: training; what is before the first evaluation after the start "
        "is left out"
    )
    return f'<p class="note">{note}</p>{_key(shown)}{drawn}' if drawn else ""


def _shares(shown: Shown) -> str:
    drawn = charts.proportion_charts(shown)
    key = (
        '<ul class="key"><li><i class="sample bar"></i>realised</li><li><i class="sample asked"></i>asked: mean weight '
        'over the run</li><li><i class="sample natural"></i>natural: share of the training tokens</li></ul>'
    )
    return key + drawn if drawn else ""


def _notes(shown: Shown, sampling: Sequence[tuple[int, Series]], alpha: Sequence[tuple[int, Series]]) -> str:
    """Points that the charts leave out, and numbers that are not known."""
    notes = []
    if said := movers_note(shown.runs):
        notes.append(f"Charts and tables show {said}; means, the worst domain and the objective are of all.")
    drawn = [(f"sampling weights of {shown.names[index]}", series) for index, series in sampling]
    drawn += [(f"loss weights of {shown.names[index]}", series) for index, series in alpha]
    for what, series in drawn:
        if series.tolerance:
            notes.append(
                f"The {what} changed {series.left_out + len(series.tokens) - 2:,} times; the chart draws the "
                f"{len(series.tokens) - 2:,} changes that matter, exact where they are drawn. No weight in between is "
                f"further than {series.tolerance:.2g} from the one drawn."
            )
    for name, table in zip(shown.names, shown.tables, strict=True):
        if table.missing_data:
            notes.append(f"{name}: natural shares, epochs and unigram losses are not known here. {table.missing_data}")
    notes.append(
        "Long curves of training losses and scores are means over neighbouring lines of the record. Tables hold the record's numbers."
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<footer><ul>{items}</ul><p>megamix {escape(__version__)}</p></footer>"
