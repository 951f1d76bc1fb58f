"""Runs commands where packages are not installed: without_packages.py MODULES COMMANDS OUT, two lists in JSON.

Writes [exit code, output] of each command to OUT. Each is forked from a process that has imported the command line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path


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
    sys.modules.update(dict.fromkeys(modules))  # None: as if it were not there
    # What many of them import, once.
    import megamix.studies.arena.config
    import megamix.studies.swarm.config
    import megamix.training.plan  # noqa: F401

    out.write_text(json.dumps([outcome(command) for command in commands]))
