"""How the text of a domain is divided among jobs, so that any number of them share the work evenly.

Files that can be read from anywhere (plain .jsonl) are dealt out block by block. What has to be read from its beginning
(compressed files, row groups) goes to one job as a whole, the largest first, each to the job with least so far; where
one is too large for that, all jobs read it and deal out its blocks. Every job computes the same division from the
files' sizes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megamix.core.errors import InputError
from megamix.prepare.blocks import Piece

_SPLIT_ABOVE = 0.25  # of what one job has to read: a larger piece is dealt out in blocks


@dataclass(frozen=True, order=True)
class Shard:
    """One job of several."""

    number: int = 1
    """Which one, from 1."""
    count: int = 1
    """How many there are."""

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
        """What its files' names end with; nothing where it is the only one."""
        return f"-{self.number:05}-of-{self.count:05}" if self.count > 1 else ""

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Share:
    """What a job reads of a piece."""

    piece: Piece
    """The piece."""
    every: int = 1
    """It reads one block in so many."""
    turn: int = 0
    """The first of them."""

    def wants(self, number: int) -> bool:
        """Whether the block of this number is the job's."""
        return number % self.every == self.turn

    @property
    def num_bytes(self) -> int:
        """About how many bytes of the file that is."""
        return self.piece.num_bytes // self.every


def divide(pieces: Sequence[Piece], shard: Shard) -> list[Share]:
    """What this job reads of a domain, in the order of the pieces. Over all jobs every block comes exactly once."""
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
            # A turn later from file to file, or the first job would have all files of one block.
            shares.append(Share(piece, shard.count, (shard.number - 1 - number) % shard.count))
        elif number in mine:
            shares.append(Share(piece))
    return shares
