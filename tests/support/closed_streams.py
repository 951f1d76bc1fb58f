"""Runs ``megamix`` with closed or full standard streams: forked once for each case, so that imports are paid once.

    python closed_streams.py FOLDER CASES

CASES is JSON: [{"arguments": [...], "closed": [1, 2], "full": [1]}]. What case N says on standard output and standard
error goes to FOLDER/N.1 and FOLDER/N.2; standard output has the exit codes, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import megamix.analysis.compare
import megamix.analysis.doctor
import megamix.analysis.inspect
import megamix.analysis.replay
import megamix.analysis.report  # noqa: F401 - imported before the forks
from megamix.cli import main


def run(case: dict[str, Any], files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        path = "/dev/full" if number in case.get("full", []) else file
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    for number in case.get("closed", []):
        os.close(number)
        setattr(sys, ("stdout", "stderr")[number - 1], None)  # as Python has it from the start then
    sys.argv = ["megamix", *case["arguments"]]
    main()


if __name__ == "__main__":
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    codes = []
    for index, case in enumerate(cases):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                run(case, [folder / f"{index}.{number}" for number in (1, 2)])
                code = 0
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(codes))
