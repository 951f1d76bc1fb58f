"""Who speaks with the watchdog: strangers, ranks that nobody understands; and a watchdog that fails itself."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watched_ranks import Ranks, after, die, hang

from megamix.core.errors import MegamixError
from megamix.training.config import WatchdogConfig
from megamix.training.job.watchdog import Watchdog, joining, judge
from megamix.training.job.watchdog.heartbeat import LONGEST_LINE, Connection
from megamix.training.job.watchdog.joining import Invitation, Lobby, invite, join
from megamix.training.job.watchdog.judge import Hub, Spoke, State, Verdict

pytest_plugins = ["watched_job"]
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DEEP = b"[" * 100_000 + b"\n"


class Desk:
    """A hub in this process, that turns when it is told to."""

    def __init__(self, world_size: int, silence: float = 60.0) -> None:
        server, self.invitation = invite()
        self.hub = Hub(server, self.invitation, world_size, WatchdogConfig(silence_seconds=silence, stall_minutes=0))
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self.sockets: list[socket.socket] = []

    @property
    def lobby(self) -> Lobby:
        return self.hub._lobby

    def turn(self, seconds: float = 0.02) -> Verdict | None:
        return self.hub.turn(State(), self._woken, seconds)

    def connect(self, said: bytes = b"") -> socket.socket:
        """A stranger that says something."""
        stream = socket.create_connection(("127.0.0.1", self.invitation.port))
        self.sockets.append(stream)
        with suppress(ConnectionError):
            stream.sendall(said)
        return stream

    def join(self, rank: int) -> Connection:
        """A rank that joins, as from a process of its own."""
        joined: list[Connection] = []
        thread = threading.Thread(target=lambda: joined.append(join(self.invitation, rank)[0]))
        thread.start()
        while thread.is_alive() or not self.hub._peers[rank].is_joined:
            assert self.turn() is None
            assert thread.is_alive() or joined
        return joined[0]

    def close(self) -> None:
        self.hub.close()
        for stream in (*self.sockets, self._wake, self._woken):
            stream.close()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(judge, "GATHER_SECONDS", 0.0)
    opened: list[Desk] = []

    def make(world_size: int, silence: float = 60.0) -> Desk:
        opened.append(Desk(world_size, silence))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def hello(invitation: Invitation, rank: int, secret: str | None = None) -> bytes:
    nonce = bytes(range(16))
    proof = joining._proof(secret or invitation.secret, b"rank", rank, nonce)
    return joining._HELLO.pack(joining._MARK, rank, nonce, proof)


def is_cut_off(stream: socket.socket) -> bool:
    stream.setblocking(False)
    try:
        return stream.recv(100) == b""
    except ConnectionError:
        return True
    except BlockingIOError:
        return False


# Strangers at the port


def test_strangers_at_the_port_do_not_disturb_a_job(job: Ranks) -> None:
    """Deep JSON, what never ends, more connections than are kept, noise, another job's rank and who says nothing."""
    job.start(hang, hang, after(4.0, die))
    job.wait_until_started()
    address = ("127.0.0.1", json.loads((job.folder / "invitation").read_text())["port"])
    strangers = [socket.create_connection(address) for _ in range(6)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b'{"hello": 1, "secret": "guessed", "host": "x", "process": 1}\n{"fail": "x", "code": 9}\n')
    strangers[2].sendall(b"[1]\n\xff\xfe\n")
    with suppress(ConnectionError):
        strangers[3].sendall(DEEP)
    with suppress(ConnectionError):
        for _ in range(40):
            strangers[4].sendall(b"x" * 2**20)
    strangers += [socket.create_connection(address) for _ in range(400)]
    strangers[5].close()
    assert job.wait() == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        assert "rank 2 of 3" in job.said(rank)
        assert "Traceback" not in job.said(rank)
        assert job.said(rank).count("megamix: ") == 1
    for stranger in strangers:
        stranger.close()


