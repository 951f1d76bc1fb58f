"""The page of tables of an acceptance, in the form of kernels/README.md."""

from __future__ import annotations

from typing import Any

TITLES = {
    "numerics": "Numerics on the device, against float64",
    "loss": "The loss of given logits",
    "ahead": "The next tile of a row loaded ahead, on against off",
    "reading": "What the second reading of a row costs",
    "bytes": "Bytes moved, by the counters of the device (ncu)",
    "statistics": "Domain statistics, on against off and against kernels that do not load domains",
    "linear": "The loss from hidden states",
    "host": "Time of the host",
    "model": "A model's step",
    "trace": "Synchronisations of a step",
    "parallel": "The vocabulary over ranks",
}
LABELS = ("shape", "name", "option")
PACKAGES = (
    "torch", "triton", "numpy", "deepspeed", "liger-kernel", "quack-kernels", "cut-cross-entropy", "megatron-core",
    "transformer-engine", "nvidia-cutlass-dsl",
)  # fmt: skip
NOT_MEASURED = "not measured"


def cell(row: dict[str, Any]) -> str:
    """The figure of a row in words: metric, value, unit and quartiles, or why there is none."""
    if row.get("value") is None:
        return f"{NOT_MEASURED}: {row.get('note', '')}"
    value, *spread = _figure(row).split(" ", 1)
    return " ".join([row["metric"], value, *filter(None, [row.get("unit")]), *spread])


def _figure(row: dict[str, Any]) -> str:
    """Value and quartiles, if any, without the unit."""
    spread = f" ({row['low']:.4g} to {row['high']:.4g})" if row.get("low") is not None else ""
    return f"{row['value']:.4g}{spread}"


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
    versions = [f"{name} {row[name]}" for name in PACKAGES if row.get(name)]
    driver = [f"driver {row['driver']}"] if row.get("driver") else []
    return ", ".join([row["device"], *driver, *versions, row["date"][:10]])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a task, a column a metric; quartiles in brackets."""
    labels = [name for name in LABELS if any(row.get(name) for row in rows)]
    heads = {row["metric"]: _head(row) for row in rows if row.get("value") is not None}
    heads = heads or {"": "value"}
    lines = [
        "| " + " | ".join([*labels, *heads.values(), "note"]) + " |",
        "|" + "---|" * (len(labels) + len(heads) + 1),
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        figures = {row["metric"]: _figure(row) for row in own if row.get("value") is not None}
        figures = figures or {next(iter(heads)): NOT_MEASURED}
        notes = dict.fromkeys(row["note"] for row in own if row.get("note"))
        cells = [str(own[0].get(name) or "") for name in labels] + [figures.get(metric, "") for metric in heads]
        lines.append("| " + " | ".join([*cells, "; ".join(notes)]).replace("\n", " ") + " |")
    return [*lines, ""]


def _head(row: dict[str, Any]) -> str:
    return ", ".join(filter(None, [row["metric"], row.get("unit")]))


def _missing(keys: list[str]) -> list[str]:
    return [f"**{NOT_MEASURED}**: " + ", ".join(keys), ""] if keys else []
