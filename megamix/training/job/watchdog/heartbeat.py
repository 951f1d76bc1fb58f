"""Heartbeats: messages between ranks beside the process groups, one JSON object a line, over a connection to rank 0.

Only ranks that have proved to belong to the job speak here (`megamix.training.job.watchdog.joining`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Sequence
from typing import Any

from megamix.core.files import parse_json

LONGEST_LINE = 1 << 17
AT_ONCE = 1 << 20
"""Bytes that one call of `Connection.receive` reads: a rank that never stops speaking is not listened to alone."""


class Connection:
    """Messages over a socket, without ever waiting for the other side.

    Attributes:
        is_closed: there will be no more messages.
        problem: what about the last words is no message; none after it are read.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        with contextlib.suppress(OSError):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = stream
        self._in, self._out = b"", b""
        self.is_closed = False
        self.problem: str | None = None

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
        """New messages; sets ``is_closed`` or ``problem`` once there will be no more."""
        try:
            left = AT_ONCE
            while left > 0:
                data = self._stream.recv(1 << 16)
                if not data:
                    self.is_closed = True
                    break
                self._in += data
                left -= len(data)
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True
        *lines, self._in = self._in.split(b"\n")
        if len(self._in) > LONGEST_LINE:
            lines.append(self._in)  # as one that is too long
        messages: list[dict[str, Any]] = []
        for line in lines:
            message = None if self.problem else self._parse(line)
            if message is not None:
                messages.append(message)
        if self.problem:
            self._in = b""
        return messages

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if len(line) > LONGEST_LINE:
            self.problem = f"a message of more than {LONGEST_LINE} bytes"
            return None
        try:
            message = parse_json(line)
        except ValueError:
            message = None
        if isinstance(message, dict):
            return message
        self.problem = f"what is no message: {line[:40]!r}"
        return None

    def close(self) -> None:
        self.is_closed = True
        self._stream.close()


def wait_for(ready: Sequence[Any], seconds: float) -> set[int]:
    """The file numbers among those that can be read, once one can; any number of them."""
    poll = select.poll()
    for stream in ready:
        poll.register(stream, select.POLLIN)
    return {number for number, _ in poll.poll(1000 * seconds)}


def say(text: str) -> None:
    """Prints a line to standard error, past a lock of it that a hung main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"megamix: {text}\n".encode())


def drain(wake: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while wake.recv(64):
            pass
