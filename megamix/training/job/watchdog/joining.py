"""Joining the watchdog: rank 0 listens, and the other ranks prove that they belong to its job.

    rank -> hub    a mark, the rank, a nonce, a proof: 60 bytes
    hub -> rank    a proof: 32 bytes

A proof is an HMAC with the secret of this start of the job, which ranks have from its process group and which never
travels here. Whoever has not given one is a stranger: nothing of its words is read but those 60 bytes, and compared in
constant time; strangers have a deadline, and only so many of them are kept. A rank that was cut off among strangers
tries again.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import random
import secrets
import socket
import struct
import time
from dataclasses import dataclass

from megamix.core.errors import MegamixError
from megamix.core.processes import allow_more_files
from megamix.training.job.watchdog.heartbeat import Connection

JOIN_SECONDS = 60.0
ANSWER_SECONDS = 10.0
STRANGER_SECONDS = 10.0
MAX_STRANGERS = 128
ACCEPTED_AT_ONCE = 128
REST_SECONDS = 1.0
_MARK = b"megamix\x02"
_HELLO = struct.Struct(">8sI16s32s")
_PROOF_BYTES = 32
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True)
class Invitation:
    """Address of the hub. The secret keeps strangers out."""

    hosts: tuple[str, ...]
    port: int
    secret: str
    host: str
    process: int


def invite() -> tuple[socket.socket, Invitation]:
    """A listening socket, and how to reach it: at the address of MASTER_ADDR alone where that can be told."""
    master = os.environ.get("MASTER_ADDR", "")
    server = _listen(_address_of(master))
    server.setblocking(False)
    name = socket.gethostname()
    address, port = server.getsockname()[:2]
    known = (master, address if address not in ("::", "0.0.0.0") else "", name, socket.getfqdn())
    hosts = tuple(dict.fromkeys(host for host in known if host))
    return server, Invitation(hosts, port, secrets.token_hex(16), name, os.getpid())


def _address_of(master: str) -> str:
    """The one address of rank 0's node by which all ranks know it; empty where there may be others."""
    if master == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(master))
    except ValueError:
        pass
    try:
        found = (
            {str(info[4][0]) for info in socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)} if master else set()
        )
    except OSError:
        return ""
    # A host may know its own name by a loopback address, which other nodes do not.
    only = found.pop() if len(found) == 1 else ""
    return "" if not only or "%" in only or ipaddress.ip_address(only).is_loopback else only


def _listen(address: str) -> socket.socket:
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server((address, 0), family=family, backlog=4096)
        except OSError:
            pass  # of a router before this node, or of a service
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def join(invitation: Invitation, rank: int) -> tuple[Connection, Invitation]:
    """Connects a rank to the hub.

    Raises:
        MegamixError: none of the hub's addresses can be reached, or none answers as a hub of this job.
    """
    deadline, problem = time.monotonic() + JOIN_SECONDS, None
    while time.monotonic() < deadline:
        for host in invitation.hosts:
            try:
                stream = socket.create_connection((host, invitation.port), timeout=5)
                try:
                    _introduce(stream, invitation, rank)
                except BaseException:
                    stream.close()
                    raise
            except OSError as error:
                problem = f"{host}: {error}"
                continue
            connection = Connection(stream)
            connection.send({"who": [socket.gethostname(), os.getpid()]})
            return connection, invitation
        time.sleep(random.uniform(0.1, 0.3))  # not all ranks at once
    raise MegamixError(
        f"rank {rank} cannot reach rank 0's watchdog at port {invitation.port} ({problem}). Let the nodes of the job connect to each "
        "other, or do without: watchdog.silence_seconds=0 watchdog.stall_minutes=0."
    )


def _introduce(stream: socket.socket, invitation: Invitation, rank: int) -> None:
    stream.settimeout(ANSWER_SECONDS)
    nonce = secrets.token_bytes(16)
    stream.sendall(_HELLO.pack(_MARK, rank, nonce, _proof(invitation.secret, b"rank", rank, nonce)))
    answer = b""
    while len(answer) < _PROOF_BYTES:
        data = stream.recv(_PROOF_BYTES - len(answer))
        if not data:
            raise ConnectionError("the connection was closed")
        answer += data
    if not hmac.compare_digest(answer, _proof(invitation.secret, b"hub", rank, nonce)):
        raise ConnectionError("another program answers there")


def _proof(secret: str, role: bytes, rank: int, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + struct.pack(">I", rank) + nonce, "sha256")


@dataclass
class _Stranger:
    stream: socket.socket
    since: float
    said: bytes = b""


class Lobby:
    """The hub's listening socket, and the strangers who have connected.

    Attributes:
        is_exhausted: this process, or the machine, has no descriptor or memory for another connection; ranks that wait
            to be heard cannot be.
    """

    def __init__(self, server: socket.socket, secret: str, world_size: int) -> None:
        allow_more_files()  # a connection a rank
        self._server, self._secret, self._world_size = server, secret, world_size
        self._strangers: list[_Stranger] = []
        self._resting_until = 0.0
        self.is_exhausted = False

    @property
    def sockets(self) -> list[socket.socket]:
        """What to wait for."""
        server = [self._server] if time.monotonic() >= self._resting_until else []
        return [*server, *(stranger.stream for stranger in self._strangers)]

    def admit(self) -> list[tuple[int, Connection]]:
        """New connections of ranks."""
        self._strangers += self._accept()
        admitted: list[tuple[int, Connection]] = []
        waiting = []
        for stranger in self._strangers:
            rank = self._listen(stranger)
            if rank is not None:
                admitted.append((rank, Connection(stranger.stream)))
            elif stranger.stream.fileno() != -1:
                waiting.append(stranger)
        surplus = max(0, len(waiting) - MAX_STRANGERS)
        if self.is_exhausted:
            surplus = max(surplus, -(-len(waiting) // 2))
        for stranger in waiting[:surplus]:
            stranger.stream.close()
        self._strangers = waiting[surplus:]
        return admitted

    def _accept(self) -> list[_Stranger]:
        accepted: list[_Stranger] = []
        now = time.monotonic()
        for _ in range(ACCEPTED_AT_ONCE if now >= self._resting_until else 0):
            try:
                stream, _ = self._server.accept()
            except BlockingIOError:
                self.is_exhausted = False
                break
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self.is_exhausted, self._resting_until = True, now + REST_SECONDS
                    break
                continue  # an error of that one connection
            self.is_exhausted = False
            stream.setblocking(False)
            accepted.append(_Stranger(stream, now))
        return accepted

    def _listen(self, stranger: _Stranger) -> int | None:
        """The rank that a stranger has proved to be; closes the connection of one that cannot any more."""
        try:
            data = stranger.stream.recv(_HELLO.size - len(stranger.said))
            stranger.said += data
            if len(stranger.said) == _HELLO.size:
                mark, rank, nonce, proof = _HELLO.unpack(stranger.said)
                is_proved = hmac.compare_digest(proof, _proof(self._secret, b"rank", rank, nonce))
                if is_proved and mark == _MARK and 0 < rank < self._world_size:
                    stranger.stream.send(_proof(self._secret, b"hub", rank, nonce))
                    return rank
                data = b""
            if data and time.monotonic() - stranger.since < STRANGER_SECONDS:
                return None
        except BlockingIOError:
            if time.monotonic() - stranger.since < STRANGER_SECONDS:
                return None
        except OSError:
            pass
        stranger.stream.close()
        return None

    def close(self) -> None:
        self._server.close()
        for stranger in self._strangers:
            stranger.stream.close()
