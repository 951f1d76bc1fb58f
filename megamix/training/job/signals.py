"""Signals of Slurm, a terminal or an administrator, turned into a request to stop.

A rank that gets one goes on working. Its request travels with the sums of its next step (`megamix.mixing.exchange`), so
that all ranks learn of it in the same step, stop at the same boundary and leave a checkpoint there.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""USR1: Slurm's warning before a time limit or a preemption (``--signal``); TERM: ``scancel``; INT: Ctrl-C."""

_received: list[signal.Signals] = []


def heed_signals() -> None:
    """Makes `SIGNALS` requests to stop instead of ending this process; in a main thread only."""
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: _received.append(signal.Signals(number)))


def asked_to_stop() -> bool:
    """Whether this process has received one of `SIGNALS`."""
    return bool(_received)
