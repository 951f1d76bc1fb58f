"""Judging whether and why a job ends: rank 0's `Hub` judges the other ranks, each `Spoke` judges rank 0.

    spoke -> hub    {"who": [host, process]}, {"state": [...]}, {"bye"}, {"lost": reason},
                    {"fail", "code", "stated", "step"}
    hub -> spoke    {"state": [...]}, {"bye"}, {"verdict": {...}}, {"over"}

Times are differences of one host's monotonic clock: clocks of hosts are not compared.

A watchdog that fails is no reason to end a job. A spoke says so (lost), and is not watched any more; a hub tells all
others that nobody watches (over), and neither closes connections: that would look like the end of their process.
"""

from __future__ import annotations

import math
import socket
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from megamix.core.errors import EXIT_FAILED
from megamix.training.config import WatchdogConfig
from megamix.training.job.watchdog.heartbeat import Connection, drain, say, wait_for
from megamix.training.job.watchdog.joining import Invitation, Lobby

# A rank that loses its connection to a failing one fails too; the cause gets this long to be reported.
UNSURE_SECONDS = 2.0
PART_SECONDS = 1.0
GATHER_SECONDS = 0.05
LONGEST_REASON = 8000
"""Characters; less than `heartbeat.LONGEST_LINE` bytes as JSON."""
_NEXT = "The same command resumes the run from its last checkpoint."


@dataclass(frozen=True)
class State:
    """State of a rank, in its words.

    Attributes:
        step: steps taken.
        idle: seconds since its last progress.
        place: its place in the code.
    """

    step: int = 0
    doing: str = "starting"
    idle: float = 0.0
    place: str = "an unknown place"

    @classmethod
    def of(cls, message: dict[str, Any]) -> State:
        """The state in a message; raises ValueError or TypeError where there is none."""
        step, doing, idle, place = message["state"]
        if type(step) is not int or not isinstance(doing, str) or not isinstance(place, str):
            raise TypeError
        if not math.isfinite(idle) or idle < 0:
            raise ValueError
        return cls(step, doing, float(idle), place)

    def __str__(self) -> str:
        return f"step {self.step}, {self.doing} for {self.idle:.0f} s, at {self.place}"


@dataclass(frozen=True)
class Verdict:
    """Reason for the end of the job.

    Attributes:
        rank: the one that is the cause; None where there is no single one.
        code: the exit code.
        is_told: whether the cause was told by that rank, which prints it.
        is_own: whether this process found it out, rather than being told.
    """

    reason: str
    code: int
    rank: int | None = None
    is_told: bool = False
    is_own: bool = True


@dataclass
class _Peer:
    """A rank, as another one knows it.

    Attributes:
        is_joined: it has said who it is.
        is_lost: it is not watched, as its watchdog failed.
    """

    rank: int
    heard: float
    host: str = "?"
    process: int = 0
    state: State = State()
    connection: Connection | None = None
    is_joined: bool = False
    is_leaving: bool = False
    is_lost: bool = False

    def name(self, world_size: int) -> str:
        where = f" ({self.host}, process {self.process})" if self.process else ""
        return f"rank {self.rank} of {world_size}{where}"

    def silence(self, seconds: float, world_size: int) -> Verdict:
        reason = (
            f"{self.name(world_size)} has not been heard of for {seconds:.0f} s (watchdog.silence_seconds): it was stopped, hangs or "
            f"has lost its node. Its last word: {self.state}. {_NEXT}"
        )
        return Verdict(reason, EXIT_FAILED, self.rank)

    def end(self, now: float, world_size: int) -> Verdict:
        reason = (
            f"{self.name(world_size)} is gone: its process ended without a word. Its last, {now - self.heard:.0f} s before: "
            f"{self.state}. {_NEXT}"
        )
        return Verdict(reason, EXIT_FAILED, self.rank)


