"""Errors a user can act on, and the exit code each one ends the process with.

Every message names the value seen, the value wanted and what to do. The command line prints the message alone (no
traceback) and exits with ``exit_code``; anything that is not a `MegamixError` is a defect of megamix and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_RESUME_REFUSED = 3
EXIT_PREEMPTED = 75


class MegamixError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = EXIT_FAILED


class InputError(MegamixError):
    """Bad input: a config, a file, an option or a value that cannot be used."""

    exit_code = EXIT_BAD_INPUT


class DataChanged(InputError):
    """Token files or a tokenizer that are not those of the manifest: gone, cut, or with other contents."""

    exit_code = EXIT_RESUME_REFUSED


class ResumeRefused(MegamixError):
    """A checkpoint exists, but continuing from it would not continue the same run."""

    exit_code = EXIT_RESUME_REFUSED


class RankFailed(MegamixError):
    """A process of the job died; the message says which and how."""


class Preempted(MegamixError):
    """The job was asked to stop; a checkpoint was written and the job should be requeued."""

    exit_code = EXIT_PREEMPTED


def check_known(names: Iterable[str], known: Iterable[str], unknown: str) -> None:
    """Raises InputError for the first name that is not known: ``UNKNOWN 'name'. Did you mean ...?``"""
    known = dict.fromkeys(known)
    for name in names:
        if name not in known:
            raise InputError(f"{unknown} '{name}'." + did_you_mean(str(name), known))


def given_twice(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, number in Counter(names).items() if number > 1)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `` Did you mean 'x'?`` or, when nothing is near, the list of known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""
