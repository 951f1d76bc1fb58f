"""The commands in ``--help``, in groups, each with its whole first sentence; and the option ``--help-config``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from megamix.core.config import Config


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


def keys_option(section: str, find: Callable[[], type[Config]]) -> Any:
    """A flag that prints every key of a section of a config and ends the command.

    Args:
        find: imports the config class.
    """

    def show(asked: bool) -> None:
        if asked:
            from megamix.core.config_help import config_help

            typer.echo(config_help(find()))
            raise typer.Exit

    told = f"Print every key of {section}, and its meaning."
    return typer.Option("--help-config", is_eager=True, callback=show, help=told)
