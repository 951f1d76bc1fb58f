"""Paragraphs and tables for people: drawn with rich on a terminal, as plain aligned columns elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

ABSENT = "-"


def number(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` decimals; a dash for None."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def gib(num_bytes: float) -> str:
    """A size in GiB, MiB, KiB or bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 document``, ``2 documents``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def listed(names: Iterable[str], most: int = 12) -> str:
    """``a, b and 3 more``: the first names with commas, and how many are left, so that 300 do not fill the screen."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortened(text: str, most: int = 60) -> str:
    """The text, cut where it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}..."


def most_of(rows: Sequence[Sequence[str]], sizes: Any, most: int = 60) -> list[Sequence[str]]:
    """The rows of a table in their order; of more than ``most`` those with the largest sizes, and how many are left."""
    if len(rows) <= most:
        return list(rows)
    largest = sorted(range(len(rows)), key=lambda index: -sizes[index])[:most]
    left = (f"and {len(rows) - most:,} more", *[""] * (len(rows[0]) - 1))
    return [*(rows[index] for index in sorted(largest)), left]


def by_name(names: Iterable[str], values: Any) -> dict[str, Any]:
    """``{name: value}``, with the Python numbers of an array."""
    return dict(zip(names, values.tolist() if hasattr(values, "tolist") else values, strict=True))


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column is left-aligned, the others right-aligned unless named in ``left``.

    Attributes:
        rows: one string for each column.
        footer: number of rows at the end that are sums or means, set off from the others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: int = 0
    left: frozenset[str] = field(default_factory=frozenset)

    def text(self) -> str:
        """Plain aligned columns."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        drawn = ["  ".join(self._pad(line, widths)).rstrip() for line in lines]
        rule = "  ".join("-" * width for width in widths)
        drawn.insert(1, rule)
        if self.footer:
            drawn.insert(len(drawn) - self.footer, rule)
        return "\n".join(drawn)

    def _pad(self, line: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if self._is_left(column) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]

    def _is_left(self, column: int) -> bool:
        return column == 0 or self.columns[column] in self.left

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for column, name in enumerate(self.columns):
            table.add_column(Text(name), justify="left" if self._is_left(column) else "right", no_wrap=column == 0)
        first_footer = len(self.rows) - self.footer
        for index, row in enumerate(self.rows):
            if self.footer and index == first_footer:
                table.add_section()
            table.add_row(*map(Text, row), style="bold" if index >= first_footer else None)
        return table


@dataclass(frozen=True)
class Report:
    """Paragraphs and tables, in reading order."""

    parts: Sequence[str | Table]

    def text(self) -> str:
        """Plain text."""
        return "\n\n".join(part if isinstance(part, str) else part.text() for part in self.parts)

    def __str__(self) -> str:
        return self.text()

    def show(self) -> None:
        """Prints it, with rich if standard output is a terminal."""
        if not sys.stdout.isatty():
            print(self.text())
            return
        from rich.console import Console

        console = Console(highlight=False)
        for index, part in enumerate(self.parts):
            if index and isinstance(part, str):
                console.print()
            console.print(part, markup=False, soft_wrap=isinstance(part, str))
