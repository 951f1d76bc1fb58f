"""The report's tables: headline numbers, domains, and differences between configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megamix.analysis.report.charts import Shown
from megamix.analysis.report.looks import run_class, swatch
from megamix.analysis.report.svg import tokens_text
from megamix.analysis.series import objective_losses, worst
from megamix.analysis.summary import DomainRow, RunTable
from megamix.analysis.variants import flatten
from megamix.core.text import listed
from megamix.training.objective import objective_name
from megamix.training.records.recorded_run import RecordedRun

_ABSENT = "\N{EN DASH}"


def cards(shown: Shown) -> str:
    """The headline of every run."""
    drawn = [
        _card(index, run, table, name)
        for index, (run, table, name) in enumerate(zip(shown.runs, shown.tables, shown.names, strict=True))
    ]
    return f'<div class="cards">{"".join(drawn)}</div>'


def _card(index: int, run: RecordedRun, table: RunTable, name: str) -> str:
    last: dict[str, Any] = run.evaluations[-1] if run.evaluations else {"domain_loss": {}}
    worst_domain, worst_loss = worst(last)
    fall = "" if table.fall is None else f"{'down' if table.fall >= 0 else 'up'} {abs(table.fall):.0%} since the start"
    objective = objective_losses(run)[-1] if run.evaluations else None
    numbers = [
        _number("objective", "objective loss", objective, _objective_text(run, table)),
        _number("macro", "mean loss", last.get("macro_loss"), fall),
        _number("micro", "natural mean", last.get("micro_loss"), "by natural share"),
        _number("worst", "worst domain", worst_loss, worst_domain or ""),
    ]
    steps = f"{table.steps:,} of {table.total_steps:,} steps" if table.steps < table.total_steps else "finished"
    return (
        f'<section class="card {run_class(index)}"><h2>{escape(name)}</h2>'
        f'<p class="what"><b>{escape(mixer_name(run))}</b> · '
        f'<span data-value="{table.tokens}">{tokens_text(table.tokens)} tokens</span> · '
        f"{steps} · {len(run.ledger.lines) - 1:,} updates of the weights</p>"
        f"<dl>{''.join(numbers)}</dl></section>"
    )


def _objective_text(run: RecordedRun, table: RunTable) -> str:
    name = objective_name(run.config.objective)
    return f"{name}, without {listed(table.unevaluated)} (no validation text)" if table.unevaluated else name


def mixer_name(run: RecordedRun) -> str:
    """``odm official``."""
    mixer = run.config.mixer
    preset = getattr(mixer, "preset", None)
    return mixer.name if preset is None else f"{mixer.name} {preset}"


def _number(key: str, title: str, value: float | None, note: str) -> str:
    shown, exact = (_ABSENT, "") if value is None else (f"{value:.3f}", f' data-value="{value!r}"')
    return f'<div><dt>{title}</dt><dd data-key="{key}"{exact}>{shown}</dd><dd class="note">{escape(note)}</dd></div>'


_COLUMNS: Sequence[tuple[str, str, str, int]] = (
    ("natural_share", "natural", "share of the training tokens", 4),
    ("asked", "asked", "mean weight over the run so far", 4),
    ("realised_share", "realised", "share of the samples trained on", 4),
    ("final_weight", "final weight", "the last on record", 4),
    ("first_loss", "first loss", "validation, nats per token", 3),
    ("last_loss", "last loss", "validation, nats per token", 3),
    ("against", "against first run", "last loss less that of the first run", 3),
    ("unigram_loss", "unigram", "loss of the domain's word frequencies alone", 3),
    ("epochs", "epochs", "how often the domain has been read", 3),
)


def domain_table(shown: Shown, asked: Sequence[Mapping[str, float]]) -> str:
    """Every domain of every run, with its mean weight ``asked``; the script sorts it by any column."""
    several = len(shown.runs) > 1
    columns = [column for column in _COLUMNS if several or column[0] != "against"]
    heads = [("domain", "domain", ""), *([("run", "run", "")] if several else []), *(c[:3] for c in columns)]
    head = "".join(
        f'<th scope="col" data-key="{key}" title="{escape(note)}"><button type="button">{title}</button></th>'
        for key, title, note in heads
    )
    base = {row.domain: row.last_loss for row in shown.tables[0].rows}
    body = []
    for domain in shown.domains:
        for index, table in enumerate(shown.tables):
            row = next((row for row in table.rows if row.domain == domain), None)
            if row is None:
                continue
            values = _values(row, asked[index].get(domain), base.get(domain) if index else None)
            cells = "".join(_cell(key, values[key], digits) for key, _, _, digits in columns)
            gone = "" if row.present else " <small>(removed)</small>"
            run = f"<td>{swatch(run_class(index))}{escape(shown.names[index])}</td>" if several else ""
            look = shown.look(domain)
            body.append(
                f'<tr data-d="{look}"><th scope="row">{swatch(look)}{escape(domain)}{gone}</th>{run}{cells}</tr>'
            )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Domains"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _values(row: DomainRow, asked: float | None, base: float | None) -> dict[str, float | None]:
    against = None if base is None or row.last_loss is None else row.last_loss - base
    known = {key: getattr(row, key, None) for key, *_ in _COLUMNS}
    return {**known, "asked": asked, "against": against}


def _cell(key: str, value: float | None, digits: int) -> str:
    if value is None:
        return f'<td class="number" data-key="{key}">{_ABSENT}</td>'
    look, text = "number", f"{value:.{digits}f}"
    if key == "against":
        look, text = f"number {'good' if value < 0 else 'bad' if value > 0 else ''}", f"{value:+.{digits}f}"
    return f'<td class="{look}" data-key="{key}" data-value="{value!r}">{text}</td>'


def config_table(shown: Shown) -> str:
    """The keys in which the configs differ; for one run all keys, behind a fold."""
    flat = [_as_text(flatten(run.config.model_dump(mode="json"))) for run in shown.runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key != "run_dir"]
    if len(flat) == 1:
        rows = "".join(f"<tr><th scope=row>{escape(key)}</th><td>{escape(flat[0][key])}</td></tr>" for key in keys)
        return (
            f'<details><summary>All {len(keys)} keys</summary><div class="scroll"><table>{rows}</table></div></details>'
        )
    keys = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    if not keys:
        return "<p>The configs are the same.</p>"
    head = "".join(
        f'<th scope="col">{swatch(run_class(index))}{escape(name)}</th>' for index, name in enumerate(shown.names)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(one.get(key, _ABSENT))}</td>" for one in flat)
        + "</tr>"
        for key in keys
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Configs"><table class="configs">'
        f'<thead><tr><th scope="col">key</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _as_text(flat: Mapping[str, Any]) -> dict[str, str]:
    return {key: "null" if value is None else str(value) for key, value in flat.items()}