def test_what_strangers_say_is_not_parsed_and_a_rank_still_joins(desk: Callable[..., Desk]) -> None:
    here = desk(3)
    whole = hello(here.invitation, 1)
    said = st.one_of(
        st.binary(max_size=300),
        st.sampled_from([DEEP, b"x" * 2**20, b'{"state": [1, "x", 0, "y"]}\n', whole[:-1], b"\x00" * 60]),
        st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)).map(
            lambda change: bytes(byte ^ (change[1] if at == change[0] else 0) for at, byte in enumerate(whole))
        ),
    )

    @FEW
    @given(said, st.booleans())
    def speak(words: bytes, leaves: bool) -> None:
        stranger = here.connect(words[:200_000])
        if leaves:
            stranger.close()
        assert here.turn() is None
        assert not any(peer.is_joined or peer.connection for peer in here.hub._peers)
        assert all(len(each.said) < len(whole) for each in here.lobby._strangers)

    speak()
    here.join(1)
    assert not here.hub._peers[2].is_joined


@pytest.mark.parametrize("rank", [0, 3, 2**32 - 1])
def test_a_rank_that_there_is_not_is_a_stranger(desk: Callable[..., Desk], rank: int) -> None:
    here = desk(3)
    stranger = here.connect(hello(here.invitation, rank))
    assert here.turn() is None
    assert is_cut_off(stranger)


def test_the_secret_does_not_travel_and_another_is_refused(desk: Callable[..., Desk]) -> None:
    here = desk(3)
    assert here.invitation.secret.encode() not in hello(here.invitation, 1)
    assert bytes.fromhex(here.invitation.secret) not in hello(here.invitation, 1)
    stranger = here.connect(hello(here.invitation, 1, secret="0" * 32))
    assert here.turn() is None
    assert is_cut_off(stranger)


def test_nobody_takes_the_place_of_a_rank_that_has_joined(desk: Callable[..., Desk]) -> None:
    """Not even with its own words, said again."""
    here = desk(3)
    rank = here.join(1)
    again = here.connect(hello(here.invitation, 1) + b'{"bye": true}\n')
    assert here.turn() is None
    assert is_cut_off(again) or is_cut_off(again)  # after the hub's answer
    rank.send({"state": [7, "training", 0.0, "here"]})
    assert here.turn() is None
    assert here.hub._peers[1].state.step == 7
    assert not here.hub._peers[1].is_leaving


def test_a_rank_that_was_cut_off_while_it_joined_tries_again(desk: Callable[..., Desk]) -> None:
    """That is no end of a process."""
    here = desk(2)
    for _ in range(3):
        here.connect(hello(here.invitation, 1))
        assert here.turn() is None
        here.sockets.pop().close()
        assert here.turn() is None
    here.join(1)
    assert here.turn() is None


