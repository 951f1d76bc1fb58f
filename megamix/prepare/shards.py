"""Even division of a domain's text among any number of jobs.

Jobs take blocks of seekable files (plain .jsonl) in turn. A piece that must be read from its beginning (a compressed
file, a row group) goes to one job, the largest first, each to the job with the least so far; of a piece too large for
that, all jobs read everything and take blocks in turn. Every job computes the same division from the files' sizes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megamix.core.errors import InputError
from megamix.prepare.pieces import Piece

_SPLIT_ABOVE = 0.25  # of what one job has to read: a larger piece is dealt out in blocks


@dataclass(frozen=True, order=True)
class Shard:
    """One job of several, numbered from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads ``i/n``, for example 2/8.

        Raises:
            InputError: It is not of that form, or i is not within 1 to n.
        """
        match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(
                f"shard '{text}': expected i/n with i from 1 to n, for example 2/8 for the second of eight jobs."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def suffix(self) -> str:
        """Suffix of the job's file names; empty for a single job."""
        return f"-{self.number:05}-of-{self.count:05}" if self.count > 1 else ""

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Share:
    """One job's blocks of a piece: those whose number modulo ``every`` is ``turn``."""

    piece: Piece
    every: int = 1
    turn: int = 0

    def wants(self, number: int) -> bool:
        """Whether the job reads the block of this number."""
        return number % self.every == self.turn

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, about."""
        return self.piece.num_bytes // self.every


def divide(pieces: Sequence[Piece], shard: Shard) -> list[Share]:
    """This job's shares of a domain, in the order of the pieces. Every block belongs to exactly one job."""
    if shard.count == 1:
        return [Share(piece) for piece in pieces]
    streams = [number for number, piece in enumerate(pieces) if not piece.seekable]
    limit = _SPLIT_ABOVE * sum(pieces[number].num_bytes for number in streams) / shard.count
    whole = {number for number in streams if pieces[number].num_bytes <= limit}
    load = [(0, job) for job in range(shard.count)]
    mine: set[int] = set()
    for number in sorted(whole, key=lambda number: (-pieces[number].num_bytes, number)):
        num_bytes, job = heapq.heappop(load)
        heapq.heappush(load, (num_bytes + pieces[number].num_bytes + 1, job))
        if job == shard.number - 1:
            mine.add(number)
    shares: list[Share] = []
    for number, piece in enumerate(pieces):
        if number not in whole:
            # The turn moves on with each file, or the first job would get all files of one block.
            shares.append(Share(piece, shard.count, (shard.number - 1 - number) % shard.count))
        elif number in mine:
            shares.append(Share(piece))
    return shares