class Spoke:
    """The side of every rank but 0."""

    def __init__(self, joined: tuple[Connection, Invitation], world_size: int, config: WatchdogConfig) -> None:
        connection, hub = joined
        self._hub = _Peer(0, time.monotonic(), hub.host, hub.process, connection=connection)
        self._connection = connection
        self._world_size, self._silence = world_size, config.silence_seconds
        self._is_leaving = False
        self.is_over = False

    def hear_self(self, word: dict[str, Any]) -> None:
        """Sends a message of this rank."""
        self._is_leaving |= "bye" in word
        self._connection.send(word)

    def turn(self, state: State, wake: socket.socket, interval: float) -> Verdict | None:
        """Sends the state of this rank, and listens for ``interval`` seconds, or until ``wake``."""
        self._connection.send({"state": list(asdict(state).values())})
        deadline = time.monotonic() + interval
        while (left := deadline - time.monotonic()) > 0:
            ready = wait_for([self._connection, wake], left)
            messages = self._connection.receive()
            if self._connection.problem:
                raise ValueError(f"rank 0 said {self._connection.problem}")
            for message in messages:
                self._hub.heard = time.monotonic()
                if "state" in message:
                    self._hub.state = State.of(message)
                elif "verdict" in message:
                    return replace(Verdict(**message["verdict"]), is_own=False)
                else:
                    self._hub.is_leaving |= "bye" in message
                    self.is_over |= "over" in message
            if self._connection.is_closed and not self.is_over:
                self.is_over = True
                expected = self._is_leaving or self._hub.is_leaving or not self._silence
                return None if expected else self._hub.end(time.monotonic(), self._world_size)
            if self.is_over:
                return None
            if wake.fileno() in ready:
                drain(wake)
                return None
        since = time.monotonic() - self._hub.heard
        return self._hub.silence(since, self._world_size) if 0 < self._silence < since else None

    def give_up(self, reason: str) -> None:
        """Tells rank 0 not to watch this rank any more."""
        self._connection.send({"lost": reason})

    def part(self) -> None:
        """Nothing to do: sent messages need no help."""

    def close(self) -> None:
        self._connection.close()


