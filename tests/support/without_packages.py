"""Runs commands where packages are not installed: without_packages.py MODULES COMMANDS OUT, two lists in JSON.

Writes [exit code, output] of each command to OUT. Each is forked from a process that has imported the command line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


class Absent:
    """Finder that finds nothing where a package is to be missing."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = modules

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def outcome(command: list[str]) -> tuple[int, str]:
    """Exit code and output of ``megamix COMMAND``."""
    from megamix.cli import main

    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = ["megamix", *command]
            try:
                main()
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(int(end.code or 0))
            sys.stdout.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read().decode()


if __name__ == "__main__":
    modules, commands, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    sys.meta_path.insert(0, Absent(modules))
    # What many of them import, once.
    import megamix.studies.arena.config
    import megamix.studies.swarm.config
    import megamix.training.plan  # noqa: F401

    out.write_text(json.dumps([outcome(command) for command in commands]))
