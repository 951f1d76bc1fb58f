"""Paths as users write them, in configs and on the command line: ``~``, ``~user``, ``$NAME`` and ``${NAME}``.

`expand` is the one function for all of them. A dollar sign that is meant is written twice; a folder that is really
called ``~`` is ``./~`` in a config.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamix.core.errors import InputError

_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)


def expand(text: str) -> str:
    """The path that ``text`` stands for.

    Raises:
        InputError: a variable that is not set, a user who has no home here, or characters that no path may have.
    """
    if "\0" in text or not _can_be_encoded(text):
        raise InputError(f"the path {text!r} has characters that no file system takes. Write it without them.")

    def value(match: re.Match[str]) -> str:
        name = match[1] if match[2] is None else match[2]
        if name is None:
            return "$"
        if name not in os.environ:
            raise InputError(
                f"the path '{text}' names the variable {match[0]}, which is not set. Set it (export {name}=...), write the"
                " path out, or write $$ for a dollar sign."
            )
        return os.environ[name]

    home = text.partition("/")[0] if text.startswith("~") else ""
    if home and os.path.expanduser(home) == home:
        raise InputError(
            f"the path '{text}' begins with {home}, which is nobody's home here. Write the path out, or begin with ./"
            " where the name begins with ~."
        )
    # First, so that a variable's value is taken as it is.
    return os.path.expanduser(home) + _VARIABLE.sub(value, text[len(home) :])


def _can_be_encoded(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a character, as "\ud800" in JSON and YAML
        return False
    return True


def literal(path: str | Path) -> str:
    """The text that `expand` makes ``path`` of, for a config."""
    path = str(path)
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def argument(path: Path) -> str:
    """The text that `expand` makes ``path`` of, whole, for another megamix command."""
    return literal(path.absolute())


def paths_expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command of the command line whose paths are expanded."""

    def expanded(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(expanded, value))
        return Path(expand(str(value))) if isinstance(value, Path) else value

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        return command(*args, **{name: expanded(value) for name, value in options.items()})

    return run
