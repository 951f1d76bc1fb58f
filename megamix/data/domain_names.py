"""Names of domains: one rule for what may be one, and the name that a domain's files and folders take."""

from __future__ import annotations

import hashlib
import re
import urllib.parse

from megamix.core.errors import InputError

LONGEST = 1000
_AS_IS = re.compile(r"[\w.+() -]", re.ASCII)
_MOST_BYTES = 200
"""Of a file's name: most file systems take 255, and suffixes follow."""
_OURS = (".json", ".tmp", ".lock", ".journal", ".npy")


def check_domain_name(name: str, source: object) -> None:
    """Refuses what cannot be the name of a domain. `file_name` finds a file's name for all others.

    Args:
        source: where it comes from, for the message.

    Raises:
        InputError: nothing, blanks at an end, characters that cannot be printed, '=' or ',', or too many characters.
    """
    shown = name if len(name) <= 80 else f"{name[:60]}... ({len(name)} characters)"
    problem = None
    if not name or name != name.strip():
        problem = "it is empty, or begins or ends with a blank"
    elif not name.isprintable():
        problem = "it has characters that cannot be printed"
    elif "=" in name or "," in name:
        problem = "'=' and ',' divide names from files on the command line"
    elif len(name) > LONGEST:
        problem = f"it has more than {LONGEST} characters"
    if problem is not None:
        raise InputError(f"'{shown}' cannot be the name of a domain (from {source}): {problem}. Choose another name.")


def file_name(name: str) -> str:
    """The name of a domain's folder or file, another one for every domain.

    Letters and digits of any language stay, and ``. + - _ ( )`` and blanks inside; other characters are written as in a
    URL. A name that begins with a dot, or ends as our own files do, has that dot written so; the end of a long one is
    a hash.
    """
    written = "".join(map(_written, name))
    if written.startswith("."):
        written = "%2E" + written[1:]
    if written.lower().endswith(_OURS):
        stem, _, suffix = written.rpartition(".")
        written = f"{stem}%2E{suffix}"
    if len(written.encode()) > _MOST_BYTES:
        kept = written.encode()[: _MOST_BYTES - 33].decode(errors="ignore")
        written = f"{kept}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return written


def _written(character: str) -> str:
    if character.isalnum() or _AS_IS.match(character):
        return character
    return urllib.parse.quote(character, safe="") if character != "~" else "%7E"  # quote keeps ~
