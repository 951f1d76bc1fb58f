"""The life of child processes: real ones, whose parents really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from commands import ENVIRONMENT, ROOT, RUN_SECONDS

from megamix.core.processes import die_with_parent, process_began


def child_of_one_that_dies(before: str, after: str) -> str:
    """What a child says whose parent, a process between it and this one, ends between ``before`` and ``after``."""
    code = f"""
import os, signal, sys, time
from megamix.core.processes import die_with_parent
parent = os.getpid()
ready, tell = os.pipe()
gone, end = os.pipe()
if os.fork():
    os.close(end), os.close(tell)
    os.read(ready, 1)
    os._exit(0)
os.close(ready), os.close(gone)
{before}
os.write(tell, b"!")
while os.getppid() == parent:
    time.sleep(0.01)
{after}
print("lives", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=RUN_SECONDS
    )
    return done.stdout


def test_a_child_whose_parent_has_died_before_it_asked_to_die_with_it() -> None:
    """The kernel sends nothing then."""
    assert child_of_one_that_dies("", "die_with_parent(parent)") == ""
    assert child_of_one_that_dies("", "") == "lives\n"


def test_a_child_that_asked_dies_with_its_parent() -> None:
    assert child_of_one_that_dies("die_with_parent(parent)", "time.sleep(0.5)") == ""


def test_a_child_of_a_living_parent_lives() -> None:
    parent = os.getpid()
    child = os.fork()
    if not child:
        die_with_parent(parent)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_when_a_process_began() -> None:
    """Nothing is said of one that is dead, waited for or not."""
    began = process_began(os.getpid())
    assert began is not None
    child = os.fork()
    if not child:
        signal.pause()
    later = process_began(child)
    assert later is not None
    assert later >= began
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process_began(child) is None
    os.waitpid(child, 0)
    assert process_began(child) is None
