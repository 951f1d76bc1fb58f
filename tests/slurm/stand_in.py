#!/usr/bin/python3 -S
"""Takes the place of Python in the jobs of tests of the job scripts: it starts in no time and does what it is told.

Every process leaves a line in FOLDER/events.jsonl for its start and its end. FOLDER, in the environment as STAND_IN,
may hold: ``finish`` (ranks end with exit code 0), ``exit`` (rank 0 ends with this exit code), ``bad_node`` (the node on
which doctor fails), ``deaf`` (USR1 is not caught, as while a program is still starting).
"""

import json
import os
import signal
import socket
import sys
import time
from types import FrameType

FOLDER = os.environ["STAND_IN"]
ARGUMENTS = sys.argv[1:]
COMMAND = ARGUMENTS[2] if ARGUMENTS[:2] == ["-m", "megamix"] else "?"
RANK = os.environ.get("RANK", "")


def text(name: str) -> str:
    """A file of the folder; empty where it is not there."""
    try:
        with open(os.path.join(FOLDER, name), encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def tell(event: str, **more: object) -> None:
    """Adds a line, in one write."""
    names = ("SLURM_RESTART_COUNT", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    seen = {name: os.environ.get(name) for name in names}
    line = {"event": event, "command": COMMAND, "rank": RANK, "node": socket.gethostname(), "arguments": ARGUMENTS[3:]}
    with open(os.path.join(FOLDER, "events.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **seen, **more}) + "\n")


def stop(number: int, _frame: FrameType | None) -> None:
    if text("exit"):
        os._exit(1)  # A rank that has failed agrees to no place to stop at; its peers fail as well.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Ranks leave one after the other, as they do; rank 0 last, with a file still to close.
    time.sleep(0.5 if RANK == "0" else 0.1)
    tell("stopped", signal=signal.Signals(number).name)
    sys.exit(75)


def main() -> int:
    if ARGUMENTS[:2] == ["-m", "torch.distributed.run"]:
        os.execvp(os.environ["STAND_IN_PYTHON"], [os.environ["STAND_IN_PYTHON"], *ARGUMENTS])
    if COMMAND == "doctor":
        tell("start")
        if socket.gethostname() == text("bad_node"):
            print("megamix: there is no GPU. Ask the administrator.", file=sys.stderr)
            return 2
        print("plan: as wanted")
        return 0
    if not text("deaf"):
        signal.signal(signal.SIGUSR1, stop)
        signal.signal(signal.SIGTERM, stop)
    tell("start")
    while not text("finish"):
        code = text("exit")
        if code and RANK in ("0", ""):
            print("megamix: out of luck", file=sys.stderr)
            tell("end", code=int(code))
            return int(code)
        time.sleep(0.05)
    tell("end", code=0)
    return 0


sys.exit(main())
