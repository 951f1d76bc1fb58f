"""The list of commands in ``--help``: in groups, each with its whole first sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typer.core import TyperGroup


class WholeSentences(TyperGroup):
    """Commands with a first sentence that is not cut off.

    Attributes:
        groups: {heading: commands}; commands of none come first, under a heading of their own.
    """

    groups: ClassVar[Mapping[str, Sequence[str]]] = {}

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        placed = {name for group in self.groups.values() for name in group}
        width = max(map(len, names), default=0)
        for heading, wanted in {"Commands": [name for name in names if name not in placed], **self.groups}.items():
            rows = [(name.ljust(width), first_sentence(self.commands[name].help or "")) for name in wanted]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


def first_sentence(text: str) -> str:
    """The first sentence of a help text, on one line."""
    whole = " ".join(text.split("\n\n")[0].split())
    found = re.match(r".*?\.(?=\s+[A-Z]|$)", whole)
    return found.group() if found else whole