def test_strangers_that_say_nothing_have_a_deadline(desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    here = desk(2)
    strangers = [here.connect(), here.connect(hello(here.invitation, 1)[:59])]
    here.turn()
    assert len(here.lobby._strangers) == 2
    monkeypatch.setattr(joining, "STRANGER_SECONDS", 0.0)
    here.turn()
    assert here.lobby._strangers == []
    assert all(map(is_cut_off, strangers))


def test_the_oldest_strangers_go_when_there_are_too_many(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "MAX_STRANGERS", 4)
    here = desk(2)
    strangers = [here.connect() for _ in range(20)]
    here.turn()
    assert [is_cut_off(stranger) for stranger in strangers] == [True] * 16 + [False] * 4
    here.join(1)


# Descriptors


def test_a_hub_without_descriptors_goes_on_and_blames_nobody(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers go, ranks that cannot be heard are not silent, and join once there are descriptors again."""
    monkeypatch.setattr(joining, "REST_SECONDS", 0.01)
    here = desk(3, silence=0.2)
    first = here.join(1)
    strangers = [here.connect() for _ in range(4)]
    here.turn()
    real = here.lobby._server

    class Exhausted:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

    monkeypatch.setattr(here.lobby, "_server", Exhausted())
    for _ in range(20):
        first.send({"state": [7, "training", 0.0, "here"]})
        assert here.turn(0.05) is None
    assert all(map(is_cut_off, strangers))
    monkeypatch.setattr(here.lobby, "_server", real)
    here.hub._silence = 60.0
    here.join(2)


def test_a_job_whose_rank_0_runs_out_of_descriptors(job: Ranks) -> None:
    """Really: it may have but a few more, and 100 strangers come."""

    def run_out(watchdog: Watchdog) -> None:
        used = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, used + 4))
        hang(watchdog)

    job.start(run_out, hang, after(5.0, die))
    job.wait_until_started()
    time.sleep(1.0)
    address = ("127.0.0.1", json.loads((job.folder / "invitation").read_text())["port"])
    strangers = [socket.create_connection(address) for _ in range(100)]
    assert job.wait() == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        assert "rank 2 of 3" in job.said(rank)
        assert "Traceback" not in job.said(rank)
    for stranger in strangers:
        stranger.close()


# What ranks say

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
KEYS = ("state", "who", "bye", "lost", "fail", "code", "stated", "step", "verdict", "over")
MESSAGE = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5).map(lambda said: json.dumps(said).encode() + b"\n")
LINE = st.one_of(
    MESSAGE,
    st.binary(max_size=100).map(lambda line: line + b"\n"),
    JSON.map(lambda said: json.dumps(said).encode() + b"\n"),
    st.sampled_from([DEEP, b"x" * (LONGEST_LINE + 1), b"9" * 5000 + b"\n", b'{"state": [1, "x", 1e999, "y"]}\n']),
)


def test_a_hub_outlives_whatever_a_rank_says(desk: Callable[..., Desk]) -> None:
    """What it cannot understand is no reason to end the job: that rank is not watched any more."""

    @FEW
    @given(st.lists(LINE, min_size=1, max_size=4))
    def say(lines: list[bytes]) -> None:
        here = desk(3)
        ours, its = socket.socketpair()
        here.hub._admit(here.hub._peers[1], Connection(ours))
        its.sendall(b'{"who": ["node", 7]}\n' + b"".join(lines)[:150_000])
        verdict = here.turn()
        assert verdict is None or (verdict.rank == 1 and verdict.is_told and 0 <= verdict.code <= 255)
        its.close()
        here.hub.close()

    say()


@pytest.mark.parametrize("words", [DEEP, b"x" * 2 * LONGEST_LINE, b"[1]\n", b'{"state": 1}\n', b"\xff\n"])
def test_a_rank_that_nobody_understands_is_not_watched_any_more(
    desk: Callable[..., Desk], words: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """And told so, for it would take a closed connection for the end of rank 0."""
    here = desk(2, silence=0.5)
    rank = here.join(1)
    rank._stream.setblocking(True)
    rank._stream.sendall(words)
    rank._stream.setblocking(False)
    heard = []
    for _ in range(20):
        assert here.turn(0.05) is None
        heard += rank.receive()
    assert {"over": True} in heard
    assert not rank.is_closed
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"megamix: the watchdog does not watch rank 1 of 2 ({socket.gethostname()}, process {os.getpid()})"
    )


def test_a_spoke_does_not_trust_who_answers_at_the_hubs_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.5)
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with suppress(OSError):
            while True:
                stream, _ = server.accept()
                stream.sendall(b"\x00" * 32 + b'{"verdict": {"reason": "x", "code": 9}}\n')

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(MegamixError, match="another program answers there"):
        join(Invitation(("127.0.0.1",), server.getsockname()[1], "secret", "", 0), 1)
    server.shutdown(socket.SHUT_RDWR)
    server.close()


# A watchdog that fails


@pytest.mark.parametrize("broken", [Hub, Spoke])
def test_a_watchdog_that_fails_says_so_and_the_run_goes_on(
    job: Ranks, monkeypatch: pytest.MonkeyPatch, broken: type
) -> None:
    """No rank is blamed: neither rank 0, whose hub it is, nor the others."""
    real = broken.turn

    def turn(link: Hub | Spoke, state: State, *given: object) -> Verdict | None:
        if state.doing == "breaking" and (broken is Hub or state.step == 1):
            raise RuntimeError("a defect")
        return real(link, state, *given)

    monkeypatch.setattr(broken, "turn", turn)

    def train(rank: int) -> Callable[[Watchdog], None]:
        def run(watchdog: Watchdog) -> None:
            watchdog.progress(rank, "breaking")
            time.sleep(6.0)

        return run

    job.start(*map(train, range(3)), silence=2.0)
    assert job.wait() == [0, 0, 0]
    told = "megamix: [rank {}] {} failed, and the run goes on without it: RuntimeError: a defect\n"
    if broken is Hub:
        hub = told.format(0, "the watchdog, which rank 0 keeps for all ranks,")
        assert [job.said(rank) for rank in range(3)] == [hub, "", ""]
    else:
        assert job.said(1) == told.format(1, "its watchdog")
        assert job.said(0).startswith("megamix: the watchdog does not watch rank 1 of 3")
        assert job.said(2) == ""
