"""Heartbeats: messages between ranks beside the process groups, one JSON object a line, over a connection to rank 0."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megamix.core.errors import MegamixError

JOIN_SECONDS = 30.0


@dataclass(frozen=True)
class Invitation:
    """Address of the hub. The secret keeps strangers out."""

    hosts: tuple[str, ...]
    port: int
    secret: str
    host: str
    process: int


class Connection:
    """Messages over a socket, without ever waiting for the other side."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = stream
        self._in, self._out = b"", b""
        self.is_closed = False

    def fileno(self) -> int:
        return self._stream.fileno()

    def send(self, message: dict[str, Any] | None = None) -> None:
        """Sends a message, after unsent parts of earlier ones."""
        if message is not None:
            self._out += json.dumps(message).encode() + b"\n"
        try:
            while self._out:
                self._out = self._out[self._stream.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._out = b""  # `receive` says that it is closed, after what came before

    def receive(self) -> list[dict[str, Any]]:
        """New messages; sets ``is_closed`` once there will be no more."""
        try:
            while data := self._stream.recv(1 << 16):
                self._in += data
            self.is_closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True
        *lines, self._in = self._in.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.is_closed = True
        self._stream.close()


def invite() -> tuple[socket.socket, Invitation]:
    """A listening socket, and how to reach it; only from this machine where the job is on one."""
    master = os.environ.get("MASTER_ADDR", "")
    if master in ("localhost", "127.0.0.1"):
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    else:
        server = socket.create_server(("", 0), backlog=4096)
    server.setblocking(False)
    name = socket.gethostname()
    hosts = tuple(dict.fromkeys(host for host in (master, name, socket.getfqdn()) if host))
    return server, Invitation(hosts, server.getsockname()[1], secrets.token_hex(16), name, os.getpid())


def join(invitation: Invitation, rank: int) -> tuple[Connection, Invitation]:
    """Connects a rank to the hub.

    Raises:
        MegamixError: none of the hub's addresses can be reached.
    """
    deadline, problem = time.monotonic() + JOIN_SECONDS, None
    while time.monotonic() < deadline:
        for host in invitation.hosts:
            try:
                stream = socket.create_connection((host, invitation.port), timeout=5)
            except OSError as error:
                problem = f"{host}: {error}"
                continue
            connection = Connection(stream)
            own = {"host": socket.gethostname(), "process": os.getpid()}
            connection.send({"hello": rank, "secret": invitation.secret, **own})
            return connection, invitation
        time.sleep(0.2)
    raise MegamixError(
        f"rank {rank} cannot reach rank 0's watchdog at port {invitation.port} ({problem}). Let the nodes of the job connect to each "
        "other, or do without: watchdog.silence_seconds=0 watchdog.stall_minutes=0."
    )


def wait_for(ready: Sequence[Any], seconds: float) -> set[int]:
    """The file numbers among those that can be read, once one can; any number of them."""
    poll = select.poll()
    for stream in ready:
        poll.register(stream, select.POLLIN)
    return {number for number, _ in poll.poll(1000 * seconds)}


def drain(wake: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while wake.recv(64):
            pass
