"""One rank of a job whose runs a, a again, b and c are steered between one run and the next."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from jobs import run_rank

from megamix.mixing.steering.journal import ANSWERS, JOURNAL, append_command


def steer(folder: Path, number: int) -> None:
    """Before run ``number``."""
    a, b, c = (folder / name for name in "abc")
    if number == 0:
        a.mkdir()
        append_command(a, {"pin": {"code": 0.45}, "at_step": 8, "ramp_tokens": 2.5 * 8 * 64})
        append_command(a, {"mixer": {"name": "odm", "preset": "paper"}, "set": {"tables": 0.0}, "at_step": 3})
    elif number == 1:  # stopped after step 5
        append_command(a, {"hold": True, "note": "while we look"})
        append_command(a, {"hold": False, "set": {"tables": 0.1}, "at_step": 10})
    elif number == 2:
        shutil.copytree(a, b)
        for step in (5, 8, 12):
            shutil.rmtree(b / "checkpoints" / f"step_{step}")
    else:
        c.mkdir()
        for name in (JOURNAL, ANSWERS):
            shutil.copy(a / name, c / name)


if __name__ == "__main__":
    runs = json.loads(sys.argv[1])
    run_rank(runs, lambda number: steer(Path(runs[0][0]).parent, number))
