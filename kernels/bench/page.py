"""The page of tables of an acceptance, in the form of kernels/README.md."""

from __future__ import annotations

from typing import Any

TITLES = {
    "numerics": "Numerics on the device, against float64",
    "loss": "The loss of given logits",
    "ahead": "The next tile of a row loaded ahead, on against off",
    "reading": "What the second reading of a row costs",
    "statistics": "Domain statistics, on against off",
    "linear": "The loss from hidden states",
    "host": "Time of the host",
    "model": "A model's step",
    "trace": "Synchronisations of a step",
    "parallel": "The vocabulary over ranks",
}
COLUMNS = ("shape", "name", "option", "metric")
NOT_MEASURED = "not measured"


def cell(row: dict[str, Any]) -> str:
    """The figure of a row in words: value, unit and quartiles, or why there is none."""
    if row.get("value") is None:
        return f"{NOT_MEASURED}: {row.get('note', '')}"
    value, spread = _figure(row)
    return f"{row['metric']} {value}" + (f" ({spread})" if spread else "")


def _figure(row: dict[str, Any]) -> tuple[str, str]:
    """Value with its unit, and quartiles; empty where there are none."""
    spread = f"{row['low']:.4g} to {row['high']:.4g}" if row.get("low") is not None else ""
    return f"{row['value']:.4g} {row.get('unit', '')}".rstrip(), spread


def make(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """Markdown of the newest rows of every task, and the tasks that have none."""
    newest: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["task"] in newest and newest[row["task"]][0]["date"] != row["date"]:
            newest[row["task"]] = []
        newest.setdefault(row["task"], []).append(row)
    lines = ["# Acceptance of the loss kernels", ""]
    for text in dict.fromkeys(_machine(row) for own in newest.values() for row in own):
        lines += [text, ""]
    for kind, title in TITLES.items():
        own = [row for key in newest for row in newest[key] if row["kind"] == kind]
        missing = [key for key in keys if key.split("/")[0] == kind and key not in newest]
        if own or missing:
            lines += [f"## {title}", "", *(_table(own) if own else []), *_missing(missing)]
    return "\n".join(lines).rstrip() + "\n"


def _machine(row: dict[str, Any]) -> str:
    versions = [f"{name} {row[name]}" for name in ("torch", "triton") if row.get(name)]
    driver = [f"driver {row['driver']}"] if row.get("driver") else []
    return ", ".join([row["device"], *driver, *versions, row["date"][:10]])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    shown = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    heads = [*shown, "value", "quartiles", "note"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        value, spread = (NOT_MEASURED, "") if row.get("value") is None else _figure(row)
        cells = [str(row.get(name) or "") for name in shown]
        lines.append("| " + " | ".join([*cells, value, spread, row.get("note") or ""]) + " |")
    return [*lines, ""]


def _missing(keys: list[str]) -> list[str]:
    return [f"**{NOT_MEASURED}**: " + ", ".join(keys), ""] if keys else []