class Hub:
    """Rank 0's side, which judges."""

    def __init__(self, server: socket.socket, invitation: Invitation, world_size: int, config: WatchdogConfig) -> None:
        self._lobby = Lobby(server, invitation.secret, world_size)
        self._world_size = world_size
        self._silence, self._stall = config.silence_seconds, 60 * config.stall_minutes
        now = time.monotonic()
        self._peers = [_Peer(rank, now) for rank in range(world_size)]
        self._peers[0].host, self._peers[0].process = invitation.host, invitation.process
        self._advanced = now  # when any rank last began something else
        # By how likely each is the cause: told with a reason, gone, told without one.
        self._suspects: list[tuple[int, Verdict]] = []
        self._suspected = 0.0
        self.is_over = False

    def hear_self(self, word: dict[str, Any]) -> None:
        """Sends a message of rank 0."""
        self._hear(self._peers[0], word)
        if "bye" in word:
            self._tell(word)

    def turn(self, state: State, wake: socket.socket, interval: float) -> Verdict | None:
        """Sends the state of rank 0, and listens for ``interval`` seconds, or until ``wake``."""
        self._tell({"state": list(asdict(state).values())})
        self._note_state(self._peers[0], state)
        deadline = time.monotonic() + interval
        while (left := deadline - time.monotonic()) > 0:
            known = [peer.connection for peer in self._peers if peer.connection is not None and not peer.is_lost]
            ready = wait_for([wake, *known, *self._lobby.sockets], min(left, UNSURE_SECONDS / 4))
            if ready:
                # Many words at a time: rank 0's training thread shares Python's lock with this one.
                time.sleep(GATHER_SECONDS)
            for rank, connection in self._lobby.admit():
                self._admit(self._peers[rank], connection)
            for peer in self._peers:
                if peer.connection is not None and peer.connection.fileno() in ready and not peer.is_lost:
                    self._listen(peer, peer.connection)
            verdict = self._judge()
            if verdict is not None or self.is_over:
                return verdict
            if wake.fileno() in ready:
                drain(wake)
                return None
        return None

    def _admit(self, peer: _Peer, connection: Connection) -> None:
        """Gives a new connection to its rank, which may have tried before, but joins once."""
        if peer.is_joined:
            connection.close()
            return
        if peer.connection is not None:
            peer.connection.close()
        peer.connection, peer.heard = connection, time.monotonic()
        if self._peers[0].is_leaving:
            connection.send({"bye": True})

    def _listen(self, peer: _Peer, connection: Connection) -> None:
        problem = None
        for message in connection.receive():
            peer.heard = time.monotonic()
            try:
                self._hear(peer, message)
            except (KeyError, TypeError, ValueError, OverflowError):
                problem = f"it said what is no message: {str(message)[:40]}"
        if connection.problem:
            problem = f"it said {connection.problem}"
        if problem:
            connection.send({"over": True})
            self._lose(peer, problem)
        elif connection.is_closed:
            connection.close()
            peer.connection = None
            if not peer.is_joined:
                return  # it tries again
            if not peer.is_leaving and self._silence:
                self._suspect(1, peer.end(time.monotonic(), self._world_size))
            peer.is_leaving = True

    def _lose(self, peer: _Peer, problem: str) -> None:
        peer.is_leaving = peer.is_lost = True
        say(f"the watchdog does not watch {peer.name(self._world_size)} any more: {problem}. The run goes on.")

    def _hear(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "state" in message:
            self._note_state(peer, State.of(message))
        elif "who" in message:
            host, process = message["who"]
            peer.host, peer.process, peer.is_joined = str(host), int(process), True
        elif "bye" in message:
            peer.is_leaving = True
            self._advanced = time.monotonic()
        elif "lost" in message:
            self._lose(peer, str(message["lost"]))
        elif "fail" in message:
            step, code = int(message["step"]), int(message["code"])
            if not 0 <= code <= 255:
                raise ValueError
            reason = f"{peer.name(self._world_size)} failed after step {step}: {message['fail']}"
            self._suspect(0 if message["stated"] else 2, Verdict(_clip(reason), code, peer.rank, is_told=True))

    def _note_state(self, peer: _Peer, state: State) -> None:
        peer.state, peer.heard = state, time.monotonic()
        self._advanced = max(self._advanced, peer.heard - state.idle)

    def _suspect(self, likelihood: int, verdict: Verdict) -> None:
        if not self._suspects:
            self._suspected = time.monotonic()
        self._suspects.append((likelihood, verdict))

    def _judge(self) -> Verdict | None:
        """The verdict once it is certain, sent to every spoke."""
        verdict = self._likeliest() if self._suspects else self._silent_or_still()
        if verdict is not None:
            self._tell({"verdict": asdict(verdict)})
        elif not self._suspects and all(peer.is_leaving for peer in self._peers):
            self._tell({"over": True})
            self.is_over = True
        return verdict

    def _likeliest(self) -> Verdict | None:
        likelihood, verdict = min(self._suspects, key=lambda suspect: suspect[0])
        return verdict if likelihood == 0 or time.monotonic() - self._suspected > UNSURE_SECONDS else None

    def _silent_or_still(self) -> Verdict | None:
        now = time.monotonic()
        # A rank that is done goes on speaking until all are, or has closed its connection.
        watched = [peer for peer in self._peers if peer.connection is not None or not peer.is_leaving]
        for peer in watched:
            if peer.is_lost or (self._lobby.is_exhausted and not peer.is_joined):
                continue
            if peer.rank and 0 < self._silence < now - peer.heard:
                return peer.silence(now - peer.heard, self._world_size)
        if 0 < self._stall < now - self._advanced:
            return Verdict(self._standstill(), EXIT_FAILED)
        return None

    def _standstill(self) -> str:
        """The places of all ranks, the smallest groups first."""
        groups: dict[tuple[int, str, str], list[int]] = {}
        for peer in self._peers:
            groups.setdefault((peer.state.step, peer.state.doing, peer.state.place), []).append(peer.rank)
        shown = [
            f"{_ranks(ranks)} ({self._peers[ranks[0]].host}): step {step}, {doing}, at {place}"
            for (step, doing, place), ranks in sorted(groups.items(), key=lambda group: len(group[1]))
        ]
        began = f"nothing has advanced for {self._stall / 60:g} min (watchdog.stall_minutes). "
        return f"{began}{_clip('; '.join(shown))}. {_NEXT}"

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers:
            if peer.connection is not None:
                peer.connection.send(message)

    def give_up(self, reason: str) -> None:
        """Tells the others that nobody watches any more."""
        self._tell({"over": reason})
        self._lobby.close()

    def part(self) -> None:
        """Waits briefly until the spokes have the verdict and are gone."""
        deadline = time.monotonic() + PART_SECONDS
        left = [peer.connection for peer in self._peers if peer.connection is not None]
        while left and time.monotonic() < deadline:
            wait_for(left, 0.05)
            for connection in left:
                connection.send()
                connection.receive()
            left = [connection for connection in left if not connection.is_closed]

    def close(self) -> None:
        self._lobby.close()
        for peer in self._peers:
            if peer.connection is not None:
                peer.connection.close()


def _clip(reason: str) -> str:
    return reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0 to 6, 8``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
