"""The life of child processes: real ones, whose parents really die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT, ROOT, RUN_SECONDS

from megamix.core import processes
from megamix.core.processes import die_with_parent, free_port, process_began


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


def test_a_free_port_is_none_that_the_kernel_hands_out() -> None:
    """A connection of another process would take it before the first rank listens on it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    ports = [free_port() for _ in range(8)]
    assert all(1024 <= port < lowest for port in ports)
    assert len(set(ports)) > 1


@pytest.mark.parametrize("lowest", [0, 1024, 1025])
def test_there_is_a_port_where_the_kernel_hands_out_nearly_all(lowest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_lowest_handed_out", lambda: lowest)
    with socket.socket() as listener:
        listener.bind(("", free_port()))
        assert listener.getsockname()[1] > 0
